"""The comparison of two runs, `scripts/compare.py`."""

import json

import numpy as np
import pytest
from lab.comparison import agreement, compare, distance, metrics_of


def run(loss, kernel):
    params = {".params['kernel']": np.array(kernel, np.float32)}
    return {"train/loss": {"step 10": loss, "step 20": 1.0}, "params at step 20": params}


def test_a_difference_is_measured_and_found():
    same = compare(run(2.0, [1, 2]), run(2.0, [1, 2]))
    assert [each.group for each in same] == ["train/loss", "params at step 20"]
    assert [(each.identical, each.compared) for each in same] == [(True, 2), (True, 1)]
    loss, params = compare(run(2.0, [3, 4]), run(2.2, [3, 4.5]))
    assert not loss.identical
    assert not params.identical
    assert (loss.unequal, loss.where, params.where) == (1, "step 10", ".params['kernel']")
    assert loss.largest == pytest.approx(0.1)
    assert params.largest == pytest.approx(0.5 / np.sqrt(12.5))


def test_what_one_lacks_is_a_difference():
    one = agreement("loss", {"step 1": 1.0, "step 2": 1.0}, {"step 1": 1.0})
    assert (one.compared, one.missing, one.unequal, one.identical) == (1, 1, 0, False)
    assert [each.missing for each in compare({}, {"loss": {"step 1": 1.0}})] == [1]


def test_a_difference_in_the_last_bit_counts_and_one_nan_equals_another():
    bit = np.nextafter(np.float32(1), np.float32(2))
    assert agreement("", {"a": np.float32(1)}, {"a": bit}).unequal == 1
    assert agreement("", {"a": 0.0}, {"a": -0.0}).unequal == 1
    assert agreement("", {"a": float("nan")}, {"a": float("nan")}).identical
    mixed = agreement("", {"a": 1.0, "b": 1.0}, {"a": float("nan"), "b": 3.0})
    assert np.isnan(mixed.largest)
    assert mixed.where == "a"
    for one, other, apart in ((0.0, 0.0, 0.0), (0.0, 1.0, np.inf), (2.0, 1.0, 0.5)):
        assert distance(np.array([one]), np.array([other])) == apart


def test_metrics_are_read_without_speeds(tmp_path):
    path, row = tmp_path / "metrics.jsonl", {"step": 1, "replica": 1, "train/loss": 2.0}
    path.write_text(json.dumps(row | {"train/steps_per_second": 3.0}) + "\n")
    assert metrics_of(path) == {"train/loss": {"step 1, replica 1": 2.0}}
