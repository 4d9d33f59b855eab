import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import program, refused
from tests.test_average import make_run
from transformer import load
from transformer.data.packing import RaggedArray

pytest.importorskip("flatbuffers")

TEXTS = ["abc", "b", "cabba"]
# Loads the program without this library and Flax, and decodes the given batches.
ELSEWHERE = """
import sys
import numpy as np
import load
out = {}
with np.load("batches.npz") as batches:
    for name, batch in batches.items():
        tokens, scores = load.decode(batch)
        out |= {f"{name} tokens": tokens, f"{name} scores": scores}
assert not {"flax", "transformer"} & {*sys.modules}
np.savez("outputs.npz", **out)
"""


def close(found, expected):
    """Up to 1e-5 of the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max(initial=0))


def padded(model, texts, width=None):
    rows = [model.tokenizers.source.encode(text) for text in texts]
    tokens = RaggedArray.from_lists(rows)
    return tokens.to_padded(width or int(tokens.lengths().max())).astype(np.int32)


def exported(workdir, out, *words, to="stablehlo", longest=("--longest=24",)):
    words = f"--workdir={workdir.path}", f"--to={to}", f"--out={out}", *longest, *words
    with program("scripts/export.py", *words) as export:
        export.main()


def test_what_a_program_cannot_do_is_refused_in_a_line(tmp_path, rng):
    learned = {"model.position_encoding": "learned", "model.max_length": 20}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), decode_margin=2, **learned)
    for word, message in (
        ("--temperature=1", "cannot do temperature=1.0; set temperature=0.0"),
        ("--distinct", "cannot do distinct=True"),
        ("--quantization=int8", "--quantization does nothing for --to=stablehlo"),
        ("--longest=21", "sources of 21 tokens exceed the model's 20"),
        ("--prefix=abc", "has 3 tokens, and outputs have at most 3"),
    ):
        refused(message, exported, workdir, tmp_path / "out", word, longest=("--longest=20",))


def test_an_export_that_fails_leaves_no_folder(tmp_path, rng, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # needed after the weights are written
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), **{"model.norm_epsilon": 1e-5})
    remedy = r"pip install -e '.\[interop\]'"
    refused(remedy, exported, workdir, tmp_path / "out", to="huggingface", longest=())
    assert not (tmp_path / "out").exists()


def test_shapes_are_checked(tmp_path, rng):
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,))
    for text in ("8", "0x4", "8x-1", "ax3"):
        words = f"--shapes={text}"
        refused(
            "is not rows x length", exported, workdir, tmp_path / "o", words, to="onnx", longest=()
        )


@pytest.mark.parametrize(
    ("changes", "decoding"),
    [
        ({}, {}),
        ({"position_encoding": "relative", "attention_backend": "auto"}, {"beam_size": 3}),
        ({"architecture": "recurrent"}, {"beam_size": 2, "prefix": "ba", "decode_margin": 9}),
    ],
)
def test_a_program_decodes_any_batch_without_this_library(changes, decoding, tmp_path, rng):
    knobs = {f"model.{name}": value for name, value in changes.items()}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), **knobs)
    model, out = load(str(workdir.path)), tmp_path / "out"
    exported(workdir, out, *(f"--{name}={value}" for name, value in decoding.items()))
    np.savez(out / "batches", three=padded(model, TEXTS), one=padded(model, TEXTS[:1], 9))
    environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=out, env=environment, check=True)
    best = decoding.get("beam_size", 1)
    with np.load(out / "outputs.npz") as arrays:
        found = dict(arrays)
    for name, texts in (("three", TEXTS), ("one", TEXTS[:1])):
        for row, outputs in enumerate(model.generate(texts, n_best=best, **decoding)):
            for each, tokens, score in zip(
                outputs, found[f"{name} tokens"][row], found[f"{name} scores"][row], strict=True
            ):
                assert tokens[: len(each.ids())].tolist() == each.ids()
                assert not tokens[len(each.ids()) :].any()
                np.testing.assert_allclose(score, each.score, rtol=1e-5)


RARE = [
    {"norm": "rms", "position_encoding": "rotary", "feed_forward": "swiglu"},
    {"position_encoding": "relative", "norm_placement": "post", "scan_layers": True},
]
CONFIGS = [{"num_layers": 2}, *(pytest.param(each, marks=pytest.mark.slow) for each in RARE)]


@pytest.mark.oracle
@pytest.mark.parametrize("changes", CONFIGS)
def test_onnx_runtime_gives_the_same_outputs_and_logits(changes, tmp_path, rng):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    knobs = {f"model.{name}": value for name, value in changes.items()}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), decode_margin=4, **knobs)
    model, out = load(str(workdir.path)), tmp_path / "out"
    exported(workdir, out, "--shapes=3x6", to="onnx", longest=())

    def run(name, inputs):
        session = runtime.InferenceSession(str(out / "3x6" / f"{name}.onnx"))
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))

    source = padded(model, TEXTS, 6)
    found = run("greedy", {"source": source})
    for row, (each,) in enumerate(model.generate(TEXTS)):
        assert found["tokens"][row, 0, : len(each.ids())].tolist() == each.ids()
        np.testing.assert_allclose(found["scores"][row, 0], each.score, rtol=1e-5)
    module, cache = model.module, run("encoder", {"source": source})
    source = jnp.asarray(source)
    segments = (source != 0).astype(jnp.int32)
    ours = module.start_cache(module.encode(source, segments), segments, 10)
    jax.tree.map(close, [*cache.values()], jax.tree.leaves(ours))
    for last in (1, 5, 7):
        token = np.full((3, 1), last, np.int32)
        logits, ours = module.decode_step(jnp.asarray(token), ours)
        after = run("decoder_step", {"token": token} | cache)
        close(after.pop("logits"), logits[:, 0])
        cache |= {name.removeprefix("next_"): value for name, value in after.items()}
