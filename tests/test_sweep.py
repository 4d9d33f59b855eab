import json
import shutil
from functools import partial

import numpy as np
import pytest
from lab.sweeps import Sweep, combined, grid, report, runner, zipped
from lab.sweeps.sweep import load_sweep, parameters, plan, slug

from tests import helpers
from tests.test_programs import ROOT, kill_after, start
from transformer.config import RunConfig
from transformer.training.metrics import MetricsWriter
from transformer.workdir import Workdir, write_json

SMALL = "configs/ablations/small.py"
SWEEPS = sorted({path.stem for path in ROOT.glob("configs/ablations/*.py")} - {"small"})


def sweep_of(variants, **changes):
    known = {"config": SMALL, "baseline": next(iter(variants)), "seeds": 2}
    return Sweep(variants=variants, **known | changes)


def test_variants_are_every_combination():
    assert grid(model__norm=["layer", "rms"], model__num_layers=[1, 2]) == {
        f"{norm}, {layers}": {"model.norm": norm, "model.num_layers": layers}
        for norm, layers in (("layer", 1), ("layer", 2), ("rms", 1), ("rms", 2))
    }
    named = combined({"": {}, "deep": {"model.num_layers": 4}}, {"rms": {"model.norm": "rms"}})
    assert list(named) == ["rms", "deep, rms"]
    message = r"model__norm='rms': it must be a list, such as \['rms'\]"
    helpers.refused(message, grid, model__norm="rms")
    one, two = zipped(seed=[1, 2], model__norm=["layer", "rms"]).values()
    assert (one, two) == ({"seed": 1, "model.norm": "layer"}, {"seed": 2, "model.norm": "rms"})


def test_runs_that_differ_in_numbers_alone_share_a_program():
    dropped = {"model.dropout_rate": 0.1, "optimizer.warmup_steps": 5}
    slow, rms = {"optimizer.learning_rate": 1e-3}, {"model.norm": "rms"}
    variants = {"plain": {}, "slow": slow, "dropped": dropped, "rms": rms}
    shared, alone = plan(sweep_of(variants), 8)
    assert dict(shared.overrides) == {
        "replicas": 6,
        "per_replica.seed": (0, 1, 0, 1, 0, 1),
        "per_replica.learning_rate": (4e-3, 4e-3, 1e-3, 1e-3, 4e-3, 4e-3),
        "per_replica.dropout_rate": (0.0, 0.0, 0.0, 0.0, 0.1, 0.1),
        "per_replica.warmup_steps": (50, 50, 50, 50, 5, 5),
    }
    assert dict(alone.overrides) == rms | {"replicas": 2, "per_replica.seed": (0, 1)}
    runs = RunConfig.from_config_dict(shared.resolved()).single_runs()
    for (variant, seed), run in zip(shared.members, runs, strict=True):
        rates = (1e-3 if variant == "slow" else 4e-3, 0.1 if variant == "dropped" else 0.0)
        assert (run.optimizer.learning_rate, run.model.dropout_rate) == rates
        assert run.seed == seed


def test_programs_are_no_larger_than_asked_of_even_size_and_have_safe_short_names():
    sizes = {each.name: len(each.members) for each in plan(sweep_of({"plain": {}}, seeds=9), 4)}
    assert [*sizes.values()] == [3, 3, 3]
    (alone,) = plan(sweep_of({"plain": {}}, seeds=1), 4)
    assert dict(alone.overrides) == {"seed": 0}
    assert slug("layer, pre / no warm-up") == "layer_pre_no_warm_up"
    assert slug("a " * 101) != (long := slug("a " * 100))
    assert len(long) < 80


