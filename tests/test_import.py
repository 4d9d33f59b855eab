"""Run folders of imported weights; no test here needs PyTorch."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import transformer
from tests.test_from_ctranslate2 import small as ctranslate2_model
from tests.test_from_ctranslate2 import variables_of, write
from tests.test_to_huggingface import T5, logits_of, random_model
from transformer.config import RunConfig
from transformer.errors import UserError
from transformer.interop.huggingface_export import export
from transformer.interop.importing import import_run
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model
from transformer.run import Run
from transformer.workdir import Workdir

files = pytest.importorskip("safetensors.numpy")

BART = {"attention_bias": True, "feed_forward": "gelu_erf"}
LEARNED = {"position_encoding": "learned", "position_offset": 2, "embedding_norm": True}
HALVES = {"sinusoid_layout": "halves"}
GATED = {"feed_forward": "geglu", "scale_gated": False}
FAMILIES = {
    "marian": BART | HALVES | {"norm_placement": "post", "logits_bias": True},
    "pegasus": BART | HALVES | {"decoder_layers": 1},
    "m2m_100": BART | HALVES | {"sinusoid_rates": "tensor2tensor", "position_offset": 1},
    "bart": BART | LEARNED | {"norm_placement": "post", "embedding_scale": 1.0},
    "mbart": BART | LEARNED,
    "t5": T5 | {"logits_scale": 8**-0.5},
    "umt5": T5 | GATED | {"relative_per_layer": True, "tie_embeddings": "inputs"},
}


def write_folder(folder, knobs, **sections):
    """A Hugging Face folder whose tokens are pieces, and the model that it holds."""
    model = random_model(knobs, **sections)
    export(model, folder)
    for file in folder.glob("token*"):
        file.unlink()
    pieces = {piece: number for number, piece in enumerate(model.tokenizers.source.pieces)}
    pieces |= {f"<{n}>": n for n in range(len(pieces), model.model.vocab_size)}
    (folder / "vocab.json").write_text(json.dumps(pieces))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A PEGASUS folder, and the run folder made of it."""
    path = tmp_path_factory.mktemp("import")
    model = write_folder(path / "theirs", FAMILIES["pegasus"])
    import_run(path / "theirs", path / "run")
    return path, model


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_configs_survive_the_round_trip_bit_for_bit(family, tmp_path):
    model = write_folder(
        tmp_path / "theirs", FAMILIES[family], decoding={"beam_size": 2, "penalty": "length"}
    )
    record = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert record["model_type"] == family
    imported = import_run(tmp_path / "theirs", tmp_path / "run").trained_model()
    np.testing.assert_array_equal(logits_of(imported), logits_of(model))
    export(imported, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "vocab.json"):
        before, after = (tmp_path / side / name for side in ("theirs", "out"))
        assert json.loads(before.read_text()) == json.loads(after.read_text())
    before, after = (files.load_file(tmp_path / s / "model.safetensors") for s in ("theirs", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])


def test_a_run_folder_predicts_and_takes_no_further_training(folder):
    path, _ = folder
    model = transformer.load(str(path / "run"))
    config = model.config
    assert (config.decoding.penalty, config.decoding.unfinished) == ("length", "equal")
    assert len(model.generate(["a b c", "d"], beam_size=2, n_best=2)[0]) == 2
    with pytest.raises(UserError, match="holds an imported model"):
        Workdir(str(path / "run")).claim(transformer.config_of(path / "run"), allow_changes=True)
    with pytest.raises(UserError, match="name a file of pairs by --data"):
        Run.saved(path / "run").evaluation_corpus()


def test_a_frozen_encoder_survives_fine_tuning(folder, tmp_path, data_dir):
    path, _ = folder
    config = transformer.config_of(path / "run")
    config.init_from, config.freeze, config.steps = str(path / "run"), ("encoder/*",), 2
    config.update({"batch_size": 8, "eval_every": 2, "save_every": 2, "log_every": 2})
    config.data.dataset, sides = "files", {"train": "a b c", "validation": "d e", "test": "f g"}
    for side, text in sides.items():
        file = tmp_path / f"{side}.tsv"
        file.write_text("".join(f"{text} {x}\t{x} {text}\n" for x in "abcdefgh"))
        config.data[side] = str(file)
    config.optimizer.update({"name": "adam", "warmup_steps": 0, "learning_rate": 1e-3})
    run = Run(RunConfig.from_config_dict(config), tmp_path / "tuned", data_dir=str(data_dir))
    run.train()
    export(run.trained_model(), tmp_path / "out")
    before, after = (
        files.load_file(side / "model.safetensors") for side in (path / "theirs", tmp_path / "out")
    )
    same = {name for name, tensor in before.items() if np.array_equal(tensor, after[name])}
    assert {name for name in before if name.startswith("model.encoder.layers")} <= same
    assert not any(name.startswith("model.decoder.layers") for name in same)


