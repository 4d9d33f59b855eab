"""Sweeps: what is planned together, what a report says of known effects, and a kill in between."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from tests import helpers
from tests.helpers import logits_of, random_params, strings
from transformer import normalization
from transformer.config import RunConfig
from transformer.errors import UserError
from transformer.experiments import report, runner, sizing
from transformer.experiments.sweep import (
    Sweep,
    combined,
    grid,
    load_config,
    load_sweep,
    plan,
    slug,
    zipped,
)
from transformer.metrics import MetricsWriter
from transformer.model import Model
from transformer.model_config import ModelConfig
from transformer.workdir import Workdir, write_json

ROOT = Path(__file__).parent.parent
SMALL = "configs/ablations/small.py"
SWEEPS = sorted(
    path.stem for path in (ROOT / "configs" / "ablations").glob("*.py") if path.stem != "small"
)


def sweep_of(variants: Any, **changes: Any) -> Sweep:
    known = {"config": SMALL, "baseline": next(iter(variants)), "seeds": 2}
    return Sweep(variants=variants, **known | changes)


def test_variants_are_every_combination_or_lists_in_step():
    assert grid(model__norm=["layer", "rms"], model__layers=[1, 2]) == {
        "layer, 1": {"model.norm": "layer", "model.layers": 1},
        "layer, 2": {"model.norm": "layer", "model.layers": 2},
        "rms, 1": {"model.norm": "rms", "model.layers": 1},
        "rms, 2": {"model.norm": "rms", "model.layers": 2},
    }
    assert zipped(model__width=[32, 64], model__heads=[2, 4]) == {
        "32, 2": {"model.width": 32, "model.heads": 2},
        "64, 4": {"model.width": 64, "model.heads": 4},
    }
    named = combined({"": {}, "deep": {"model.layers": 4}}, {"rms": {"model.norm": "rms"}})
    assert list(named) == ["rms", "deep, rms"]


def test_runs_that_differ_in_numbers_alone_share_a_program():
    programs = plan(
        sweep_of(
            {
                "plain": {},
                "slow": {"optimizer.learning_rate": 1e-3},
                "dropped": {"model.dropout": 0.1, "optimizer.warmup_steps": 5},
                "rms": {"model.norm": "rms"},
            }
        ),
        most=8,
    )
    assert [len(program.members) for program in programs] == [6, 2]
    overrides = dict(programs[0].overrides)
    assert overrides == {
        "replicas": 6,
        "per_replica.seed": (0, 1, 0, 1, 0, 1),
        "per_replica.learning_rate": (4e-3, 4e-3, 1e-3, 1e-3, 4e-3, 4e-3),
        "per_replica.dropout": (0.0, 0.0, 0.0, 0.0, 0.1, 0.1),
        "per_replica.warmup_steps": (50, 50, 50, 50, 5, 5),
    }
    # Each replica is the run that the sweep asked for.
    cfg = RunConfig.resolve(programs[0].resolved())
    for k, run in enumerate(programs[0].members):
        single = cfg.replica(k)
        assert single.seed == run.seed
        assert single.optimizer.learning_rate == (1e-3 if run.variant == "slow" else 4e-3)
        assert single.model.dropout == (0.1 if run.variant == "dropped" else 0.0)
    assert dict(programs[1].overrides) == {
        "model.norm": "rms",
        "replicas": 2,
        "per_replica.seed": (0, 1),
    }


def test_programs_are_no_larger_than_asked_and_of_even_size():
    programs = plan(sweep_of({"plain": {}}, seeds=9), most=4)
    assert [len(program.members) for program in programs] == [3, 3, 3]
    assert len({program.name for program in programs}) == 3
    alone = plan(sweep_of({"plain": {}}, seeds=1), most=4)
    assert dict(alone[0].overrides) == {"seed": 0}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_shipped_sweep_can_be_planned_and_says_how_it_is_run(name):
    path = ROOT / "configs" / "ablations" / f"{name}.py"
    command = f"python scripts/sweep.py --sweep=configs/ablations/{name}.py --jobs=4"
    assert command in path.read_text()
    sweep = load_sweep(str(path))
    programs = plan(sweep, most=8)
    runs = sorted((run.variant, run.seed) for program in programs for run in program.members)
    assert runs == sorted((name, seed) for name in sweep.variants for seed in range(sweep.seeds))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"variants": {"a": {"model.nrm": "rms"}}}, r"the sweep's variant 'a': .*nrm"),
        ({"variants": {"a": {"model.norm": "rmsnorm"}}}, r"model.norm=rmsnorm: choose one of"),
        ({"variants": {"a": {"model.layers": "two"}}}, r"the sweep's variant 'a'"),
        ({"variants": {"a": {}}, "baseline": "b"}, r"baseline 'b' is none of its variants: a"),
        ({"variants": {"a": {}}, "seeds": 0}, r"seeds=0: it must be at least 1"),
        ({"variants": {"a": {}}, "config": "configs/nothing.py"}, r"there is no such file"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_explained(sweep, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(sweep_of(**sweep), most=8)
    assert "\n" not in str(caught.value)


def test_names_of_folders_are_safe_and_short():
    assert slug("layer, pre / no warm-up") == "layer_pre_no_warm_up"
    long = slug("a " * 100)
    assert len(long) < 80
    assert long != slug("a " * 101)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_matched_width_comes_nearest_to_the_parameters_wanted(cell):
    recurrent = {"model.architecture": "recurrent", "model.cell": cell}
    chosen = sizing.match_width(SMALL, recurrent)
    wanted, width = sizing.count(SMALL, {}), chosen["model.width"]
    off = {
        w: abs(sizing.count(SMALL, {**recurrent, "model.width": w}) - wanted)
        for w in range(width - 8, width + 9, 4)
    }
    assert min(off, key=lambda w: off[w]) == width
    assert off[width] < 0.06 * wanted


STEPS = (50, 100, 150)


def finished(root: Path, programs: Any, accuracy: Any, fails: str = "") -> None:
    """What `train.py` would have left, with the accuracies that a function gives."""
    for program in programs:
        if program.name == fails:
            continue
        folder = Workdir(str(root / program.name))
        folder.path.mkdir(parents=True)
        rng = np.random.default_rng(0)
        final = [accuracy(run) for run in program.members]
        folder.write_config(program.resolved(), {})
        write_json(
            folder.results,
            {
                "step": STEPS[-1],
                "devices": "1 × test",
                "parameters": 1000,
                "flops_per_step": 10**6,
                "replicas": [
                    {"seed": run.seed, "test/sequence_accuracy": value, "test/loss": 1 - value}
                    for run, value in zip(program.members, final, strict=True)
                ],
            },
        )
        replicas = len(program.members)
        by_length = [
            [{"length": n, "sequence_accuracy": value / n, "token_accuracy": value} for n in (1, 2)]
            for value in final
        ]
        for split in program.splits:
            rows = [{"by_source_length": each} for each in by_length]
            write_json(folder.path / f"eval_{split}.json", {"replicas": rows})
        with MetricsWriter(folder.path, 0, replicas) as writer:
            for i, step in enumerate(STEPS, 1):
                speed = {
                    "train/loss": 1.0,
                    "train/steps_per_second": 10.0,
                    "train/target_tokens_per_second": 100.0 + rng.random(),
                }
                writer.write(step, [speed] * replicas)
                writer.write(
                    step,
                    [{"validation/sequence_accuracy": value * i / len(STEPS)} for value in final],
                )


def reported(tmp_path, accuracy, seeds=8, **changes):
    """The report of a sweep whose runs came to the accuracies that are given."""
    variants = {"plain": {}} | {name: {"model.norm": name} for name in ("rms", "batch", "none")}
    sweep = sweep_of(variants, seeds=seeds, **changes)
    programs = plan(sweep, most=4)
    finished(tmp_path, programs, accuracy)
    path = report.make(sweep, programs, {}, tmp_path, "the command")
    return path.read_text(), json.loads((tmp_path / "report.json").read_text())


def test_a_planted_effect_is_found_and_a_planted_null_is_not(tmp_path):
    rng = np.random.default_rng(1)
    seeds = rng.normal(0.0, 0.05, size=8)  # what a seed does to all variants alike

    def accuracy(run):
        effect = {"rms": -0.04, "batch": 0.0, "none": 0.03}.get(run.variant, 0.0)
        return 0.8 + seeds[run.seed] + effect + rng.normal(0.0, 0.005)

    text, record = reported(tmp_path, accuracy)
    verdicts = {
        name: each["outcomes"]["accuracy"]["verdict"] for name, each in record["variants"].items()
    }
    assert verdicts["plain"] == "baseline"
    assert record["variants"]["rms"]["outcomes"]["loss"]["verdict"].startswith("worse by")
    assert verdicts["rms"].startswith("worse by 4 points")
    assert verdicts["none"].startswith("better by 3")
    assert verdicts["batch"].startswith("no evidence of a difference at 8 seeds; smallest")
    for words in verdicts.values():
        assert words in text
    for name in ("learning_curves.png", "forest.png"):
        assert (tmp_path / name).stat().st_size > 5_000
        assert name in text
    p = {n: each["outcomes"]["accuracy"]["p"] for n, each in record["variants"].items()}
    assert p["plain"] is None
    assert p["rms"] < 0.001 < 0.05 < p["batch"]


def test_what_is_not_reached_by_all_seeds_is_not_compared(tmp_path):
    def accuracy(run):
        return 0.4 if run.variant == "rms" and run.seed else 0.95

    text, record = reported(tmp_path, accuracy, seeds=4)
    steps = {name: each["outcomes"]["steps"] for name, each in record["variants"].items()}
    assert steps["plain"]["values"] == [150] * 4
    assert steps["rms"]["values"] == [150, None, None, None]
    assert steps["rms"]["verdict"] == "not compared: 1 of 4 seeds reach the target"
    assert steps["batch"]["verdict"] == "identical on all 4 seeds"
    assert "| rms | 150 (1/4) |" in text


def test_seconds_are_the_programs_divided_by_its_replicas(tmp_path):
    _, record = reported(tmp_path, lambda run: 0.95, seeds=4)
    own = record["variants"]["plain"]["seeds"][0]
    assert own["seconds"] == pytest.approx(150 / 10 / 4)
    assert own["tokens_per_second"] == pytest.approx(4 * 100, rel=0.01)


def test_accuracy_by_length_is_a_table_and_a_picture(tmp_path):
    text, _ = reported(tmp_path, lambda run: 0.8, seeds=2, splits=("test_longer",))
    assert "| variant | 1 | 2 |\n| --- | ---: | ---: |\n| plain | 80.0% (80.0%) | 40.0%" in text
    assert (tmp_path / "by_length_test_longer.png").stat().st_size > 5_000


def test_what_failed_is_left_out_and_named(tmp_path):
    variants = {"plain": {}, "rms": {"model.norm": "rms"}}
    sweep = sweep_of(variants)
    programs = plan(sweep, most=4)
    finished(tmp_path, programs, lambda run: 0.9, fails="rms")
    path = report.make(sweep, programs, {"rms": "killed"}, tmp_path, "the command")
    assert "Failed: rms." in path.read_text()
    assert list(json.loads((tmp_path / "report.json").read_text())["variants"]) == ["plain"]


def test_the_papers_columns_stand_beside_exact_counts():
    """Base and the rows that it prints, which all differ from ours by what its vocabulary is."""
    paper = load_sweep(str(ROOT / "configs" / "ablations" / "head_width.py")).paper
    table = report.paper_table({name: paper[name] for name in ("base, d_k 64", "d_k 16")})
    assert "| base, d_k 64 | 63,045,632 | 65M | -2.0M |" in table
    # 18 attentions, of which queries and keys are narrower by 48 in each of 8 heads.
    assert f"| d_k 16 | {63_045_632 - 18 * 2 * 512 * 8 * 48:,} |" in table


def test_done_means_this_very_config_and_all_its_splits(tmp_path):
    (program,) = plan(sweep_of({"plain": {}}), most=4)
    assert not runner.is_done(program, tmp_path / program.name)
    finished(tmp_path, [program], lambda run: 0.9)
    assert runner.is_done(program, tmp_path / program.name)
    (other,) = plan(sweep_of({"plain": {}}, overrides={"steps": 60}), most=4)
    assert not runner.is_done(other, tmp_path / program.name)
    (split,) = plan(sweep_of({"plain": {}}, splits=("test_longer",)), most=4)
    assert not runner.is_done(split, tmp_path / program.name)


def test_a_norm_is_added_in_one_place(monkeypatch):
    """A class and its line in the table: the model has it, in every placement, by its name."""

    class ScaleNorm(nnx.Module):
        """x / |x|, times one trained scalar (Nguyen and Salazar 2019)."""

        def __init__(self, width: int, *, epsilon: float):
            self.epsilon = epsilon
            self.gain = nnx.Param(jnp.full((1,), width**0.5), axes=("norm",))

        def __call__(self, x, training=None):
            norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
            return x / (norm + self.epsilon) * self.gain[...]

    monkeypatch.setitem(normalization.NORMS, "scale", ScaleNorm)
    knobs: Any = base.get_config().model
    knobs.update({"norm": "scale", "width": 16, "ff_width": 32})
    batch = strings(("abcd", "dcba"), ("x", "x"))
    for placement in ("pre", "post", "both"):
        knobs.norm_placement = placement
        model = Model(ModelConfig(**knobs), 32)
        assert model.axes["decoder/layers/0/residuals/2/norm/gain"] == ("norm",)
        logits = logits_of(model, random_params(model, 0), batch)
        assert jnp.isfinite(logits).all()
        # Later target tokens change no earlier logits: what holds for each norm holds for it.
        changed = batch._replace(target_in=batch.target_in.at[0, 2:].set(9))
        other = logits_of(model, random_params(model, 0), changed)
        np.testing.assert_array_equal(logits[0, :2], other[0, :2])


TINY_SWEEP = """
from transformer.experiments.sweep import Sweep


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides={
            "data.size": "tiny", "steps": 60, "batch_size": 16, "save_every": 20, "eval_every": 20,
            "log_every": 20, "model.width": 16, "model.heads": 2, "model.ff_width": 32,
        },
        variants={
            "layer": {"optimizer.warmup_steps": 5},
            "rms": {"model.norm": "rms", "optimizer.warmup_steps": 5},
            "late": {"optimizer.warmup_steps": 5, "data.train": "train[:0]"},
        },
        baseline="layer",
        seeds=2,
        splits=("test_longer",),
    )