@pytest.mark.parametrize("name", SWEEPS)
def test_every_shipped_sweep_can_be_planned_and_says_how_it_is_run(name):
    sweep = load_sweep(path := f"configs/ablations/{name}.py")
    assert f"python scripts/sweep.py --sweep={path} --jobs=4" in (ROOT / path).read_text()
    runs = [member for each in plan(sweep, 8) for member in each.members]
    assert sorted(runs) == sorted((name, k) for name in sweep.variants for k in range(sweep.seeds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"model.nrm": "rms"}}}, r"variant 'a' of the sweep: .*nrm"),
        ({"variants": {"a": {"model.norm": "rmsnorm"}}}, r"model.norm=rmsnorm: choose one of"),
        ({"variants": {"a": {"model.num_layers": "two"}}}, r"variant 'a' of the sweep"),
        ({"baseline": "b"}, r"baseline=b: choose one of a"),
        ({"seeds": 0}, r"seeds=0: it must be a whole number, at least 1"),
        ({"seeds": "2"}, r"seeds='2': it must be a whole number"),
        ({"metrics": ["los"]}, r"metrics=los: choose .* mean loss\?"),
        ({"config": "configs/nothing.py"}, r"there is no such file"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_explained(changes, message):
    changes = {"variants": {"a": {}}} | changes
    helpers.refused(message, lambda: plan(sweep_of(**changes), 8))
    message = r"small.py does not define a function get_sweep\(\)"
    helpers.refused(message, load_sweep, SMALL)


def test_the_kinds_of_the_recurrence_sweep_have_about_equal_parameters():
    """The widths of the recurrent models are those closest to the Transformer's parameters."""
    variants = load_sweep("configs/ablations/recurrence.py").variants
    kinds = {name.split(", ")[0]: each for name, each in variants.items()}
    wanted = parameters(SMALL, kinds.pop("transformer"), 32)
    for overrides in kinds.values():
        width = overrides["model.d_model"]
        sizes = [{**overrides, "model.d_model": each} for each in (width, width - 4, width + 4)]
        off = [abs(parameters(SMALL, each, 32) - wanted) for each in sizes]
        assert off[0] == min(off) < 0.06 * wanted


def finished(root, programs, accuracy=lambda variant, seed: 0.9):
    """What `train.py` would have left, with the accuracies that a function gives."""
    for program in programs:
        folder, rng = Workdir(str(root / program.name)), np.random.default_rng(0)
        (folder.checkpoints / "150").mkdir(parents=True)
        final = [accuracy(*member) for member in program.members]
        folder.write_config(program.resolved(), {})
        facts = {"devices": "1 × test", "parameters": 1000, "flops_per_step": 10**6}
        replicas = [{"test/sequence_accuracy": x, "test/loss": 1 - x} for x in final]
        write_json(folder.results, facts | {"replicas": replicas})
        for split in program.splits:
            columns = ("length", "sequence_accuracy", "token_accuracy")
            rows = [[dict(zip(columns, (n, x / n, x), strict=True)) for n in (1, 2)] for x in final]
            evaluated = {"replicas": [{"by_source_length": each} for each in rows]}
            write_json(folder.path / f"eval_{split}.json", evaluated)
        with MetricsWriter(folder.path, 0, len(final)) as writer:
            for step in (50, 100, 150):
                speed = {"train/loss": 1.0, "train/steps_per_second": 10.0}
                speed["train/target_tokens_per_second"] = 100.0 + rng.random()
                writer.write(step, [speed] * len(final))
                writer.write(step, [{report.TARGET_METRIC: x * step / 150} for x in final])


def reported(tmp_path, accuracy, seeds=8, **changes):
    """The report of a sweep whose runs came to the accuracies that are given."""
    variants = {"plain": {}} | {name: {"model.norm": name} for name in ("rms", "batch", "none")}
    sweep = sweep_of(variants, seeds=seeds, **changes)
    programs = plan(sweep, 4)
    finished(tmp_path, programs, accuracy)
    path = report.write_report(sweep, programs, {}, tmp_path, "the command")
    return path.read_text(), json.loads((tmp_path / "report.json").read_text())["variants"]


def test_a_planted_effect_is_found_and_a_planted_null_is_not(tmp_path):
    rng = np.random.default_rng(1)
    seeds = rng.normal(0.8, 0.05, size=8)  # what a seed does to all variants alike
    effects = {"plain": 0.0, "rms": -0.04, "batch": 0.0, "none": 0.03}
    draw = partial(rng.normal, scale=0.005)
    text, found = reported(tmp_path, lambda variant, seed: draw(seeds[seed] + effects[variant]))
    assert found["rms"]["outcomes"]["loss"]["verdict"].startswith("worse by")
    outcomes = {name: each["outcomes"]["sequence_accuracy"] for name, each in found.items()}
    nothing = "no evidence of a difference at 8 seeds; smallest"
    wanted = ("baseline", "worse by 4", nothing, "better by 3")
    for name, words in zip(outcomes, wanted, strict=True):
        assert outcomes[name]["verdict"].startswith(words)
        assert outcomes[name]["verdict"] in text
        if name != "plain":  # an effect that is found has its smallest detectable one beside it
            points = 100 * outcomes[name]["difference"]["detectable"]
            assert f" | {points:.2g} points | {outcomes[name]['verdict']} |" in text
    assert outcomes["rms"]["difference"]["p"] < 0.001 < 0.05 < outcomes["batch"]["difference"]["p"]


def test_of_one_seed_neither_p_nor_the_smallest_detectable_effect_is_known(tmp_path):
    text, _ = reported(tmp_path, lambda variant, seed: 0.9, seeds=1)
    assert "| rms | 90.00% | +0.00% |  |  | one seed: no verdict |" in text


def test_what_is_not_reached_by_all_seeds_is_not_compared(tmp_path):
    """And seconds are the program's divided by its replicas; each length has a column."""
    low, options = [("rms", seed) for seed in (1, 2, 3)], {"seeds": 4, "splits": ("test_longer",)}
    text, found = reported(tmp_path, lambda *run: 0.4 if run in low else 0.95, **options)
    steps = {name: each["outcomes"]["steps"] for name, each in found.items()}
    assert steps["plain"]["values"] == [150] * 4
    assert steps["rms"]["values"] == [150, None, None, None]
    assert steps["rms"]["verdict"] == "not compared: 1 of 4 seeds reach the target"
    assert steps["batch"]["verdict"] == "identical on all 4 seeds"
    assert "| rms | 150 (1/4) |" in text
    own = found["plain"]["seeds"][0]
    assert own["seconds"] == pytest.approx(150 / 10 / 4)
    assert own["tokens_per_second"] == pytest.approx(4 * 100, rel=0.01)
    assert "| variant | 1 | 2 |\n| --- | ---: | ---: |\n| plain | 95.0% (95.0%) | 47.5%" in text
    for name in ("learning_curves.png", "forest.png", "by_length_test_longer.png"):
        assert (tmp_path / name).stat().st_size > 5_000
        assert name in text


def test_the_papers_columns_stand_beside_exact_counts():
    """Base and the rows that it prints, which all differ from ours by what its vocabulary is."""
    paper = load_sweep("configs/ablations/head_width.py").paper
    table = report.paper_table({name: paper[name] for name in ("base, d_k 64", "d_k 16")})
    assert "| base, d_k 64 | 63,045,632 | 65M | -2.0M |" in table
    # 18 attentions, of which queries and keys are narrower by 48 in each of 8 heads.
    assert f"| d_k 16 | {63_045_632 - 18 * 2 * 512 * 8 * 48:,} |" in table


def test_done_means_this_very_config_and_all_its_splits_and_what_failed_is_named(tmp_path):
    sweep = sweep_of({"plain": {}, "rms": {"model.norm": "rms"}})
    (plain, rms), folder = plan(sweep, 4), tmp_path / "plain"
    assert not runner.is_done(plain, folder)
    finished(tmp_path, [plain])
    assert runner.is_done(plain, folder)
    (other,) = plan(sweep_of({"plain": {}}, splits=("test_longer",)), 4)
    assert not runner.is_done(other, folder)
    (beam,) = plan(sweep_of({"plain": {}}, overrides={"decoding.beam_size": 4}), 4)
    assert not runner.is_done(beam, folder)
    (longer,) = plan(sweep_of({"plain": {}}, overrides={"steps": 60}), 4)
    message = r"another config \(steps: \d+ → 60\); choose another --workdir"
    helpers.refused(message, runner.run_all, [longer], tmp_path, None)
    assert runner.is_done(plain, folder)  # nothing was deleted
    results = (folder / "results.json").read_text()
    (folder / "results.json").unlink()
    assert not runner.is_done(plain, folder)
    (folder / "results.json").write_text(results)
    record = (folder / "config.json").read_text()
    (folder / "config.json").write_text(record[:-9])  # its own program will say so
    assert not runner.is_done(plain, folder)
    (folder / "config.json").write_text(record)
    shutil.rmtree(folder / "checkpoints")  # to save space
    assert runner.is_done(plain, folder)
    path = report.write_report(sweep, [plain, rms], {"rms": "killed"}, tmp_path, "the command")
    assert "Failed: rms." in path.read_text()
    assert list(json.loads((tmp_path / "report.json").read_text())["variants"]) == ["plain"]


TINY_SWEEP = """
from lab.sweeps import Sweep
def get_sweep():
    every = {"save_every": 20, "eval_every": 20, "log_every": 20, "optimizer.warmup_steps": 5}
    size = {"data.size": "tiny", "model.d_model": 16, "model.num_heads": 2, "model.d_ff": 32}
    return Sweep(
        config="configs/ablations/small.py", baseline="layer", seeds=2, splits=("test_longer",),
        overrides={"steps": 60, "batch_size": 16} | every | size,
        variants={"layer": {}, "rms": {"model.norm": "rms"}, "late": {"data.train": "train[:0]"}},
    )
"""


@pytest.fixture
def words(tmp_path, data_dir):
    """`words(folder)` starts a sweep of three programs of seconds."""
    (file := tmp_path / "tiny.py").write_text(TINY_SWEEP)
    program = ("scripts/sweep.py", f"--sweep={file}", f"--data_dir={data_dir}")
    return lambda folder: (*program, f"--workdir={tmp_path / folder}")


def figures(workdir):  # but for speeds
    variants = json.loads((workdir / "report.json").read_text())["variants"]
    for seed in (seed for each in variants.values() for seed in each["seeds"]):
        del seed["seconds"], seed["tokens_per_second"]
    return variants


def test_a_dry_run_prints_the_programs_and_starts_none(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run_all", None)
    with helpers.program(*words("runs"), "--dry_run") as script:
        monkeypatch.setattr(runner.Run, "step_flops", 1e6)
        script.main()
    shown = capsys.readouterr().out
    assert shown.count("python train.py") == 3
    assert shown.count("python eval.py") == 3
    assert f"--workdir={tmp_path / 'runs' / 'rms'}" in shown
    assert "6 runs in 3 programs" in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_gives_the_report_of_one_left_alone(words, tmp_path):
    """And a program that cannot run, here for want of data, is named and stops no other."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def sweep(folder):
        return start(*words(folder), "--jobs=2", JAX_PLATFORMS="cpu")

    _, errors = (process := sweep(whole)).communicate(timeout=300)
    assert process.returncode == 2
    assert "programs failed: late (error: 'train[:0]' is not a split of" in errors
    assert "Failed: late." in (whole / "report.md").read_text()
    assert list(figures(whole)) == ["layer", "rms"]

    kill_after(sweep(killed), killed / "layer", 20)  # it alone: its program notices, and stops
    assert not (killed / "report.json").exists()
    sweep(killed).communicate(timeout=300)
    assert figures(killed) == figures(whole)

    out, _ = sweep(killed).communicate(timeout=300)
    assert "2 of 3 programs are already done" in out
