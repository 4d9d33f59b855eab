"""`scripts/plot_runs.py`: what runs are called, what of them is printed, and what is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.helpers import program, refused
from transformer import cli
from transformer.config import default_config
from transformer.files import to_json
from transformer.workdir import Workdir

SCRIPT = "scripts/plot_runs.py"
LOSS, ACCURACY = "validation/loss", "validation/sequence_accuracy"


def run_of(folder, values=(1.0, 0.5), metric=LOSS, **changes):
    """A run's folder with a value of each replica for every 20 steps; None: no row."""
    workdir, config = Workdir(str(folder)), default_config()
    config.update_from_flattened_dict({k.replace("__", "."): x for k, x in changes.items()})
    folder.mkdir(parents=True)
    workdir.write_config(config, {})
    rows = []
    for k, each in enumerate(values):
        each = each if isinstance(each, tuple) else (each,)
        replicas = [{"replica": r} for r in range(len(each))] if config.replicas > 1 else [{}]
        step = {"step": 20 * k + 20}
        rows += [
            step | r | {metric: x} for r, x in zip(replicas, each, strict=True) if x is not None
        ]
    workdir.metrics.write_text("".join(to_json(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with program(cli.__file__.replace("transformer/cli.py", SCRIPT)) as module:
        yield module


def called(script, *folders):
    return script.names([member for folder in folders for member in script.read_run(folder)])


def test_runs_are_named_by_the_knobs_in_which_they_differ(script, tmp_path):
    one = run_of(tmp_path / "one", optimizer__name="sgd", log_every=7)
    two = run_of(tmp_path / "two", model__norm="rms")
    three = run_of(
        tmp_path / "three", model__dropout_rate=0.1, per_replica__seed=(4, 6), replicas=2
    )
    assert called(script, one, two) == ["norm=layer, name=sgd", "norm=rms, name=adam"]
    assert called(script, two, three) == [
        "dropout_rate=0.0, norm=rms, seed=0",
        "dropout_rate=0.1, norm=layer, seed=4 6",
    ]
    same = run_of(tmp_path / "below" / "two", model__norm="rms", eval_every=3)
    assert called(script, one) == ["one"]
    assert called(script, two, same) == [str(two), str(same)]  # nothing differs
    other = run_of(tmp_path / "other", data__train="t" * 60, model__norm="rms")
    assert called(script, one, other) == ["one", "other"]  # too long
    assert called(script, one, two, run_of(tmp_path / "four", model__norm="rms", seed=1))[1:] == [
        "norm=rms, name=adam, seed=0",
        "norm=rms, name=adam, seed=1",
    ]


def test_replicas_that_differ_in_a_knob_are_runs_of_their_own(script, tmp_path):
    rates = (1e-3, 2e-3, 1e-3)
    values = [(1.0, 2.0, 4.0)]
    folder = run_of(tmp_path / "a", values, replicas=3, per_replica__learning_rate=rates)
    slow, fast = script.read_run(folder)
    assert [row[LOSS] for row in slow.rows] == [1.0, 4.0]
    assert (slow.knobs["seed"], fast.knobs["seed"]) == ((0, 2), (1,))
    (same,) = script.read_run(run_of(tmp_path / "b", values, replicas=3))
    assert script.names([slow, fast]) == [
        "learning_rate=0.001, seed=0 2",
        "learning_rate=0.002, seed=1",
    ]
    other = run_of(tmp_path / "c", data__train="t" * 60)
    assert called(script, folder, other)[1:] == ["a, learning_rate=0.002, seed=1", "c"]
    assert script.names([same, fast])[0] == "learning_rate=0.004, seed=0–2"


def shown(script, monkeypatch, *folders):
    """Title → rows of the tables that are printed, and title → panel of those that are drawn."""
    tables, drawn = {}, {}
    monkeypatch.setattr(
        script, "table", lambda title, *columns_rows: tables.update({title: columns_rows})
    )
    monkeypatch.setattr(
        script.plots, "lines", lambda panels, *_, **__: drawn.update({x.title: x for x in panels})
    )
    script.main(*map(str, folders))
    return tables, drawn


def test_tables_and_curves_have_the_values_of_the_runs(script, tmp_path, monkeypatch, capsys):
    root = tmp_path / "sweep"
    run_of(root / "one", [0.5, 0.25, 0.75], steps=60)
    run_of(root / "two", [(1.0, 2.0), (0.5, 1.0), (0.7, None)], replicas=2, model__norm="rms")
    run_of(root / "bad", [float("nan"), 0.5, float("nan")], seed=1, metric=ACCURACY)
    run_of(root / "new", [], seed=2)
    tables, drawn = shown(script, monkeypatch, root, root / "one")
    assert "sweep/new: no metrics yet" in " ".join(capsys.readouterr().out.split())
    columns, final = tables["final metrics"]
    assert columns == ("run", "step", "loss", "sequence accuracy")
    bad, one, two = (
        f"norm={x}"
        for x in (
            "layer, steps=1800, seed=1",
            "layer, steps=60, seed=0",
            "rms, steps=1800, seed=0–1",
        )
    )
    assert {row[0]: row[1:] for row in final} == {
        bad: ("60 of 1,800", "–", "nan%"),
        one: ("60", "0.75", "–"),
        two: ("60 of 1,800", "0.85 (0.7–1)", "–"),
    }
    _, best = tables["best metrics, each by itself"]
    assert {row[0]: row[2:] for row in best} == {
        bad: ("–", "50.00%"),
        one: ("0.25", "–"),
        two: ("0.75 (0.5–1)", "–"),
    }
    assert drawn.keys() == {"validation loss", "validation sequence accuracy"}
    assert (drawn["validation loss"].log, drawn["validation sequence accuracy"].share) == (
        "y",
        True,
    )
    series = drawn["validation loss"].series
    assert series.keys() == {one, two}
    np.testing.assert_array_equal(series[one], ([20, 40, 60], [0.5, 0.25, 0.75]))
    # The second replica has ended early, and keeps its last value.
    low, high = [1.0, 0.5, 0.7], [2.0, 1.0, 1.0]
    np.testing.assert_allclose(series[two], ([20, 40, 60], [1.5, 0.75, 0.85], low, high))


def test_many_runs_are_listed_once_beside_the_panels(script, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    for k in range(12):
        folder = run_of(tmp_path / "runs" / str(k), [1.0 + k, 0.5], seed=k)
        with Workdir(str(folder)).metrics.open("a") as log:
            log.write('{"step": 10, "train/loss": 1.0}\n')
    script.main(str(tmp_path / "runs"))
    (figure,) = saved
    assert not any(axes.get_legend() for axes in figure.axes)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"seed={k}" for k in (0, 1, 10, 11, *range(2, 10))]


def test_what_cannot_be_compared_is_a_line(script, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    new, plugged = run_of(tmp_path / "new", []), run_of(tmp_path / "plugged", plugins=("mine",))
    refused("no folder is named: python scripts/plot_runs.py", script.main)
    for name in ("missing", "empty"):
        refused(f"{name} holds no run; name", script.main, str(tmp_path / name))
    refused("new: no metrics yet", script.main, str(new))
    refused("imported only if .*--plugins=mine", script.main, str(plugged))
    one = run_of(tmp_path / "one")
    script.main(str(one))
    assert (tmp_path / "runs.png").stat().st_size > 5_000
    monkeypatch.setattr(script, "OUT", SimpleNamespace(value="a/b.docx"))
    refused("--out=a/b.docx: Format 'docx' is not supported", script.main, str(one))


def test_folders_may_stand_before_and_after_flags(script):
    words = [SCRIPT, "runs/a", "--out=x.png", "runs/b"]
    assert cli.parse(words, positional=True) == [SCRIPT, "runs/a", "runs/b"]
    assert script.OUT.value == "x.png"
    refused("'runs/a' is not a flag", cli.parse, words)