"""


def start_sweep(file, workdir, data_dir):
    command = (
        *(sys.executable, "scripts/sweep.py", f"--sweep={file}", f"--workdir={workdir}"),
        *(f"--data_dir={data_dir}", "--jobs=2"),
    )
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def figures(workdir):
    """What the report says but for speeds."""
    record = json.loads((workdir / "report.json").read_text())
    for each in record["variants"].values():
        for seed in each["seeds"]:
            del seed["seconds"], seed["tokens_per_second"]
    return record["variants"]


def test_a_dry_run_prints_the_programs_and_starts_none(tmp_path, data_dir, monkeypatch, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(TINY_SWEEP)
    monkeypatch.setattr(runner, "run_all", None)
    places = (f"--sweep={file}", f"--workdir={tmp_path / 'runs'}", f"--data_dir={data_dir}")
    with helpers.program("scripts/sweep.py", *places, "--dry_run") as script:
        monkeypatch.setattr(script, "flops", lambda _: 1e9)
        script.main()
    shown = capsys.readouterr().out
    assert shown.count("python train.py") == 3
    assert shown.count("python eval.py") == 3
    assert f"--workdir={tmp_path / 'runs' / 'rms'}" in shown
    assert "6 runs in 3 programs" in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_gives_the_report_of_one_left_alone(tmp_path, data_dir):
    """And a program that cannot run, here for want of data, is named and stops no other."""
    file = tmp_path / "tiny.py"
    file.write_text(TINY_SWEEP)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, errors = (process := start_sweep(file, whole, data_dir)).communicate(timeout=300)
    assert process.returncode == 2
    assert "1 of 3 programs failed: late (error: split 'train[:0]'" in errors
    assert "Failed: late." in (whole / "report.md").read_text()
    assert list(figures(whole)) == ["layer", "rms"]

    process = start_sweep(file, killed, data_dir)
    deadline = time.monotonic() + 120
    while not (killed / "layer" / "checkpoints" / "20").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # it alone: its program notices, and stops
    process.communicate()
    assert not (killed / "report.json").exists()
    start_sweep(file, killed, data_dir).communicate(timeout=300)
    assert figures(killed) == figures(whole)

    before = (killed / "layer" / "results.json").stat().st_mtime_ns
    out, _ = start_sweep(file, killed, data_dir).communicate(timeout=300)
    assert "2 of 3 programs are done already" in out
    assert (killed / "layer" / "results.json").stat().st_mtime_ns == before


def test_the_config_of_the_shipped_sweeps_is_a_config():
    assert RunConfig.resolve(load_config(SMALL)).steps == 500
