"""What `scripts/compare.py` and `scripts/torture.py` call alike."""

import json

import numpy as np
import pytest

from transformer.errors import UserError
from transformer.experiments.comparison import (
    Finished,
    compare,
    distance,
    kind_of,
    likeness,
    read_every_metric,
)


def finished(loss, kernel):
    metrics = {(10, 0, "train/loss"): loss, (20, 0, "train/loss"): 1.0}
    arrays = {".step": np.array(20), ".params['kernel']": np.array(kernel, np.float32)}
    return Finished(metrics, [20], 20, {20: arrays})


def test_runs_that_are_the_same_are_identical():
    found = compare(finished(2.0, [1, 2]), finished(2.0, [1, 2]), [20])
    assert [each.what for each in found] == ["train/loss", "step at step 20", "params at step 20"]
    assert all(each.identical() for each in found)
    assert [each.compared for each in found] == [2, 1, 1]


def test_a_difference_is_measured_and_found():
    loss, step, params = compare(finished(2.0, [3, 4]), finished(2.2, [3, 4.5]), [20])
    assert (loss.unequal, loss.where) == (1, "step 10")
    assert loss.largest == pytest.approx(0.1)
    assert not loss.identical()
    assert not params.identical()
    assert step.identical()
    assert params.where == ".params['kernel']"
    assert params.largest == pytest.approx(0.5 / np.sqrt(12.5))


def test_what_one_lacks_is_a_difference():
    one = likeness("loss", {"step 1": 1.0, "step 2": 1.0}, {"step 1": 1.0})
    assert (one.compared, one.missing, one.unequal) == (1, 1, 0)
    assert not one.identical()


def test_a_difference_in_the_last_bit_counts_and_one_nan_is_the_other():
    bit = np.nextafter(np.float32(1), np.float32(2))
    assert likeness("", {"a": np.float32(1)}, {"a": bit}).unequal == 1
    assert likeness("", {"a": 0.0}, {"a": -0.0}).unequal == 1
    nan = likeness("", {"a": float("nan")}, {"a": float("nan")})
    assert nan.identical()
    mixed = likeness("", {"a": 1.0, "b": 1.0}, {"a": float("nan"), "b": 3.0})
    assert np.isnan(mixed.largest)
    assert mixed.where == "a"


@pytest.mark.parametrize(
    ("one", "other", "apart"), [([0.0], [0.0], 0.0), ([0.0], [1.0], np.inf), ([2.0], [1.0], 0.5)]
)
def test_distances_are_relative(one, other, apart):
    assert distance(np.array(one), np.array(other)) == apart


def test_arrays_are_told_by_the_field_of_the_state():
    names = [".params['a/kernel']", ".moments[0].mu['a']", ".step"]
    assert [kind_of(name) for name in names] == ["params", "moments", "step"]


def test_metrics_but_for_speeds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "replica": 1, "train/loss": 2.0, "train/steps_per_second": 3.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_every_metric(path) == {(1, 1, "train/loss"): 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "a": 1}\n{"step": 1, "a": 1}\n', "has a of step 1 twice"),
        ('{"step": 1, "a": 1}', "ends in the middle of a line"),
        ('{"step": 1, "a"\n', "is damaged"),
    ],
)
def test_metrics_that_no_run_leaves_are_refused(text, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_every_metric(tmp_path / "metrics.jsonl")
