import json
import math
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_programs import ROOT
from transformer.errors import UserError
from transformer.metrics import MetricsWriter, by_replica, mean_over, read_metrics, train_metrics
from transformer.strict_json import dumps


def test_train_metrics_are_ratios_made_once():
    sums = {
        "loss": 30.0,
        "correct": 5.0,
        "tokens": 20.0,
        "gradient_norm": 8.0,
        "steps": 4.0,
        "skipped": 0.0,
    }
    assert train_metrics(sums, seconds=2.0) == {
        "train/loss": 1.5,
        "train/accuracy": 0.25,
        "train/gradient_norm": 2.0,
        "train/steps_per_second": 2.0,
        "train/target_tokens_per_second": 10.0,
    }


def test_each_replica_has_its_part_of_a_populations_arrays():
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": (jnp.array([7, 8, 9]),)}
    parts = by_replica(tree, 3)
    assert len(parts) == 3
    for k, part in enumerate(parts):
        np.testing.assert_array_equal(part["a"], [2.0 * k, 2.0 * k + 1])
        assert part["b"] == (7 + k,)
    assert by_replica(tree, 1) == [tree]


def test_a_populations_sums_make_the_metrics_of_each_replica():
    sums = {"loss": [30.0, 10.0], "correct": [5.0, 20.0], "tokens": [20.0, 20.0]}
    sums = {name: jnp.array(values) for name, values in sums.items()}
    sums |= {
        "gradient_norm": jnp.array([8.0, 4.0]),
        "steps": jnp.array([4.0, 4.0]),
        "skipped": jnp.zeros(2),
    }
    one, other = (train_metrics(each, seconds=2.0) for each in by_replica(sums, 2))
    assert (one["train/loss"], other["train/loss"]) == (1.5, 0.5)
    assert (one["train/accuracy"], other["train/accuracy"]) == (0.25, 1.0)
    assert (one["train/gradient_norm"], other["train/gradient_norm"]) == (2.0, 1.0)
    assert one["train/steps_per_second"] == other["train/steps_per_second"] == 2.0


def test_the_mean_over_replicas_is_taken_metric_by_metric():
    assert mean_over([{"a": 1.0, "b": 3}, {"a": 2.0, "b": 5}]) == {"a": 1.5, "b": 4.0}
    assert mean_over([{"a": 1.0}]) == {"a": 1.0}


def test_what_is_written_is_read(tmp_path):
    with MetricsWriter(tmp_path, resume_from=0) as writer:
        writer.write(10, [{"train/loss": 2.0}])
        writer.write(20, [{"train/loss": 1.0}])
    rows = [{"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_nan_is_null_in_the_file_and_nan_again(tmp_path):
    """Readers of strict JSON, such as JavaScript's, refuse NaN."""
    with MetricsWriter(tmp_path, resume_from=0) as writer:
        writer.write(10, [{"train/loss": float("nan")}])
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == '{"step": 10, "train/loss": null}\n'
    ((step, loss),) = (row.values() for row in read_metrics(path))
    assert step == 10
    assert math.isnan(loss)
    record = {"a": [1.0, float("inf")], "b": ({"c": float("-inf"), "d": "NaN"},), "e": None}
    assert json.loads(dumps(record)) == {
        "a": [1.0, None],
        "b": [{"c": None, "d": "NaN"}],
        "e": None,
    }


def test_the_events_are_those_that_tensorboard_reads(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with MetricsWriter(tmp_path, resume_from=5) as writer:
        writer.write(10, [{"train/loss": 2.0, "train/accuracy": 0.5}])
        writer.write(20, [{"validation/loss": 1.0}])
    (path,) = tmp_path.glob("events.out.tfevents.*")
    rest, events = path.read_bytes(), []
    while rest:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", rest[:8])
        events.append(Event.FromString(rest[12 : 12 + length]))
        rest = rest[16 + length :]
    version, start, *scalars = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (6, SessionLog.START)
    assert [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in scalars
    ] == [(10, {"train/loss": 2.0, "train/accuracy": 0.5}), (20, {"validation/loss": 1.0})]


def test_the_events_do_without_pytorch(tmp_path):
    """Whose import takes seconds, and which is there for others when they want it."""
    program = f"""
import pathlib, sys
from transformer.metrics import Events

Events(pathlib.Path({str(tmp_path)!r}), 0)
assert not any(name.split(".")[0] == "torch" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_each_replica_has_lines_and_events_of_its_own(tmp_path):
    with MetricsWriter(tmp_path, resume_from=0, replicas=2) as writer:
        writer.write(10, [{"train/loss": 2.0}, {"train/loss": 3.0}])
        writer.write(20, [{"train/loss": 1.0}, {"train/loss": 2.0}])
    rows = [
        {"step": step, "replica": k, "train/loss": loss}
        for step, k, loss in ((10, 0, 2.0), (10, 1, 3.0), (20, 0, 1.0), (20, 1, 2.0))
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    for k in range(2):
        assert list((tmp_path / f"replica_{k}").glob("events.out.tfevents.*"))
    with MetricsWriter(tmp_path, resume_from=10, replicas=2):
        assert read_metrics(tmp_path / "metrics.jsonl") == rows[:2]


@pytest.mark.parametrize("cut", ["", '{"step": 30, "train/lo', '{"step": 30}'])
def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path, cut):
    with MetricsWriter(tmp_path, resume_from=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, [{}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with MetricsWriter(tmp_path, resume_from=20) as writer:
        writer.write(30, [{}])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        read_metrics(path)


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
