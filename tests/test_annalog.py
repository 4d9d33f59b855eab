"""A model that its authors trained, in the wheel `annalog`: molecules in SMILES to similar ones."""

import importlib.metadata
import json
import pickle
import re

import numpy as np
import pytest

from transformer.inference.generation import TrainedModel
from transformer.interop.importing import import_run

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

NICOTINE, ASPIRIN = "CN1CCC[C@H]1c1cccnc1", "CC(=O)Oc1ccccc1C(=O)O"
SYMBOL = re.compile(r"\[[^\]]+\]|%\d\d|Br|Cl|.")  # a bracket atom, a ring, an atom or a character
# Its names and those of MarianMTModel, which has the same layers.
RENAMED = {
    "self_attention.fc_o": "self_attn.out_proj",
    "self_attention.fc_": "self_attn.",
    "encoder_attention.fc_o": "encoder_attn.out_proj",
    "encoder_attention.fc_": "encoder_attn.",
    "enc_attn_layer_norm": "encoder_attn_layer_norm",
    "ff_layer_norm": "final_layer_norm",
    "positionwise_feedforward.fc_": "fc",
    "tok_embedding": "embed_tokens",
    "pos_embedding": "embed_positions",
}
OUTSIDE = {"decoder.fc_out.weight": "lm_head.weight", "decoder.fc_out.bias": "final_logits_bias"}
CONFIG = {
    "model_type": "marian",
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 102,
    "activation_function": "relu",
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": False,
    "tie_word_embeddings": False,
    "vocab_size": 59,
    "decoder_vocab_size": 59,
    "max_length": 102,
}


class Plain(pickle.Unpickler):
    """Reads texts, numbers, lists and dicts alone."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def renamed(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    for theirs, marian in RENAMED.items():
        name = name.replace(theirs, marian)
    return "model." + re.sub(r"attn\.([qkv])\b", r"attn.\1_proj", name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TrainedModel:
    torch, files = pytest.importorskip("torch"), pytest.importorskip("safetensors.numpy")
    try:
        wheel = importlib.metadata.distribution("annalog")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("annalog is not installed")
    data = "annalog/ckpt_and_vocab"
    with open(wheel.locate_file(f"{data}/stereo_experiment_vocab_ttf.pkl"), "rb") as file:
        numbers = Plain(file).load()["stoi"]
    state = torch.load(wheel.locate_file(f"{data}/Lev_extended.pt"), "cpu", weights_only=True)
    tensors = {renamed(name): np.ascontiguousarray(x.numpy()) for name, x in state.items()}
    folder = tmp_path_factory.mktemp("annalog")
    (folder / "theirs").mkdir()
    files.save_file(tensors, folder / "theirs" / "model.safetensors", {"format": "pt"})
    pad, start, end = (numbers[name] for name in ("<pad>", "<sos>", "<eos>"))
    config = {"pad_token_id": pad, "bos_token_id": start, "eos_token_id": end}
    config |= {"decoder_start_token_id": start, "bad_words_ids": [[pad], [start]]}
    for name, value in (("config", CONFIG | config), ("vocab", numbers)):
        (folder / "theirs" / f"{name}.json").write_text(json.dumps(value))
    run = import_run(folder / "theirs", folder / "run", source_prefix="<sos>")
    return run.trained_model()


def outputs(model, *molecules, **options):
    """The outputs for each molecule, and their scores."""
    found = model.generate([" ".join(SYMBOL.findall(each)) for each in molecules], **options)
    return [[(each.text.replace(" ", ""), each.score) for each in own] for own in found]


def test_molecules_decode_to_themselves(model):
    found = outputs(model, NICOTINE, ASPIRIN)
    assert [text for ((text, _),) in found] == [NICOTINE, ASPIRIN]


def test_beam_search_finds_the_known_neighbours_of_nicotine(model):
    (found,) = outputs(model, NICOTINE, beam_size=4, n_best=3, length_penalty=0.0)
    mirrored, phenyl = NICOTINE.replace("@", "@@"), NICOTINE.replace("cccnc1", "ccccc1")
    assert [text for text, _ in found] == [NICOTINE, mirrored, phenyl]
    np.testing.assert_allclose([score for _, score in found], [-2.502, -3.353, -3.656], atol=5e-4)
