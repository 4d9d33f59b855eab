"""Models of Hugging Face's own classes, imported and compared with `generate`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.hf_models import MODELS, make_model
from transformer.interop.importing import import_run

TEXTS = 200
PENALTIES = (0.0, 0.6, 1.0, 2.0)
STOPPING = ("false", "true", "never")


def sources_of(run, size):
    """Random texts of pieces without special tokens, and their ids there, padded, with a mask."""
    source, rng = run.tokenizers.source, np.random.default_rng(0)
    roles = {*source.roles[:2], source.roles.bos, source.roles.forced_first}
    plain = [number for number in range(size) if number not in roles]
    texts = [" ".join(f"p{n}" for n in rng.choice(plain, k)) for k in rng.integers(2, 8, TEXTS)]
    rows = [source.theirs[source.encode(text)] for text in texts]
    ids = np.full((TEXTS, max(map(len, rows))), source.roles.pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]
    return texts, {"input_ids": ids, "attention_mask": mask.astype(int)}, plain


def theirs_of(output, target):
    return [int(target.theirs[token]) for token in output.tokens]


def check_outputs(model, trained, texts, inputs, beams, **options):
    """Outputs are those of `generate`, except near ties; so are the scores of beams."""
    import torch

    stopping = {"false": False, "true": True, "never": "never"}
    own = dict(options)
    if "early_stopping" in own:
        own["early_stopping"] = stopping[own["early_stopping"]]
    asked = {"do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    with torch.no_grad():
        expected = model.generate(
            **{name: torch.tensor(value) for name, value in inputs.items()},
            **asked | own,
            return_dict_in_generate=True,
            output_scores=True,
        )
    rows = expected.sequences.numpy()[:, 1:].reshape(TEXTS, beams, -1)
    target = trained.tokenizers.target
    found = trained.generate(texts, beam_size=beams, n_best=beams, **options)
    scores = expected.sequences_scores.numpy().reshape(TEXTS, beams) if beams > 1 else None
    different = 0
    for i in range(TEXTS):
        for k in range(beams):
            row = rows[i, k].tolist()
            end = row.index(target.roles.eos) if target.roles.eos in row else len(row)
            same = row[:end] == theirs_of(found[i][k], target)
            near = scores is not None and abs(scores[i, k] - found[i][k].score) < 1e-4
            assert same or near, (i, k, row[:end], theirs_of(found[i][k], target))
            different += not same
            assert scores is None or near
    assert different <= 0.005 * TEXTS * beams


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_is_that_of_its_own_class(name, tmp_path: Path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = make_model(name, tmp_path / "theirs")
    run = import_run(tmp_path / "theirs", tmp_path / "run")
    trained = run.trained_model()
    source, target = (np.argsort(each.theirs) for each in run.tokenizers)
    texts, inputs, plain = sources_of(run, model.config.vocab_size - 2)
    outputs = np.random.default_rng(1).choice(plain, (TEXTS, 6))
    with torch.no_grad():
        given = {key: torch.tensor(value) for key, value in inputs.items()}
        expected = model(**given, decoder_input_ids=torch.tensor(outputs)).logits.numpy()
    tokens = source[inputs["input_ids"]], target[outputs]
    found = trained.module(*(jnp.asarray(side, jnp.int32) for side in tokens))
    expected = expected[..., run.tokenizers.target.theirs]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    check_outputs(model, trained, texts, inputs, 1)
    grid = [(penalty, stopping) for penalty in PENALTIES for stopping in STOPPING]
    first = list(MODELS).index(name) % 4  # each combination with some of the families
    for penalty, stopping in grid[first::4]:
        check_outputs(
            model, trained, texts, inputs, 4, length_penalty=penalty, early_stopping=stopping
        )
