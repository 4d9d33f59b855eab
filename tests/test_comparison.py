"""What `scripts/compare.py` calls alike."""

import json

import numpy as np
import pytest
from lab.sweeps import comparison
from lab.sweeps.comparison import Finished, compare, likeness

from transformer.errors import UserError


def finished(loss, kernel):
    metrics = {(10, 0, "train/loss"): loss, (20, 0, "train/loss"): 1.0}
    arrays = {".step": np.array(20), ".params['kernel']": np.array(kernel, np.float32)}
    return Finished(metrics, [20], 20, {20: arrays})


def test_a_difference_is_measured_and_found():
    same = compare(finished(2.0, [1, 2]), finished(2.0, [1, 2]), [20])
    assert [each.what for each in same] == ["train/loss", "step at step 20", "params at step 20"]
    assert [(each.identical(), each.compared) for each in same] == [(True, n) for n in (2, 1, 1)]
    found = compare(finished(2.0, [3, 4]), finished(2.2, [3, 4.5]), [20])
    assert [each.identical() for each in found] == [False, True, False]
    loss, _, params = found
    assert (loss.unequal, loss.where, params.where) == (1, "step 10", ".params['kernel']")
    assert loss.largest == pytest.approx(0.1)
    assert params.largest == pytest.approx(0.5 / np.sqrt(12.5))


def test_what_one_lacks_is_a_difference():
    one = likeness("loss", {"step 1": 1.0, "step 2": 1.0}, {"step 1": 1.0})
    assert (one.compared, one.missing, one.unequal, one.identical()) == (1, 1, 0, False)


def test_a_difference_in_the_last_bit_counts_and_one_nan_is_the_other():
    bit = np.nextafter(np.float32(1), np.float32(2))
    assert likeness("", {"a": np.float32(1)}, {"a": bit}).unequal == 1
    assert likeness("", {"a": 0.0}, {"a": -0.0}).unequal == 1
    assert likeness("", {"a": float("nan")}, {"a": float("nan")}).identical()
    mixed = likeness("", {"a": 1.0, "b": 1.0}, {"a": float("nan"), "b": 3.0})
    assert np.isnan(mixed.largest)
    assert mixed.where == "a"


def test_distances_are_relative():
    for one, other, apart in ((0.0, 0.0, 0.0), (0.0, 1.0, np.inf), (2.0, 1.0, 0.5)):
        assert comparison.distance(np.array([one]), np.array([other])) == apart


def test_arrays_are_told_by_the_field_of_the_state():
    names = [".params['a/kernel']", ".opt_state[0].mu['a']", ".step"]
    assert list(map(comparison.kind_of, names)) == ["params", "opt_state", "step"]


def test_metrics_are_read_but_for_speeds_and_refused_where_no_run_leaves_them(tmp_path):
    path, row = tmp_path / "metrics.jsonl", {"step": 1, "replica": 1, "train/loss": 2.0}
    path.write_text(json.dumps(row | {"train/steps_per_second": 3.0}) + "\n")
    assert comparison.read_every_metric(path) == {(1, 1, "train/loss"): 2.0}
    for text, message in (
        ('{"step": 1, "a": 1}\n{"step": 1, "a": 1}\n', "has a of step 1 twice"),
        ('{"step": 1, "a": 1}', "ends in the middle of a line"),
        ('{"step": 1, "a"\n', "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            comparison.read_every_metric(path)
