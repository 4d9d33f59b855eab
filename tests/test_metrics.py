import json

import pytest

from transformer.errors import UserError
from transformer.metrics import MetricsWriter, read_metrics, train_metrics


def test_train_metrics_are_ratios_made_once():
    sums = {"loss": 30.0, "correct": 5.0, "tokens": 20.0, "gradient_norm": 8.0, "steps": 4.0}
    assert train_metrics(sums, seconds=2.0) == {
        "train/loss": 1.5,
        "train/accuracy": 0.25,
        "train/gradient_norm": 2.0,
        "train/steps_per_second": 2.0,
        "train/target_tokens_per_second": 10.0,
    }


def test_what_is_written_is_read(tmp_path):
    with MetricsWriter(tmp_path, resume_from=0) as writer:
        writer.write(10, {"train/loss": 2.0})
        writer.write(20, {"train/loss": 1.0})
    rows = [{"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("cut", ["", '{"step": 30, "train/lo', '{"step": 30}'])
def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path, cut):
    with MetricsWriter(tmp_path, resume_from=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with MetricsWriter(tmp_path, resume_from=20) as writer:
        writer.write(30, {})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        read_metrics(path)


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
