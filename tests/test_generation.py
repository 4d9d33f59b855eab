"""From texts to texts, by a model whose parameters are drawn instead of trained."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_average
from tests.helpers import TOKENIZER, logits_of, program, random_params, strings
from tests.test_programs import ROOT
from transformer import cli, evaluation, sharding
from transformer.data.batches import Dataset, make_batch
from transformer.data.tokenizer import EOS, PAD, ByteTokenizer, Tokenizer
from transformer.decoding import beam_search, greedy
from transformer.errors import UserError
from transformer.generation import Decoding, Generator, Output, roomy
from transformer.model import Model
from transformer.training import TrainState
from transformer.workdir import Workdir

REACH = 20  # positions
MARGIN = 4
BEAM = Decoding(beam_size=5)
DRAWN = Decoding(temperature=1.0, seed=5)
# Of several lengths, so of several programs; two are the same; 18 tokens are more than 16.
TEXTS = ["abcde", "", "q", "zyxwvutsrqponmlkj", "abcde", "fedcba"]


def make_run(folder: Any, replicas: int = 1, tokenizer: Tokenizer = TOKENIZER) -> Workdir:
    """The folder of a run that was never trained, of so many replicas."""
    knobs: dict[str, Any] = {"layers": 1, "position": "learned", "max_length": REACH}
    knobs = {f"model.{name}": value for name, value in knobs.items()}
    knobs |= {"model.tie_embeddings": False, "replicas": replicas, "decode_margin": MARGIN}
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
    gain, bias, table = (
        np.array(params[name])
        for name in ("decoder/final_norm/gain", "decoder/final_norm/bias", "output_embedding/table")
    )
    gain[0], bias[0] = 0.0, 1.0  # one feature is 1: what reads it is a bias
    table[:, 0] = -50.0
    table[EOS : len(tokenizer.pieces), 0] = 0.0
    table[EOS, 0] = 1.0
    return params | {
        "decoder/final_norm/gain": jnp.asarray(gain),
        "decoder/final_norm/bias": jnp.asarray(bias),
        "output_embedding/table": jnp.asarray(table),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def generator(run) -> Generator:
    return Generator(run.path, mesh=sharding.one_device())


@pytest.fixture(scope="module")
def found(generator) -> dict[str, list[list[Output]]]:
    """Outputs of `TEXTS`, all that come."""
    return {
        "greedy": generator.generate(TEXTS),
        "drawn": generator.generate(TEXTS, DRAWN, n_best=3),
        "beam": generator.generate(TEXTS, BEAM, n_best=5),
    }


def rows_of(outputs: Sequence[Sequence[Output]]) -> list[tuple[list[str], list[float]]]:
    return [([each.text for each in own], [each.score for each in own]) for own in outputs]


def check_alike(one: Sequence[Sequence[Output]], other: Sequence[Sequence[Output]]) -> None:
    """The same texts, with scores that are so to rounding."""
    for (texts, scores), (others, wanted) in zip(rows_of(one), rows_of(other), strict=True):
        assert texts == others
        np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def room(text: str) -> int:
    """Tokens that an output of `text` may have."""
    return min(len(text) + 1 + MARGIN, REACH)


def log_p(generator: Generator, text: str, output: Output) -> float:
    """Of an output, by one call of the model on all of it, the sum in float64."""
    target = np.zeros((1, REACH), np.int32)
    tokens = [*output.tokens, EOS][: room(text)]  # one that was cut off has no end
    target[0, : len(tokens)] = tokens
    source = strings((text, ""), source_length=REACH).source
    logits = logits_of(generator.model, generator.params, make_batch(source, jnp.asarray(target)))
    each = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    return float(each[range(len(tokens)), tokens].sum())


def test_outputs_are_in_the_order_of_their_texts(generator, found):
    """Though those of like length are decoded together, the longest first."""
    for name in ("greedy", "beam"):
        check_alike([found[name][0]], [found[name][4]])  # of the same text
    for i in (2, 3):
        check_alike(generator.generate([TEXTS[i]]), [found["greedy"][i]])
    assert len({output.text for (output,) in found["greedy"]}) > 2


def test_the_size_of_a_batch_changes_nothing(generator, found):
    check_alike(generator.generate(TEXTS, DRAWN, n_best=3, batch_size=4), found["drawn"])
    check_alike(generator.generate(TEXTS, BEAM, n_best=5, batch_size=2), found["beam"])


def test_all_devices_find_what_one_does(run, found):
    check_alike(Generator(run.path).generate(TEXTS[:3], DRAWN, n_best=3), found["drawn"][:3])


def test_what_is_drawn_depends_on_a_texts_number_and_the_seed(generator, found):
    later = generator.generate(TEXTS[2:], DRAWN, n_best=3, first=2)
    check_alike(later, found["drawn"][2:])
    first, again = found["drawn"][0], found["drawn"][4]  # of the same text
    other = generator.generate(TEXTS[:1], Decoding(temperature=1.0, seed=6), n_best=3)[0]
    assert len({tuple(output.text for output in own) for own in (first, again, other)}) == 3


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_outputs_are_those_of_evaluation(name, generator, found):
    short = [i for i, text in enumerate(TEXTS) if 0 < len(text) < 8]
    source = strings(*((TEXTS[i], "a") for i in short)).source
    settings = {"beam_size": BEAM.beam_size, "length_penalty": BEAM.length_penalty}
    search = greedy if name == "greedy" else partial(beam_search, **settings)
    search = partial(search, margin=MARGIN)
    data = Dataset(source, source, 2)
    decode = jax.jit(
        lambda params: evaluation.decode(generator.model, params, data, 8 + MARGIN, search)
    )
    rows = decode(generator.params)
    tokens = rows.tokens[:, None] if name == "greedy" else rows.tokens
    texts = [[TOKENIZER.decode(each) for each in own if each[0] != PAD] for own in tokens.tolist()]
    assert texts == [[output.text for output in found[name][i]] for i in short]
    if name == "beam":
        scores = [[output.score for output in found[name][i]] for i in short]
        np.testing.assert_allclose(rows.scores, scores, rtol=1e-5)


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_a_score_is_the_sum_of_log_probabilities(name, generator, found):
    for text, outputs in zip(TEXTS, found[name], strict=True):
        for output in outputs if text else ():
            assert output.score == pytest.approx(log_p(generator, text, output), rel=1e-5)
    cut_off = {
        len(own[-1].tokens) == room(text)
        for text, own in zip(TEXTS, found[name], strict=True)
        if text
    }
    assert cut_off == {True, False}


def test_draws_are_sorted_and_a_search_keeps_its_order(generator, found):
    """One that found no end stands behind those that did, even where it is the likelier."""
    for outputs in found["drawn"]:
        scores = [output.score for output in outputs]
        assert scores == sorted(scores, reverse=True)
    unsorted = 0
    for text, outputs in zip(TEXTS, found["beam"], strict=True):
        keys = [(len(output.tokens) < room(text), output.score) for output in outputs]
        assert keys == sorted(keys, reverse=True)
        unsorted += outputs != sorted(outputs, key=lambda output: -output.score)
    assert unsorted
    check_alike(generator.generate(TEXTS, BEAM), [own[:1] for own in found["beam"]])


def test_of_an_empty_text_come_empty_ones(generator, found):
    assert found["drawn"][1] == [Output("", [], 0.0)] * 3
    assert generator.generate([]) == []
    assert generator.generate(["", ""]) == [[Output("", [], 0.0)]] * 2


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("abCd", {}, "'C' in 'abCd' is not one of the tokenizer's symbols"),
        ("a" * REACH, {}, "the longest text: 21 tokens, .*reaches to model.max_length=20"),
        ("a", {"n_best": 2}, "n_best=2: of beam_size=1 no more come"),
        ("a", {"n_best": 6, "decoding": Decoding(beam_size=5)}, "n_best=6: of beam_size=5"),
        ("a", {"n_best": 0}, "n_best=0: it must be at least 1"),
        ("a", {"batch_size": 0}, "batch_size=0: it must be at least 1"),
    ],
)
def test_what_cannot_be_asked_of_it_is_explained(text, options, message, generator):
    with pytest.raises(UserError, match=message) as caught:
        generator.generate(["a", text], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1.0, "beam_size": 2}, "outputs are drawn, or searched for"),
        ({"top_k": 3}, "nothing is without a temperature"),
        ({"top_p": 0.5}, "nothing is without a temperature"),
        ({"temperature": -1.0}, "temperature=-1.0: it must be at least"),
        ({"temperature": 1e-40}, "temperature=1e-40: it must be at least 1e-06"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_at_odds_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        Decoding(**settings)


def test_alignments_are_the_cross_attention_on_what_is_no_padding(generator, found):
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
    data = Dataset(batch.source, batch.target_out, 1)
    maps = jax.jit(partial(evaluation.attention_maps, generator.model))
    (cross,) = maps(generator.params, data)["cross"]
    np.testing.assert_allclose(first.weights[0], cross[0].mean(0), rtol=1e-4, atol=1e-6)


def test_a_replica_of_a_population_has_its_own_parameters(tmp_path):
    folder = make_run(tmp_path / "population", replicas=2).path
    one = Generator(folder, replica=1, mesh=sharding.one_device())
    wanted = params_of(one.model, 1)
    assert one.params.keys() == wanted.keys()
    for name, array in one.params.items():
        np.testing.assert_array_equal(array, wanted[name])
    with pytest.raises(UserError, match="replica=2: it must be at most 1"):
        Generator(folder, replica=2, mesh=sharding.one_device())
    with pytest.raises(UserError, match="holds no run"):
        Generator(tmp_path)


def test_lengths_have_some_room_and_few_widths():
    lengths = np.arange(1, 1000)
    widths = roomy(lengths)
    assert (widths >= lengths).all()
    assert (widths < np.maximum(2 * lengths, 9)).all()
    assert set(widths[:128]) == {8, 16, 24, 32, 48, 64, 96, 128}


@pytest.fixture
def predict(run, generator, monkeypatch):
    """Calls `main` of scripts/predict.py; returns what it prints as output and as errors."""

    def of(given: bytes, *words: str) -> tuple[str, str]:
        out, errors = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(cli, "set_up_jax", lambda cfg: None)  # JAX is at work already
        with program("scripts/predict.py", f"--workdir={run.path}", *words) as script:
            script.Generator = lambda *_, **__: generator  # its programs are compiled
            cli.explained(script.main)
        out.flush()
        return cast(io.BytesIO, out.buffer).getvalue().decode(), errors.getvalue()

    return of


def test_predict_writes_a_line_for_each_line(predict, found, tmp_path):
    """Whatever their ends are, and those that are no text among them."""
    looked = tmp_path / "looked.jsonl"
    given = "\n".join(TEXTS[:3]).encode() + b"\r\n" + "\n".join(TEXTS[3:]).encode()
    out, errors = predict(given, f"--alignments={looked}", "--window=4")
    assert out == "".join(f"{own[0].text}\n" for own in found["greedy"])
    assert not errors
    records = [json.loads(line) for line in looked.read_text().splitlines()]
    assert [record["line"] for record in records] == [1, 3, 4, 5, 6]
    for record in records:
        text, (output,) = TEXTS[record["line"] - 1], found["greedy"][record["line"] - 1]
        assert record["source"][:-1] == list(text)
        assert record["output"][:-1] == list(output.text)
        weights = np.array(record["weights"])
        assert weights.shape == (1, len(record["output"]), len(record["source"]))
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-3)


def test_predict_numbers_scores_and_draws_as_generate_does(predict, found):
    flags = ("--temperature=1", "--seed=5", "--n_best=3", "--scores", "--window=2")
    out, _ = predict("\n".join(TEXTS).encode(), *flags)
    rows = [line.split("\t") for line in out.splitlines()]
    wanted = [(n, output) for n, own in enumerate(found["drawn"], 1) for output in own]
    for (number, score, text), (n, output) in zip(rows, wanted, strict=True):
        assert (int(number), text) == (n, output.text)
        assert float(score) == pytest.approx(output.score, abs=2e-4)


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--alignments=/nowhere/looked.jsonl",), "/nowhere/looked.jsonl: No such file"),
        (("--temperature=1", "--beam_size=2"), "outputs are drawn, or searched for"),
        (("--workdir=/nowhere",), "/nowhere holds no run"),
    ],
)
def test_predict_refuses_in_one_line(flags, cause, predict):
    with pytest.raises(SystemExit, match="2"):
        predict(b"a\n", *flags)
    errors = sys.stderr.getvalue()
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert cause in errors
    assert not sys.stdout.buffer.getvalue()


@pytest.mark.slow
def test_predict_counts_what_is_no_utf_8_and_ends_quietly_when_nobody_reads_on(tmp_path):
    """And writes UTF-8 whatever the terminal is said to take."""
    run = make_run(tmp_path / "bytes", tokenizer=ByteTokenizer())
    for given, more, lines, errors in (
        ("printf 'a\\n\\377\\nb\\376'", "cat", 3, "2 lines were no UTF-8 (lines 2, 3)\n"),
        ("yes a | head -200", "head -1", 1, ""),
    ):
        command = f"{sys.executable} scripts/predict.py --workdir={run.path} --window=1"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{given} | {command} | {more}"],
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONIOENCODING": "ascii"},
            timeout=300,
        )
        assert done.stdout.decode().count("\n") == lines
        assert done.stderr.decode() == errors
