"""scripts/predict.py, in this process, with the models of test_generation.py."""

import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any, cast

import jax
import numpy as np
import pytest

from tests.helpers import TOKENIZER, program, refused
from tests.test_generation import DRAWN, REACH, TEXTS, make_run
from tests.test_programs import ROOT
from transformer import TrainedModel, cli, load
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import EOS, ByteTokenizer, SymbolTokenizer
from transformer.inference.generation import Output
from transformer.parallel.mesh import one_device_mesh
from transformer.workdir import Workdir

GIVEN = "\n".join(TEXTS).encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def trained(run) -> TrainedModel:
    return load(str(run.path), mesh=one_device_mesh())


@pytest.fixture(scope="module")
def found(trained) -> dict[str, list[list[Output]]]:
    """Outputs of `TEXTS`."""
    drawn = trained.generate(TEXTS, **DRAWN, n_best=3)
    return {"greedy": trained.generate(TEXTS), "drawn": drawn}


@pytest.fixture
def predict(run, trained, monkeypatch):
    """Calls `main` of scripts/predict.py; returns what it prints as output and as errors."""

    def of(given: bytes, *words: str) -> tuple[str, str]:
        out, errors = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(cli, "set_up_jax", lambda cfg: None)  # JAX is at work already
        with program("scripts/predict.py", f"--workdir={run.path}", *words) as script:
            monkeypatch.setattr(script.transformer, "load", lambda *_, **__: trained)
            cli.explained(script.main)
        out.flush()
        return cast(io.BytesIO, out.buffer).getvalue().decode(), errors.getvalue()

    return of


def test_predict_writes_a_line_for_each_line(predict, trained, found, tmp_path):
    """Whatever their ends are, and those that are no text among them."""
    looked = tmp_path / "looked.jsonl"
    given = GIVEN.replace(b"q\n", b"q\r\n")
    out, errors = predict(given, f"--alignments={looked}", "--window=4")
    assert out == "".join(f"{own[0].text}\n" for own in found["greedy"])
    cut = sum(own[0].truncated for own in found["greedy"])
    assert errors.startswith(f"outputs truncated (--decode_margin): {cut} (lines")
    records = [json.loads(line) for line in looked.read_text().splitlines()]
    kept = [k for k, text in enumerate(TEXTS) if text]
    wanted = trained.attention([TEXTS[k] for k in kept], [found["greedy"][k][0] for k in kept])
    for record, one, k in zip(records, wanted, kept, strict=True):
        assert [record[x] for x in ("line", "source", "output")] == [k + 1, one.source, one.output]
        np.testing.assert_allclose(record["weights"], one.cross.mean(1), atol=1e-3)
    # Scores and draws are numbered as `generate` does.
    flags = ("--temperature=1", "--seed=5", "--n_best=3", "--scores", "--window=2")
    rows = [line.split("\t") for line in predict(GIVEN, *flags)[0].splitlines()]
    drawn = [(n, output) for n, own in enumerate(found["drawn"], 1) for output in own]
    for (number, score, text), (n, output) in zip(rows, drawn, strict=True):
        assert (int(number), text) == (n, output.text)
        assert float(score) == pytest.approx(output.score, abs=2e-4)


def test_predict_limits_outputs_by_decode_margin_and_counts_the_truncated(predict, found):
    out, errors = predict(GIVEN, "--decode_margin=0")
    pairs = zip(TEXTS, found["greedy"], strict=True)
    tokens = [own[0].tokens[: len(x) + 1 if x else 0] for x, own in pairs]
    assert out.splitlines() == [TOKENIZER.decode(each) for each in tokens]
    cut = [n for n, x in enumerate(TEXTS, 1) if x and len(tokens[n - 1]) > len(x)]
    assert 0 < len(cut) < 5
    lines = ", ".join(map(str, cut[:3])) + ", …" * (len(cut) > 3)
    assert errors == f"outputs truncated (--decode_margin): {len(cut)} (lines {lines})\n"


