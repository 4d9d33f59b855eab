"""Decoding options from texts to texts, in Python and by scripts/predict.py."""

import json

import jax
import numpy as np
import pytest

from tests import test_predict
from tests.helpers import TOKENIZER, refused, strings
from tests.test_generation import BEAM, DRAWN, MARGIN, TEXTS, make_run
from tests.test_predict import GIVEN
from transformer import load
from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import SymbolTokenizer, before_end
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.parallel.mesh import one_device_mesh
from transformer.parallel.replicas import split_replicas
from transformer.run import Run

run, trained = test_predict.run, test_predict.trained
found, predict = test_predict.found, test_predict.predict
CONSTRAINED = {"min_length": 3, "no_repeat_ngram_size": 2, "length_ratio": 1.5, "prefix": "ba"}


def test_every_replica_mesh_and_batch_has_the_same_constrained_outputs(tmp_path):
    """Those of `Run.decode` for a population are those of its replicas alone."""
    folder = str(make_run(tmp_path / "population", replicas=2).path)
    run, texts = Run.saved(folder), [text for text in TEXTS if text]
    source = np.array(strings(*((text, "") for text in texts)).source)
    settings = {"beam_size": 2, "max_length": 12, **CONSTRAINED}
    decoding = DecodingConfig(**settings)
    with jax.set_mesh(run.mesh):
        found = run.decode(run.restore().variables(), Dataset(source, source, 2), decoding)
    each = zip(split_replicas(found, 2), (None, one_device_mesh()), (128, 1), strict=True)
    for k, (arrays, mesh, size) in enumerate(each):
        model, own = load(folder, replica=k, mesh=mesh), texts[:2] if size == 1 else texts
        found = model.generate(own, **settings, n_best=2, batch_size=size)
        for text, outputs, tokens, scores in zip(own, found, *arrays, strict=False):
            limit = min(-(-(len(text) + 1) * 3 // 2) + MARGIN, 12)
            for output, row, score in zip(outputs, tokens, scores, strict=True):
                assert output.text.startswith("ba")
                assert output.truncated == (len(output.tokens) == limit)
                assert len(output.tokens) <= limit
                assert output.tokens == before_end(row.tolist())
                assert output.score == pytest.approx(score, rel=1e-4)


def test_a_prefix_is_data_and_one_that_cannot_be_is_refused(run, trained, monkeypatch):
    traced, decode = [], evaluation.decode
    monkeypatch.setattr(
        evaluation, "decode", lambda *args, **options: traced.append(1) or decode(*args, **options)
    )
    model = TrainedModel(Run.saved(run.path, mesh=trained.mesh), trained.variables)
    for prefix in ("ab", "zy"):
        ((output,),) = model.generate(["abcde"], prefix=prefix)
        assert output.text.startswith(prefix)
        assert output.score == pytest.approx(model.score(["abcde"], [output])[0].log_p, rel=1e-5)
    assert len(traced) == 1
    blank = DecodingConfig(prefix="").split_prefix(TOKENIZER, 0)
    assert blank == (DecodingConfig(), None)
    for message, prefix in (
        ("'C' in 'abC' is not one of the tokenizer's symbols", "abC"),
        ("prefix='.*': it is not text", "\udcff"),
        (r"^texts\[1\]: its output has at most 6 tokens and the prefix 6; raise", "abcdef"),
        ("has 10 tokens, and outputs have at most 10, EOS included; shorten it, or", "abcdefghij"),
    ):
        refused(message, trained.generate, ["abcde", "q"], prefix=prefix)
    words = SymbolTokenizer(("a",), " ", unknown=True)
    refused(
        "prefix=' a': the tokenizer changes", DecodingConfig(prefix=" a").split_prefix, words, 9
    )
    refused("prefix='b' has unknown symbols", DecodingConfig(prefix="b").split_prefix, words, 9)


class Initials(SymbolTokenizer):
    """One whose texts have only the first character of each output."""

    def decode(self, tokens):
        return super().decode(tokens)[:1]


def test_distinct_outputs_are_the_best_of_each_text(run, trained, predict):
    model = TrainedModel(Run.saved(run.path, mesh=trained.mesh), trained.variables)
    model.tokenizers = Tokenizers(TOKENIZER, Initials(TOKENIZER.symbols))
    fewer = 0
    for decoding, n_best in ((BEAM, 5), (DRAWN, 9)):
        every = model.generate(TEXTS, **decoding, n_best=n_best)
        wanted = [[*{x.text: x for x in own[::-1]}.values()] for own in every]
        wanted = [sorted(own, key=every[k].index) for k, own in enumerate(wanted)]
        found = model.generate(TEXTS, **decoding, distinct=True, n_best=n_best)
        assert found == wanted
        fewer += sum(1 < len(own) < n_best for own in found)
        few = model.generate(TEXTS, **BEAM, distinct=True, n_best=2)
        assert decoding is DRAWN or few == [own[:2] for own in found]
    assert fewer > 5
    # A line that has fewer outputs than asked for keeps its number of lines.
    found = trained.generate(TEXTS, temperature=0.2, distinct=True, n_best=3)
    out, errors = predict(GIVEN, "--temperature=0.2", "--distinct", "--n_best=3")
    assert out.split("\n")[:-1] == [
        text for own in found for text in ([x.text for x in own] + [""] * 3)[:3]
    ]
    missing = sum(3 - len(own) for own in found)
    assert f"empty lines in place of missing outputs: {missing} (" in errors
    out, errors = predict(GIVEN, "--temperature=0.2", "--distinct", "--n_best=3", "--json")
    assert [json.loads(line)["line"] for line in out.splitlines()] == [
        number for number, own in enumerate(found, 1) for _ in own
    ]
    assert "missing" not in errors


def test_hypotheses_that_are_missing_are_no_outputs(trained, predict):
    """A beam of 30 has 27 first tokens, of which EOS ends an output."""
    found = trained.generate(["abc", ""], beam_size=30, max_length=1, n_best=30)
    assert len(found[0]) == 27
    assert all(np.isfinite(output.score) for own in found for output in own)
    out, errors = predict(b"abc", "--beam_size=30", "--max_length=1", "--n_best=30")
    assert out.count("\n") == 30
    assert "empty lines in place of missing outputs: 3 (line 1)" in errors


def test_a_line_that_is_too_short_for_the_prefix_is_refused_alone(predict, found):
    out, errors = predict(b"abcdefghijk\nq\nabcdefg", "--prefix=abcdef", "--decode_margin=0")
    lines = out.splitlines()
    assert [line[:6] for line in lines] == ["abcdef", "", "abcdef"]
    assert "line 2: its output has at most 2 tokens and the prefix 6; raise" in errors


def test_a_truncated_output_names_the_flag_that_limits_it(predict, found):
    out, errors = predict(GIVEN, "--max_length=3", "--decode_margin=0")
    whole = [own[0].tokens for own in found["greedy"]]
    assert out.splitlines() == [
        TOKENIZER.decode(tokens[: min(3, len(x) + 1)] if x else [])
        for x, tokens in zip(TEXTS, whole, strict=True)
    ]
    assert "outputs truncated (--max_length): " in errors
    assert errors.count("outputs truncated (--decode_margin): 1 (line 3)") == (len(whole[2]) > 1)
