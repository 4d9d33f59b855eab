"""The comparison of two runs, `scripts/compare.py`."""

import numpy as np
import pytest

from tests.helpers import program


@pytest.fixture
def script():
    with program("scripts/compare.py", "--run=one", "--other=two") as module:
        yield module


def run(loss, kernel):
    params = {".params['kernel']": np.array(kernel, np.float32)}
    return {"train/loss": {"step 10": loss, "step 20": 1.0}, "params at step 20": params}


def test_a_difference_is_measured_and_found(script):
    same = script.compare(run(2.0, [1, 2]), run(2.0, [1, 2]))
    assert same == [("train/loss", 2, 0, 0, 0.0, ""), ("params at step 20", 1, 0, 0, 0.0, "")]
    loss, params = script.compare(run(2.0, [3, 4]), run(2.2, [3, 4.5]))
    assert loss == ("train/loss", 2, 0, 1, pytest.approx(0.1), "step 10")
    apart = pytest.approx(0.5 / np.sqrt(12.5))
    assert params == ("params at step 20", 1, 0, 1, apart, ".params['kernel']")


def test_a_missing_value_the_last_bit_and_one_nan_are_differences(script):
    def agreement(one, other):
        return script.compare({"loss": one}, {"loss": other})[0]

    assert agreement({"a": 1.0, "b": 1.0}, {"a": 1.0})[1:4] == (1, 1, 0)
    assert script.compare({}, {"loss": {"a": 1.0}})[0][1:4] == (0, 1, 0)
    bit, nan = np.nextafter(np.float32(1), np.float32(2)), float("nan")
    for ours, theirs, unequal in ((np.float32(1), bit, 1), (0.0, -0.0, 1), (nan, nan, 0)):
        assert agreement({"a": ours}, {"a": theirs})[1:4] == (1, 0, unequal)
    *_, largest, where = agreement({"a": 1.0, "b": 1.0}, {"a": nan, "b": 3.0})
    assert (np.isnan(largest), where) == (True, "a")
    for one, other, apart in ((0.0, 0.0, 0.0), (0.0, 1.0, np.inf), (2.0, 1.0, 0.5)):
        assert script.distance(np.array([one]), np.array([other])) == apart
