"""Models of Hugging Face's own classes, imported, compared with `generate`, exported again."""

import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.hf_models import MODELS, STOPPING, compare, make_model
from transformer.interop.huggingface_export import export
from transformer.interop.importing import import_run

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

TEXTS = 200
PENALTIES = (0.0, 0.6, 1.0, 2.0)


def imported(name, folder: Path):
    """A model of a class, and the same as imported."""
    pytest.importorskip("transformers")
    model = make_model(name, folder / "theirs")
    return model, import_run(folder / "theirs", folder / "run").trained_model()


def sources_of(trained, size):
    """Random texts of pieces without special tokens, and their ids there, padded, with a mask."""
    import torch

    source, rng = trained.tokenizers.source, np.random.default_rng(0)
    roles = {*source.roles[:-1]}
    plain = [number for number in range(size) if number not in roles]
    texts = [" ".join(f"p{n}" for n in rng.choice(plain, k)) for k in rng.integers(2, 8, TEXTS)]
    rows = [source.theirs[source.encode(text)] for text in texts]
    ids = np.full((TEXTS, max(map(len, rows))), source.roles.pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}
    return texts, tensors, plain


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_computes_the_same_and_is_exported_as_it_came(name, tmp_path):
    torch, files = pytest.importorskip("torch"), pytest.importorskip("safetensors.numpy")
    model, trained = imported(name, tmp_path)
    _, given, plain = sources_of(trained, model.config.vocab_size - 2)
    outputs = np.random.default_rng(1).choice(plain, (TEXTS, 6))
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=torch.tensor(outputs)).logits.numpy()
    source, target = (np.argsort(each.theirs) for each in trained.tokenizers)
    tokens = source[given["input_ids"].numpy()], target[outputs]
    found = trained.module(*(jnp.asarray(side, jnp.int32) for side in tokens))
    expected = expected[..., trained.tokenizers.target.theirs]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    export(trained, tmp_path / "out")
    folders = tmp_path / "theirs", tmp_path / "out"
    before, after = (files.load_file(folder / "model.safetensors") for folder in folders)
    for key in before.keys() & after.keys():
        np.testing.assert_array_equal(before[key], after[key])
    _, info = type(model).from_pretrained(folders[1], output_loading_info=True)
    assert not any(info.values()), info
    before, after = (json.loads((each / "config.json").read_text()) for each in folders)
    # Transformers says that tables are tied where they are not; that T5 is no MT5 changes nothing.
    # Marian has no BOS.
    same = before.keys() & after.keys() - {"tie_word_embeddings", "architectures", "model_type"}
    same -= {"bos_token_id"} if name == "marian" else set()
    assert {key: before[key] for key in same} == {key: after[key] for key in same}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_scores_are_those_of_generate(name, tmp_path):
    model, trained = imported(name, tmp_path)
    texts, given, _ = sources_of(trained, model.config.vocab_size - 2)
    compare(model, trained, texts, given, 1)
    for penalty, stopping in itertools.product(PENALTIES, STOPPING):
        options = {"length_penalty": penalty, "early_stopping": stopping}
        compare(model, trained, texts, given, 4, **options)