def test_a_refused_line_does_not_stop_the_others(predict, trained, found, monkeypatch):
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
    assert trained.generate(ends) == trained.generate(["abcde", "q", ""])
    # Nor does one for which there is not enough memory.
    whole = trained._call

    def limited(call: Any, sources: np.ndarray, *rest: Any) -> Any:
        if len(sources) > 1 or sources.shape[1] > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return whole(call, sources, *rest)

    monkeypatch.setattr(trained, "_call", limited)
    out, errors = predict(GIVEN, "--alignments=/dev/null")
    assert out.split("\n")[:-1] == [own[0].text * (k != 3) for k, own in enumerate(found["greedy"])]
    assert errors.startswith("line 4: 18 tokens need too much memory; split the text; its output")
    for each in (trained.generate, trained.encode, partial(trained.score, targets=TEXTS)):
        refused(r"texts\[3\]: 18 tokens", each, TEXTS)


def test_predict_scores_the_tokens_that_it_writes_as_it_did(predict, trained, found):
    """Of an empty text, of finished and of truncated outputs, whatever the window."""
    flags = ("--tokens", "--beam_size=5", "--n_best=5", "--length_penalty=0")
    written = [line.split("\t") for line in predict(GIVEN, *flags, "--scores")[0].splitlines()]
    pairs = "".join(f"{TEXTS[int(number) - 1]}\t{ids}\n" for number, _, ids in written)
    out, errors = predict(pairs.encode(), "--score", "--tokens", "--window=4")
    assert errors == ""
    rows = [line.split("\t") for line in out.splitlines()]
    log_p = [[float(row[0]) for row in rows], [float(score) for _, score, _ in written]]
    np.testing.assert_allclose(*log_p, rtol=1e-5, atol=2e-6)
    assert [int(row[1]) for row in rows] == [len(ids.split()) for *_, ids in written]
    assert {ids.endswith(str(EOS)) for *_, ids in written if ids} == {True, False}
    (record,) = map(json.loads, predict(b"q", "--tokens", "--json")[0].splitlines())
    assert record["tokens"] == found["greedy"][2][0].ids()
    # Texts are followed by EOS.
    out, _ = predict(b"abcde\tba\nq\t\n", "--score", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    scores = trained.score(["abcde", "q"], ["ba", ""])
    assert [one.tokens for one in scores] == [3, 1]
    for number, (record, score) in enumerate(zip(records, scores, strict=True), 1):
        assert record == pytest.approx({"line": number, **score._asdict()})


def test_predict_scores_nan_for_lines_that_it_cannot_score(predict):
    bad = ["abc", "a\tb\tc", "A\tb", f"a\t{'b' * REACH}", "a\tb"]
    out, errors = predict("\n".join(bad).encode(), "--score", "--window=2")
    assert [line.split("\t")[0] == "nan" for line in out.splitlines()] == [True] * 4 + [False]
    reasons = ["1: 0 tabs instead of", "2: 2 tabs", "3: 'A' in 'A'", "4: the target's 21 tokens"]
    for line, reason in zip(errors.splitlines(), reasons, strict=True):
        assert re.fullmatch(f"line {reason}.*; its score is nan", line)
    out, errors = predict(b"a\tb\na\t99", "--score", "--tokens", "--json")
    record = {"line": 1, "log_p": None, "tokens": 0, "perplexity": None}
    assert json.loads(out.splitlines()[0]) == record
    assert "line 1: the target is not a list of token ids, such as" in errors
    assert "line 2: the target has token 99; outputs have those from 2 to 28" in errors
    for words, message in (
        (("--strict",), "line 1: 0 tabs"),
        (("--beam_size=4",), "--score decodes nothing: leave out --beam_size"),
        (("--noscores",), "--score decodes nothing: leave out --scores"),
    ):
        with pytest.raises(SystemExit, match="2"):
            predict(b"abc", "--score", *words)
        assert sys.stderr.getvalue().startswith(f"error: {message}")


def test_outputs_shift_no_line_or_column_and_unknowns_are_counted(predict, trained, monkeypatch):
    known = SymbolTokenizer("abq", unknown=True)
    breaks = SymbolTokenizer(["\t", "\n", "\r", "\u2028", *"abcdefghijklmnopqrstuv"])
    monkeypatch.setattr(trained, "tokenizers", Tokenizers(known, breaks))
    given, flags = b"abqab\nzq\nxyz\nq", ("--temperature=1", "--n_best=9", "--seed=5")
    with pytest.warns(UserWarning, match=r"^4 unknown symbols \(in texts 1, 2\)$"):
        outputs = trained.generate(given.decode().split(), **DRAWN, n_best=9)
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
