"""From texts to texts, by a model whose parameters are drawn instead of trained."""

import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_average
from tests.helpers import TOKENIZER, logits_of, program, random_params, refused, strings
from tests.test_programs import ROOT
from transformer import cli, load
from transformer.data.batches import Dataset, make_batch
from transformer.data.corpus import Tokenizers
from transformer.data.text import cleaned
from transformer.data.tokenizer import EOS, ByteTokenizer, SymbolTokenizer, Tokenizer
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import Generator, Output, bucket
from transformer.modules.model import Model
from transformer.parallel.mesh import one_device_mesh
from transformer.training.step import TrainState
from transformer.workdir import Workdir

REACH, MARGIN = 20, 4  # positions
BEAM = DecodingConfig(beam_size=5)
DRAWN = DecodingConfig(temperature=1.0, seed=5)
# Of several lengths, so of several programs; two are the same; 18 tokens are more than 16.
TEXTS = ["abcde", "", "q", "zyxwvutsrqponmlkj", "abcde", "fedcba"]
GIVEN = "\n".join(TEXTS).encode()


def make_run(folder: Any, replicas: int = 1, tokenizer: Tokenizer = TOKENIZER) -> Workdir:
    """The folder of a run that was never trained, of so many replicas."""
    knobs: dict[str, Any] = {"replicas": replicas, "decode_margin": MARGIN, "model.num_layers": 1}
    knobs |= {"model.position_encoding": "learned", "model.max_length": REACH}
    knobs |= {"model.tie_embeddings": False}
    knobs["data.tokenizer"] = "characters" if tokenizer is TOKENIZER else "bytes"

    def state(model: Model, like: TrainState, *_: Any) -> TrainState:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        each = [params_of(model, seed, tokenizer) for seed in range(replicas)]
        params = {name: np.stack([one[name] for one in each]) for name in like.params}
        params = {name: x.reshape(like.params[name].shape) for name, x in params.items()}
        where = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.device_put(zeros._replace(params=params), where)

    return test_average.make_run(folder, None, (0,), tokenizer, state, **knobs)[0]


def params_of(model: Model, seed: int, tokenizer: Tokenizer = TOKENIZER) -> dict[str, Any]:
    """Random ones, by which outputs vary, end, and hold no special tokens."""
    params = random_params(model, seed)
    names = ("decoder/final_norm/scale", "decoder/final_norm/bias", "output_embedding/embedding")
    changed = {name: np.array(params[name]) for name in names}
    gain, bias, table = changed.values()
    gain[0], bias[0] = 0.0, 1.0  # one feature is 1: what reads it is a bias
    table[:, 0] = -50.0
    table[EOS : len(tokenizer.pieces), 0] = 0.0
    table[EOS, 0] = 1.0
    return params | jax.tree.map(jnp.asarray, changed)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def generator(run) -> Generator:
    return load(str(run.path), mesh=one_device_mesh())


@pytest.fixture(scope="module")
def found(generator) -> dict[str, list[list[Output]]]:
    """Outputs of `TEXTS`, all that come."""
    asked = {"greedy": (DecodingConfig(), 1), "drawn": (DRAWN, 3), "beam": (BEAM, 5)}
    return {name: generator.generate(TEXTS, x, n_best=n) for name, (x, n) in asked.items()}


