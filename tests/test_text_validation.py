"""Decoded text while a run trains: what is logged, when, and that it may rank checkpoints."""

import json
from unittest.mock import Mock

import jax
import numpy as np

from tests.helpers import refused
from tests.test_config import resolved
from tests.test_programs import results
from tests.test_train import KNOBS, steps_with
from transformer.inference import evaluation, plots
from transformer.inference.decoding import GREEDY
from transformer.inference.text_metrics import TEXT_METRICS, Texts
from transformer.run import Run
from transformer.training import early_stopping
from transformer.training.checkpoint import Checkpoints, merit

# Validates at 5, 6, 10, 12 and 14, and saves at 5, 10 and 14.
NAMES = ("exact_match", "character_error_rate")
DECODES = {"decode_every": 2, "decode_examples": 12, "data.metrics": NAMES}


def train(folder, data_dir, **changes):
    with jax.numpy_dtype_promotion("standard"):  # what a user has
        run = Run(resolved(KNOBS | DECODES | changes), folder, data_dir=data_dir)
        run.train()
        return run


def validated(folder, name):
    key = f"validation/{name}"
    return {row["step"]: row[key] for row in results(folder) if key in row}


def test_a_sample_is_decoded_by_one_program_and_its_metrics_are_logged(
    tmp_path, data_dir, monkeypatch, capsys
):
    decoded = Mock(side_effect=evaluation.decode)
    monkeypatch.setattr(evaluation, "decode", decoded)
    run = train(tmp_path, data_dir, replicas=2)
    assert decoded.call_count == 1  # traced once
    assert steps_with(tmp_path, "validation/exact_match") == [12, 12, 14, 14]
    assert steps_with(tmp_path, "validation/loss")[::2] == [5, 6, 10, 12, 14]

    corpus, data = run.corpus, run.data["validation"]
    rows = np.arange(12) * len(data) // 12
    assert rows[-1] > len(data) * 0.9
    with jax.set_mesh(run.mesh):
        found = run.decode(run.state.variables(), data, GREEDY).tokens
    references = corpus.references("validation")
    for k, line in enumerate(results(tmp_path)[-2:]):
        outputs = [corpus.tokenizers.target.decode(found[k, row, 0].tolist()) for row in rows]
        texts = Texts(outputs, [references[row] for row in rows])
        for name in NAMES:
            assert line[f"validation/{name}"] == TEXT_METRICS[name].score(texts).value
    assert results(tmp_path)[-1]["validation/character_error_rate"] > 0
    printed = capsys.readouterr().out
    assert printed.count("character error rate") == 2
    assert (tmp_path / "plots" / "learning_curve.png").exists()
    results_file = json.loads((tmp_path / "results.json").read_text())
    assert not any("error_rate" in name for name in results_file["replicas"][0])


def test_a_text_metric_ranks_checkpoints_and_ends_runs(tmp_path, data_dir, monkeypatch):
    """Every save then decodes; less of an error rate is better."""
    values = {5: 50.0, 10: 40.0, 14: 45.0}
    score = lambda self, state: [{"validation/character_error_rate": values[state.taken()]}]  # noqa: E731
    monkeypatch.setattr("transformer.training.text_validation.TextValidation.metrics", score)
    best = "character_error_rate"
    run = train(tmp_path, data_dir, best_metric=best, decode_every=100, keep_checkpoints=1)
    assert validated(tmp_path, best) == values
    with Checkpoints(tmp_path / "checkpoints", None, best) as checkpoints:
        assert (checkpoints.steps(), checkpoints.find("best")) == ([10, 14], 10)
    assert merit({"validation/loss": 1.0}, best)[0] == -np.inf
    assert run.config.text_metrics() == list(NAMES)
    patient = resolved(KNOBS | {"best_metric": best, "decode_every": 1, "patience": 1})
    said = early_stopping.EarlyStopping(patient, results(tmp_path)).reason(0)
    assert said == f"validation/{best} has not improved for an evaluation; best 40.00 at step 10"


def test_without_metrics_the_exact_match_is_computed_and_mistakes_are_found_at_once(
    tmp_path, data_dir, capsys
):
    plain = resolved({"decode_every": 1})
    assert plain.text_metrics() == ["exact_match"]
    best = resolved({"decode_every": 1, "best_metric": "chrf", "data.metrics": ("bleu",)})
    assert best.text_metrics() == ["bleu", "chrf"]
    message = "best_metric=bleu: decode_every=0 never decodes; set it to 1, or choose one of loss,"
    refused(message, resolved, {"best_metric": "bleu"})
    refused("best_metric=blue: choose one of loss,", resolved, {"best_metric": "blue"})
    unknown = {"decode_every": 1, "data.metrics": ("bleu",), "data.bleu_tokenizer": "ja-mecab"}
    run = Run(resolved(unknown), data_dir=data_dir)
    refused("bleu_tokenizer=ja-mecab: .*or choose another", run.check)
    Run(resolved({"decode_every": 1, "data.metrics": ("bleu",)}), data_dir=data_dir).check()
    assert "no reference has 4 tokens" in capsys.readouterr().out


def test_text_metrics_are_drawn_in_axes_of_their_own(tmp_path, monkeypatch):
    drawn = Mock()
    monkeypatch.setattr(plots, "finish", drawn)
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 1, "validation/loss": 2.0}]
    plots.learning_curve(rows, tmp_path, "a run")
    rows.append({"step": 2, "validation/bleu": 30.0})
    plots.learning_curve(rows, tmp_path, "a run")
    (_, two, _), (_, three, _) = (call.args for call in drawn.call_args_list)
    assert (len(two), len(three)) == (2, 3)
    (line,) = three[2].get_lines()
    assert (line.get_label(), line.get_ydata().tolist()) == ("validation, bleu", [30.0])
