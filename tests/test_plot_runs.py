"""`scripts/plot_runs.py`: what runs are called, what of them is printed, and what is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.helpers import program, refused
from tests.test_layout import ROOT
from transformer import cli
from transformer.config import default_config
from transformer.files import to_json
from transformer.workdir import Workdir

LOSS, ACCURACY = "validation/loss", "validation/sequence_accuracy"
RMS = {"model.norm": "rms"}


def run_of(folder, values=((1.0,), (0.5,)), metric=LOSS, **changes):
    """A run's folder with the values of its replicas for every 600 of 1,800 steps."""
    workdir, config = Workdir(str(folder)), default_config()
    config.update_from_flattened_dict(changes)
    folder.mkdir(parents=True)
    workdir.write_config(config, {})
    rows = [
        {"step": 600 * k, metric: x} | ({"replica": r} if config.replicas > 1 else {})
        for k, each in enumerate(values, 1)
        for r, x in enumerate(each)
    ]
    workdir.metrics.write_text("".join(to_json(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with program(str(ROOT / "scripts/plot_runs.py")) as module:
        yield module


def called(script, *folders):
    return script.names([member for folder in folders for member in script.read_run(folder)])


def test_runs_are_named_by_the_knobs_in_which_they_differ(script, tmp_path):
    one = run_of(tmp_path / "one", **{"optimizer.name": "sgd"}, log_every=7)
    two, three = (run_of(tmp_path / name, **RMS, seed=k) for k, name in enumerate(("two", "three")))
    assert called(script, one) == ["one"]
    assert called(script, one, two) == ["norm=layer, name=sgd", "norm=rms, name=adam"]
    assert called(script, two, three) == ["seed=0", "seed=1"]
    same = run_of(tmp_path / "below/two", **RMS, eval_every=3)
    assert called(script, two, same) == [str(two), str(same)]  # nothing differs
    assert called(script, two, same, one) == [str(two), str(same), "norm=layer, name=sgd"]
    other = run_of(tmp_path / "other", **RMS, **{"data.train": "t" * 60})
    assert called(script, one, other) == ["one", "other"]  # too long


def test_replicas_that_differ_in_a_knob_are_runs_of_their_own(script, tmp_path):
    values, rates = [(1.0, 2.0, 4.0)], {"per_replica.learning_rate": (1e-3, 2e-3, 1e-3)}
    folder = run_of(tmp_path / "a", values, replicas=3, **rates)
    slow, fast = script.read_run(folder)
    assert [row[LOSS] for row in slow.rows] == [1.0, 4.0]
    assert (slow.replicas, fast.replicas) == ([0, 2], [1])
    (same,) = script.read_run(run_of(tmp_path / "b", values, replicas=3))
    names = [f"learning_rate={x}" for x in ("0.001, seed=0 2", "0.002, seed=1", "0.004, seed=0–2")]
    assert script.names([slow, fast, same]) == names
    other = run_of(tmp_path / "c", **{"data.train": "t" * 60})
    assert called(script, folder, other) == [f"a, {names[0]}", f"a, {names[1]}", "c"]


def test_tables_and_curves_have_the_values_of_the_runs(script, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "x/one", [(0.5,), (0.25,), (0.75,)])
    # The second replica ends early, and keeps its last value.
    run_of(tmp_path / "x/two", [(1.0, 2.0), (0.5, 1.0), (0.7,)], replicas=2, **RMS)
    nan = float("nan")
    run_of(tmp_path / "x/bad", [(0.5,), (nan,)], ACCURACY, **{"model.norm": "none"})
    run_of(tmp_path / "x/new", [], seed=2)
    tables, drawn = {}, {}
    monkeypatch.setattr(script, "table", lambda title, *rows: tables.update({title: rows}))
    draw = lambda panels, *_, **__: drawn.update({each.title: each for each in panels})  # noqa: E731
    monkeypatch.setattr(script.plots, "lines", draw)
    script.main(str(tmp_path / "x"), str(tmp_path / "x/one"))
    assert "x/new: no metrics yet" in " ".join(capsys.readouterr().out.split())
    none, layer, rms = "norm=none, seed=0", "norm=layer, seed=0", "norm=rms, seed=0–1"
    (columns, final), (_, best) = tables.values()
    assert columns == ("run", "step", "loss", "sequence accuracy")
    rows = [(none, "1,200 of 1,800", "–", "nan%"), (layer, "1,800", "0.75", "–")]
    assert final == [*rows, (rms, "1,800", "0.85 (0.7–1)", "–")]
    assert [row[2:] for row in best] == [("–", "50.00%"), ("0.25", "–"), ("0.75 (0.5–1)", "–")]
    loss, accuracy = drawn["validation loss"], drawn["validation sequence accuracy"]
    assert (loss.log, loss.share, accuracy.log, accuracy.share) == ("y", False, "", True)
    steps, mean, low, high = loss.series.pop(rms)
    np.testing.assert_allclose([mean, low, high], [[1.5, 0.75, 0.85], [1, 0.5, 0.7], [2, 1, 1]])
    np.testing.assert_array_equal(loss.series.pop(layer), ([600, 1200, 1800], [0.5, 0.25, 0.75]))
    assert (steps, [*loss.series]) == ([600, 1200, 1800], [])


def test_many_runs_are_listed_once_beside_the_panels(script, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    metrics = {"0": ACCURACY}
    for k in range(12):
        run_of(tmp_path / "runs" / str(k), metric=metrics.get(str(k), LOSS), seed=k)
    script.main(str(tmp_path / "runs"))
    assert not any(axes.get_legend() for axes in saved[0].axes)
    listed = {text.get_text() for text in saved[0].legends[0].get_texts()}
    assert listed == {f"seed={k}" for k in range(12)}


def test_what_cannot_be_compared_is_a_line(script, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    run_of(tmp_path / "new", [])
    run_of(tmp_path / "plugged", plugins=("mine",))
    refused("no folder is named: python scripts/plot_runs.py", script.main)
    for name in ("missing", "empty"):
        refused(f"{name} holds no run; name", script.main, name)
    refused("new: no metrics yet", script.main, "new")
    refused("imported only if .*--plugins=mine", script.main, "plugged")
    script.main(str(run_of(tmp_path / "one")))
    assert (tmp_path / "runs.png").stat().st_size > 5_000
    monkeypatch.setattr(script, "OUT", SimpleNamespace(value="a/b.docx"))
    refused("--out=a/b.docx: Format 'docx' is not supported", script.main, "one")
    monkeypatch.setattr(script, "OUT", SimpleNamespace(value="a", default="runs.png"))
    refused("--out=a is a folder; name a file, such as runs.png", script.main, "one")


def test_folders_may_stand_before_and_after_flags(script):
    words = ["plot_runs.py", "runs/a", "--out=x.png", "runs/b"]
    assert cli.parse(words, positional=True) == ["plot_runs.py", "runs/a", "runs/b"]
    assert script.OUT.value == "x.png"
    refused("'runs/a' is not a flag", cli.parse, words)
