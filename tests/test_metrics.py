import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import refused
from tests.test_training import pieces, runner
from transformer.console import console
from transformer.files import to_json
from transformer.loss import cross_entropy
from transformer.metrics import is_predicted
from transformer.parallel.replicas import mean_over_replicas, split_replicas
from transformer.training import metrics as train_metrics
from transformer.training.loop import ProgressBar
from transformer.training.metrics import Interval, MetricsWriter, TrainMetric, read_metrics


def test_a_populations_sums_make_the_metrics_of_each_replica_which_are_ratios_made_once():
    table = {  # of each replica: sums, and metrics
        "train/objective": ([40.0, 20.0], [2.0, 1.0]),
        "train/loss": ([30.0, 10.0], [1.5, 0.5]),
        "train/accuracy": ([5.0, 20.0], [0.25, 1.0]),
        "train/gradient_norm": ([8.0, 4.0], [2.0, 1.0]),
        "train/learning_rate": ([2.0, 1.0], [0.5, 0.25]),
    }
    sums = {name: jnp.array(each) for name, (each, _) in table.items()}
    sums |= {"tokens": jnp.full(2, 20.0), "steps": jnp.full(2, 4.0), "skipped": jnp.zeros(2)}
    speeds = {"train/steps_per_second": 2.0, "train/target_tokens_per_second": 10.0}
    for k, part in enumerate(split_replicas(sums, 2)):
        expected = {name: values[k] for name, (_, values) in table.items()} | speeds
        assert train_metrics.finalize(Interval(part, seconds=2.0)) == expected
    assert mean_over_replicas([{"a": 1.0, "b": 3}, {"a": 2.0, "b": 5}]) == {"a": 1.5, "b": 4.0}
    assert mean_over_replicas([{"a": 1.0}]) == {"a": 1.0}


def test_a_metric_is_one_declaration(monkeypatch, tmp_path):
    new = {
        "entropy": TrainMetric(token=lambda predictions: -predictions.logits.max(-1)),
        "parameter_norm": TrainMetric(update=lambda update: optax.tree.norm(update.params)),
        "minutes": TrainMetric(host=lambda interval: interval.seconds / 60, bar="{:.0f} min"),
    }
    for name, metric in new.items():
        monkeypatch.setitem(train_metrics.TRAIN_METRICS, name, metric)
    model, config, init = pieces()
    state, sums = runner(model, config)(init(np.uint32(0)), 3)
    metrics = train_metrics.finalize(Interval(sums, seconds=120.0))
    assert metrics["train/minutes"] == 2.0
    assert metrics["train/entropy"] == pytest.approx(float(sums["train/entropy"] / sums["tokens"]))
    norm = float(optax.tree.norm(state.params))
    assert metrics["train/parameter_norm"] == pytest.approx(norm, rel=0.1)
    with ProgressBar(0, 10) as bar, console.capture() as capture:
        bar.log_interval(1, [metrics])
    assert "2 min" in capture.get()


def write(folder, steps, resume_from=0):  # step → metrics of every replica
    with MetricsWriter(folder, resume_from, len(next(iter(steps.values())))) as writer:
        for step, metrics in steps.items():
            writer.write(step, metrics)
    return folder / "metrics.jsonl"


def test_what_is_written_is_read_no_file_is_no_rows_and_a_damaged_line_is_named(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    path = write(tmp_path, {10: [{"train/loss": 2.0}], 20: [{"train/loss": 1.0}]})
    rows = [{"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}]
    assert read_metrics(path) == list(map(json.loads, path.read_text().splitlines())) == rows
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    refused("metrics.jsonl, line 2 is damaged", read_metrics, path)


def test_nan_is_null_in_the_file_and_nan_again(tmp_path):
    """As strict JSON has no NaN."""
    path = write(tmp_path, {10: [{"train/loss": float("nan")}]})
    assert path.read_text() == '{"step": 10, "train/loss": null}\n'
    (row,) = read_metrics(path)
    assert row["step"] == 10
    assert math.isnan(row["train/loss"])
    record = {"a": [1.0, float("inf")], "b": ({"c": float("-inf"), "d": "NaN"},), "e": None}
    there = {"a": [1.0, None], "b": [{"c": None, "d": "NaN"}], "e": None}
    assert json.loads(to_json(record)) == there


def test_the_events_are_those_that_tensorboard_reads(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    one, other = {"train/loss": 2.0, "train/accuracy": 0.5}, {"validation/loss": 1.0}
    write(tmp_path, {10: [one], 20: [other]}, resume_from=5)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    rest, events = path.read_bytes(), []
    while rest:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", rest[:8])
        events.append(Event.FromString(rest[12 : 12 + length]))
        rest = rest[16 + length :]
    version, start, *scalars = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (6, SessionLog.START)
    found = [{each.tag: each.simple_value for each in event.summary.value} for event in scalars]
    assert [event.step for event in scalars] == [10, 20]
    assert found == [one, other]


def test_each_replica_has_lines_and_events_of_its_own(tmp_path):
    losses = {10: (2.0, 3.0), 20: (1.0, 2.0)}
    path = write(tmp_path, {n: [{"train/loss": x} for x in each] for n, each in losses.items()})
    order = ((10, 0), (10, 1), (20, 0), (20, 1))
    rows = [{"step": n, "replica": k, "train/loss": losses[n][k]} for n, k in order]
    assert read_metrics(path) == rows
    for k in range(2):
        assert list((tmp_path / f"replica_{k}").glob("events.out.tfevents.*"))
    with MetricsWriter(tmp_path, resume_from=10, replicas=2):
        assert read_metrics(path) == rows[:2]


@pytest.mark.parametrize("cut", ["", '{"step": 30, "train/lo', '{"step": 30}'])
def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path, cut):
    path = write(tmp_path, {10: [{}], 20: [{}], 30: [{}]})
    with path.open("a") as file:
        file.write(cut)
    write(tmp_path, {30: [{}]}, resume_from=20)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]


def test_a_token_is_predicted_where_argmax_selects_it():
    rows = [[1.0, 3.0, 2.0], [3.0, 1.0, 3.0], [0.0, 0.0, 0.0], [1.0, np.nan, 2.0]]
    logits = jnp.repeat(jnp.array(rows), 4, axis=0)
    targets = jnp.tile(jnp.arange(4), len(rows))  # 3 is outside the vocabulary
    found = is_predicted(cross_entropy(logits, targets)).reshape(-1, 4)
    expected = (logits.argmax(-1) == targets).reshape(-1, 4)
    np.testing.assert_array_equal(found[:3], expected[:3])
    np.testing.assert_array_equal(found[3], 0.0)  # where a logit is NaN
