"""What eval.py says of its outputs, and the plots that it draws."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.helpers import program, strings
from transformer import plots
from transformer.decoding import Beams
from transformer.evaluation import Scores


def test_sequence_accuracy_is_exact_match_of_decoded_outputs():
    """The scores of teacher forcing call all sequences right; one output of three is."""
    batch = strings(("ab", "ba"), ("cd", "dc"), ("e", "e"))
    target = np.array(batch.target_out)
    tokens = np.where(np.array([[False], [True], [True]]), 7, target)
    tokens = np.stack([tokens, target], axis=1)  # the second hypothesis is not looked at
    found = Beams(tokens=tokens, scores=np.zeros((3, 2), np.float32))
    right = np.array([3.0, 3.0, 2.0])
    scores = Scores(nll=right, correct=right, tokens=right)
    with program("eval.py", "--workdir=none") as evaluate:
        data = evaluate.Dataset(np.array(batch.source), target, 1)
        record = evaluate.results("test", data, scores, found)
    assert record["metrics"]["test/sequence_accuracy"] == pytest.approx(1 / 3)
    assert record["metrics"]["test/token_accuracy"] == 1.0
    rows = [
        (row["length"], row["sequences"], row["sequence_accuracy"])
        for row in record["by_source_length"]
    ]
    assert rows == [(1, 1, 0.0), (2, 2, 0.5)]


def test_a_plot_of_attention_has_queries_down_and_keys_across(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    weights = np.random.default_rng(0).random((2, 4, 5))
    plots.attention([weights], ["q", "r", "s"], ["k", "l"], "title", tmp_path / "plot.png")
    for panel, head in zip(drawn[0].axes, weights, strict=False):
        assert [label.get_text() for label in panel.get_yticklabels()] == ["q", "r", "s"]
        assert [label.get_text() for label in panel.get_xticklabels()] == ["k", "l"]
        np.testing.assert_array_equal(panel.images[0].get_array(), head[:3, :2])