def test_a_ctranslate2_folder_makes_a_run(tmp_path):
    model, weights = ctranslate2_model()
    write(tmp_path / "theirs", *variables_of(model, weights))
    imported = import_run(tmp_path / "theirs", tmp_path / "run").trained_model()
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["imported"]["format"] == "CTranslate2"
    order = imported.tokenizers.source.theirs
    ours = np.argsort(order).astype(np.int32)
    source, target = np.random.default_rng(0).integers(3, 9, (2, 3, 6)).astype(np.int32)
    found = imported.module(jnp.asarray(ours[source]), jnp.asarray(ours[target]))
    variables = {name: jnp.asarray(value) for name, value in weights.items()}
    expected = model.bind(variables)(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(found, np.asarray(expected)[..., order], atol=1e-5)


IMPORT = r"""
import re, sys
from pathlib import Path
from transformer.interop import importing
importing.import_run(Path(sys.argv[1]), Path(sys.argv[2]))
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # KiB
"""


@pytest.mark.slow
def test_the_memory_of_an_import_is_little_more_than_the_model(tmp_path):
    peaks, sizes = [], []
    for name, width, tokens in (("tiny", 16, 300), ("large", 512, 58_101)):  # as OPUS-MT's
        config = ModelConfig(num_layers=6, d_model=width, d_ff=4 * width, attention_bias=True)
        model, rng = Model(config, tokens), np.random.default_rng(0)
        shapes = {key: leaf.shape for key, leaf in model.shapes.items()}
        weights = {key: rng.standard_normal(x, dtype=np.float32) for key, x in shapes.items()}
        pieces = ["<pad>", "<s>", "</s>", *(f"p{n}" for n in range(tokens - 3))]
        write(tmp_path / name, *variables_of(model, weights), pieces=pieces)
        command = [sys.executable, "-c", IMPORT, tmp_path / name, tmp_path / f"{name}_run"]
        found = subprocess.run(command, check=True, capture_output=True).stdout
        peaks.append(1024 * int(found))
        sizes.append(sum(weight.nbytes for weight in weights.values()))
    assert peaks[1] - peaks[0] < 1.3 * (sizes[1] - sizes[0])


def broken(source, target, **changes):
    """A copy of a folder with other values in config.json, or other tensors."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    record = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(record | changes))
    return target


@pytest.mark.parametrize(("bos", "own"), [(3, 3), (7, 0)])
def test_tokens_are_renumbered(bos, own, folder, tmp_path):
    path, model = folder
    ids = {"pad_token_id": 5, "bos_token_id": bos, "eos_token_id": 7, "decoder_start_token_id": 5}
    theirs = broken(path / "theirs", tmp_path / "theirs", **ids)
    (theirs / "generation_config.json").unlink()
    imported = import_run(theirs, tmp_path / "run").trained_model()
    order = imported.tokenizers.source.theirs
    assert order[:3].tolist() == [5, own, 7]  # that of EOS is no BOS
    assert imported.tokenizers.target.start == 0
    source, target = np.random.default_rng(0).integers(8, 13, (2, 3, 6)).astype(np.int32)
    ours = np.argsort(order).astype(np.int32)
    found = imported.module(jnp.asarray(ours[source]), jnp.asarray(ours[target]))
    expected = model.module(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_array_equal(found, np.asarray(expected)[..., order])


def test_errors_name_the_thing(folder, tmp_path):
    theirs = folder[0] / "theirs"

    def check(source, message, **options):
        with pytest.raises(UserError, match=message) as caught:
            import_run(source, tmp_path / "run", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "config.json").exists()

    check(tmp_path / "missing", "no such folder")
    check(tmp_path, r"none of the formats.*no config\.json")
    with pytest.raises(UserError, match="already exists"):
        import_run(theirs, tmp_path)
    check(broken(theirs, tmp_path / "a", model_type="fsmt"), "fsmt is not supported; these are: m")
    heads = broken(theirs, tmp_path / "b", decoder_attention_heads=4)
    check(heads, "decoder_attention_heads=4, and 2 in the other stack: model.num_heads")
    check(
        broken(theirs, tmp_path / "c", encoder_ffn_dim=32, decoder_ffn_dim=32),
        "fc1.weight of shape .24, 8. needs 32 rows",
    )
    check(broken(theirs, tmp_path / "d", decoder_layers=2), "lack model.decoder.layers.1")
    check(broken(theirs, tmp_path / "e", encoder_layers=1), "no parameter holds model.encoder")
    check(broken(theirs, tmp_path / "f", activation_function="mish"), "activation_function=mish")
    none = broken(theirs, tmp_path / "g")
    (none / "vocab.json").unlink()
    check(none, "has no tokenizer")
    short = broken(theirs, tmp_path / "h")
    path = short / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    check(short, "cut short")
    check(theirs, "cannot be read: name", tokenizer=tmp_path / "missing.model")
    check(theirs, "source_prefix='>>deu<<'", source_prefix=">>deu<<")