def check_alike(one: list[list[Output]], other: list[list[Output]]) -> None:
    """The same texts, with scores that are so to rounding."""
    for own, wanted in zip(one, other, strict=True):
        assert [each.text for each in own] == [each.text for each in wanted]
        scores = [[each.score for each in outputs] for outputs in (own, wanted)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


def room(text: str) -> int:  # in tokens of its output
    return min(len(text) + 1 + MARGIN, REACH)


def log_p(generator: Generator, text: str, output: Output) -> float:
    """Of an output, by one call of the model on all of it, the sum in float64."""
    target = np.zeros((1, REACH), np.int32)
    tokens = [*output.tokens, EOS][: room(text)]  # one that was cut off has no end
    target[0, : len(tokens)] = tokens
    source = strings((text, ""), source_length=REACH).source
    batch = make_batch(source, jnp.asarray(target))
    logits = logits_of(generator.model, generator.variables, batch)
    each = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    return float(each[range(len(tokens)), tokens].sum())


def test_outputs_depend_on_neither_batches_nor_devices(run, generator, found):
    """Though those of like length are decoded together, in whatever batches and on all devices."""
    for name in ("greedy", "beam"):
        check_alike([found[name][0]], [found[name][4]])  # of the same text
    for i in (2, 3):
        check_alike(generator.generate([TEXTS[i]]), [found["greedy"][i]])
    assert len({output.text for (output,) in found["greedy"]}) > 2
    check_alike(generator.generate(TEXTS, DRAWN, n_best=3, batch_size=4), found["drawn"])
    check_alike(generator.generate(TEXTS, BEAM, n_best=5, batch_size=2), found["beam"])
    check_alike(load(str(run.path)).generate(TEXTS[:3], DRAWN, n_best=3), found["drawn"][:3])
    # What is drawn depends on a text's number and the seed.
    check_alike(generator.generate(TEXTS[2:], DRAWN, n_best=3, offset=2), found["drawn"][2:])
    first, again = found["drawn"][0], found["drawn"][4]  # of the same text
    other = generator.generate(TEXTS[:1], DecodingConfig(temperature=1.0, seed=6), n_best=3)[0]
    assert len({tuple(output.text for output in own) for own in (first, again, other)}) == 3
    # Lengths have some room, and few widths.
    widths = bucket(lengths := np.arange(1, 1000))
    assert ((lengths <= widths) & (widths < np.maximum(2 * lengths, 9))).all()
    assert set(widths[:128]) == {8, 16, 24, 32, 48, 64, 96, 128}


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_a_score_is_the_sum_of_log_probabilities(name, generator, found):
    pairs = [(x, own) for x, own in zip(TEXTS, found[name], strict=True) if x]
    for text, outputs in pairs:
        for output in outputs:
            assert output.score == pytest.approx(log_p(generator, text, output), rel=1e-5)
            assert output.truncated == (len(output.tokens) == room(text))
    assert {len(own[-1].tokens) == room(text) for text, own in pairs} == {True, False}  # cut off


def test_samples_are_sorted_and_beam_search_ranks_truncated_outputs_last(generator, found):
    """One that found no end stands behind those that did, even where it is the likelier."""
    for outputs in found["drawn"]:
        assert outputs == sorted(outputs, key=lambda output: -output.score)
    unsorted = 0
    for text, outputs in zip(TEXTS, found["beam"], strict=True):
        keys = [(len(output.tokens) < room(text), output.score) for output in outputs]
        assert keys == sorted(keys, reverse=True)
        unsorted += outputs != sorted(outputs, key=lambda output: -output.score)
    assert unsorted
    check_alike(generator.generate(TEXTS, BEAM), [own[:1] for own in found["beam"]])
    # Of an empty text come empty ones.
    assert found["drawn"][1] == [Output("", [], 0.0)] * 3
    assert generator.generate([]) == []
    assert generator.generate(["", ""]) == [[Output("", [], 0.0)]] * 2


@pytest.mark.parametrize(
    ("message", "text", "options"),
    [
        ("'C' in 'abCd' is not one of the tokenizer's symbols", "abCd", {}),
        (r"texts\[1\]: 21 tokens, .* the model's 20 positions; shorten or", "a" * REACH, {}),
        (r"texts\[1\]: it has a lone surrogate", "\ud800", {}),
        ("n_best=2 exceeds beam_size=1", "a", {"n_best": 2}),
        ("n_best=6 exceeds beam_size=5", "a", {"n_best": 6, "decoding": BEAM}),
        ("n_best=0: it must be at least 1", "a", {"n_best": 0}),
        ("batch_size=0: it must be at least 1", "a", {"batch_size": 0}),
    ],
)
def test_refused_texts_and_wrong_arguments_are_user_errors(message, text, options, generator):
    refused(message, generator.generate, ["a", text], **options)


def test_a_string_in_place_of_a_list_and_contradictory_settings_are_user_errors(generator):
    refused(r"texts is a single string; .*generate\(\[text\]\)", generator.generate, "hello")
    for wrong in (b"hello", None, 3):
        with pytest.raises(TypeError, match=r"^a text must be a str, not "):
            cleaned(wrong)
    for message, settings in (
        ("sampling excludes beam search", {"temperature": 1.0, "beam_size": 2}),
        ("only sampling uses top_k", {"top_k": 3}),
        ("only sampling uses top_k", {"top_p": 0.5}),
        ("temperature=1e-40: it must be at least 1e-06", {"temperature": 1e-40}),
        ("temperature=nan", {"temperature": float("nan")}),
        ("min_length=5 leaves no room for EOS in max_length=5", {"min_length": 5, "max_length": 5}),
        ("length_ratio=0.0: it must be at least 0.01", {"length_ratio": 0.0}),
        ("repetition_penalty=0.0: it must be at least 0.01", {"repetition_penalty": 0.0}),
        ("max_length=0: it must be at least 1", {"max_length": 0}),
    ):
        refused(message, DecodingConfig, **settings)


def test_alignments_are_the_cross_attention_of_real_tokens(generator, found):
    text, (output,) = TEXTS[0], found["greedy"][0]
    whole = Output("a" * REACH, [3] * REACH, 0.0)  # has no room for an end
    first, second = generator.align([text, "q"], [output, whole])
    assert first.source == [*text, TOKENIZER.symbol(EOS)]
    assert first.output == [*output.text, TOKENIZER.symbol(EOS)]
    assert second.output == [TOKENIZER.symbol(3)] * REACH
    assert first.weights.shape == (1, len(output.tokens) + 1, len(text) + 1)
    assert second.weights.shape == (1, REACH, 2)
    for each in (first, second):
        np.testing.assert_allclose(each.weights.sum(-1), 1.0, rtol=1e-5)
    batch = strings((text, output.text))
    maps = jax.jit(partial(evaluation.attention_maps, generator.model))
    (cross,) = maps(generator.variables, Dataset(batch.source, batch.target_out, 1))["cross"]
    np.testing.assert_allclose(first.weights[0], cross[0].mean(0), rtol=1e-4, atol=1e-6)


def test_a_replica_of_a_population_has_its_own_parameters(tmp_path):
    folder = make_run(tmp_path / "population", replicas=2).path
    one = load(str(folder), replica=1, mesh=one_device_mesh())
    jax.tree.map(np.testing.assert_array_equal, dict(one.variables), params_of(one.model, 1))
    refused("replica=2: it must be at most 1", load, str(folder), replica=2, mesh=one_device_mesh())
    refused("holds no run", load, str(tmp_path))


@pytest.fixture
def predict(run, generator, monkeypatch):
    """Calls `main` of scripts/predict.py; returns what it prints as output and as errors."""

    def of(given: bytes, *words: str) -> tuple[str, str]:
        out, errors = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(cli, "set_up_jax", lambda cfg: None)  # JAX is at work already
        with program("scripts/predict.py", f"--workdir={run.path}", *words) as script:
            monkeypatch.setattr(script.transformer, "load", lambda *_, **__: generator)
            cli.explained(script.main)
        out.flush()
        return cast(io.BytesIO, out.buffer).getvalue().decode(), errors.getvalue()

    return of


def test_predict_writes_a_line_for_each_line(predict, generator, found, tmp_path):
    """Whatever their ends are, and those that are no text among them."""
    looked = tmp_path / "looked.jsonl"
    given = GIVEN.replace(b"q\n", b"q\r\n")
    out, errors = predict(given, f"--alignments={looked}", "--window=4")
    assert out == "".join(f"{own[0].text}\n" for own in found["greedy"])
    cut = sum(own[0].truncated for own in found["greedy"])
    assert errors.startswith(f"outputs truncated (--decode_margin): {cut} (lines")
    records = [json.loads(line) for line in looked.read_text().splitlines()]
    kept = [k for k, text in enumerate(TEXTS) if text]
    wanted = generator.align([TEXTS[k] for k in kept], [found["greedy"][k][0] for k in kept])
    for record, one, k in zip(records, wanted, kept, strict=True):
        assert [record[x] for x in ("line", "source", "output")] == [k + 1, one.source, one.output]
        np.testing.assert_allclose(record["weights"], one.weights, atol=1e-3)
    # Scores and draws are numbered as `generate` does.
    flags = ("--temperature=1", "--seed=5", "--n_best=3", "--scores", "--window=2")
    rows = [line.split("\t") for line in predict(GIVEN, *flags)[0].splitlines()]
    drawn = [(n, output) for n, own in enumerate(found["drawn"], 1) for output in own]
    for (number, score, text), (n, output) in zip(rows, drawn, strict=True):
        assert (int(number), text) == (n, output.text)
        assert float(score) == pytest.approx(output.score, abs=2e-4)


def test_predict_limits_outputs_by_decode_margin_and_counts_the_truncated(predict, found):
    out, errors = predict(GIVEN, "--decode_margin=0")
    tokens = [
        own[0].tokens[: len(x) + 1 if x else 0]
        for x, own in zip(TEXTS, found["greedy"], strict=True)
    ]
    assert out.splitlines() == [TOKENIZER.decode(each) for each in tokens]
    cut = [n for n, x in enumerate(TEXTS, 1) if x and len(tokens[n - 1]) > len(x)]
    assert 0 < len(cut) < 5
    lines = ", ".join(map(str, cut[:3])) + ", …" * (len(cut) > 3)
    assert errors == f"outputs truncated (--decode_margin): {len(cut)} (lines {lines})\n"


def test_a_refused_line_does_not_stop_the_others(predict, generator, found, monkeypatch):
    bad = [b"\xef\xbb\xbf abcde\r", b"HELLO", b"a" * REACH, b"\xff", b"q "]
    outputs = [found["greedy"][0][0].text, "", "", "", found["greedy"][2][0].text]
    reasons = ["2: 'H' in ", "3: 21 tokens, EOS included, exceed the model's 20", "4: '�' in '�'"]
    for flags in ((), ("--window=1", "--alignments=/dev/null")):
        out, errors = predict(b"\n".join(bad), *flags)
        assert out.split("\n") == [*outputs, ""]
        *left_out, counted, _ = errors.splitlines()  # and how many outputs were cut
        assert counted == "lines that are not UTF-8: 1 (line 4)"
        for line, reason in zip(left_out, reasons, strict=True):
            assert re.fullmatch(f"line {reason}.*; its output is empty", line)
    for place, cause in ((1, "'H' in"), (2, "21 tokens"), (3, "not UTF-8")):
        with pytest.raises(SystemExit, match="2"):
            predict(b"\n".join([b"q", bad[place]]), "--strict")
        assert sys.stderr.getvalue().startswith(f"error: line 2: {cause}")
    ends = ["\ufeff abcde\r\n", "  q\t\n", "\n"]  # as of the lines of a file
    assert generator.generate(ends) == generator.generate(["abcde", "q", ""])
    # Nor does one for which there is not enough memory.
    whole = generator._decode

    def limited(sources: np.ndarray, *rest: Any) -> Any:
        if len(sources) > 1 or sources.shape[1] > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return whole(sources, *rest)

    monkeypatch.setattr(generator, "_decode", limited)
    out, errors = predict(GIVEN, "--alignments=/dev/null")
    assert out.split("\n")[:-1] == [own[0].text * (k != 3) for k, own in enumerate(found["greedy"])]
    assert errors.startswith("line 4: 18 tokens need too much memory; split the text; its output")
    refused(r"texts\[3\]: 18 tokens", generator.generate, TEXTS)


def test_outputs_shift_no_line_or_column_and_unknowns_are_counted(predict, generator, monkeypatch):
    known = SymbolTokenizer("abq", unknown=True)
    breaks = SymbolTokenizer(["\t", "\n", "\r", "\u2028", *"abcdefghijklmnopqrstuv"])
    monkeypatch.setattr(generator, "tokenizers", Tokenizers(known, breaks))
    given, flags = b"abqab\nzq\nxyz\nq", ("--temperature=1", "--n_best=9", "--seed=5")
    with pytest.warns(UserWarning, match=r"^4 unknown symbols \(in texts 1, 2\)$"):
        outputs = generator.generate(given.decode().split(), DRAWN, n_best=9)
    rows = [(n, output.text) for n, own in enumerate(outputs, 1) for output in own]
    assert all(any(symbol in text for _, text in rows) for symbol in breaks.pieces[3:7])
    plain, errors = predict(given, *flags)
    flat = [" ".join(text.splitlines()) for _, text in rows]
    assert plain.splitlines() == flat
    assert errors.startswith("unknown symbols: 4 (lines 2, 3)\n")
    lines = predict(given, *flags, "--scores")[0].splitlines()
    for line, (n, _), text in zip(lines, rows, flat, strict=True):
        assert line.split("\t")[::2] == [str(n), text.replace("\t", " ")]
    records = [json.loads(line) for line in predict(given, *flags, "--json")[0].split("\n")[:-1]]
    assert [(record["line"], record["text"]) for record in records] == rows


@pytest.mark.slow
def test_predict_counts_invalid_utf_8_and_ends_quietly_with_its_reader(tmp_path):
    """And writes UTF-8 whatever the terminal is said to take."""
    run = make_run(tmp_path / "bytes", tokenizer=ByteTokenizer())
    for given, more, lines, errors in (
        ("printf 'a\\n\\377\\nb\\376'", "cat", 3, r"lines that are not UTF-8: 2 \(lines 2, 3\)\n"),
        ("yes a | head -200", "head -1", 1, ""),
    ):
        command = f"{sys.executable} scripts/predict.py --workdir={run.path} --window=1"
        words = ["bash", "-o", "pipefail", "-c", f"{given} | {command} | {more}"]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(words, capture_output=True, cwd=ROOT, env=env, timeout=300)
        assert done.stdout.decode().count("\n") == lines
        assert re.fullmatch(errors + r"(outputs truncated .*\n)?", done.stderr.decode())
