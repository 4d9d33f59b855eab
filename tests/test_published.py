"""Published results: the rule, the recipes, and a whole reproduction in small."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lab import published
from lab.published import FEWEST, Figure, Outcome, verdict
from lab.sweeps.sweep import plan

from tests import helpers
from tests.helpers import refused
from tests.test_programs import ROOT, complaint, finish, start
from transformer.config import default_config
from transformer.inference.text_metrics import TEXT_METRICS
from transformer.training.metrics import MetricsWriter
from transformer.workdir import Workdir, write_json

NAMES = published.names()
WORDS = ("one", "two", "thr@@ ee", "fo@@ ur", "five", "six", "se@@ v@@ en", "eight")
RECIPE, BLEU = default_config(), {"value": 41.02, "margin": 0.5}


def outcome(values, low=None, high=None, validation=100.0, **changes):
    """What runs with these values gave."""
    low, high = (np.mean(values) if x is None else x for x in (low, high))
    curve = {name: [1.0, 2.0] for name in ("step", "mean", "min", "max")}
    seeds, fits = range(len(values)), [validation] * (len(values) - 1) + [100.0]
    config = default_config()
    config.update_from_flattened_dict(changes)
    rest = curve, config.to_dict()
    return Outcome(seeds, values, low, high, "", fits, [7] * len(values), 0.5, *rest)


def answer_to(figure, *given, **changes):
    return verdict(Figure(**figure), outcome(*given, **changes), RECIPE)


@pytest.mark.parametrize(
    ("figure", "values", "answer"),
    [
        (BLEU, [40.6, 40.5, 40.7], "reproduced"),
        (BLEU, [40.5, 40.4, 40.6], "not reproduced"),
        (BLEU, [43.0, 43.1, 43.2], "reproduced"),
        (BLEU, [42.0, 40.0, 41.0], "inconclusive: the interval is wider"),
        ({"value": 31, "margin": 1, "better": -1}, [31.9, 32.0, 31.8], "reproduced"),
        ({"value": 31, "margin": 1, "better": -1}, [32.1, 32.2, 32.0], "not reproduced"),
        ({"value": 31, "margin": 1, "better": -1}, [20.0, 20.0, 20.0], "reproduced"),
        ({"value": 31, "margin": 1, "better": -1}, [31.0, 31.0], "inconclusive: 2 of at least 3"),
        ({"value": 0, "margin": 5, "better": -1}, [4.9, 5.0, 5.1], "reproduced"),
        ({"value": 0, "margin": 5, "better": -1}, [5.9, 6.0, 6.1], "not reproduced"),
    ],
)
def test_the_verdict_is_by_the_margin_and_the_interval(figure, values, answer):
    assert answer_to(figure, values).startswith(answer)


def test_the_wider_interval_counts_over_seeds_or_over_test_items():
    values = [50.0, 50.1, 50.2]
    of_items, of_seeds = outcome(values, 49.0, 51.3), outcome(values, 50.0, 50.2)
    assert (of_items.interval().low, of_items.interval().high) == (49.0, 51.3)
    # t(2) = 4.303 standard errors of 0.1 / √3.
    assert of_seeds.interval().high == pytest.approx(50.1 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    figure = Figure(value=50, margin=1)
    assert verdict(figure, of_seeds, RECIPE) == "reproduced"
    assert verdict(figure, of_items, RECIPE) == "inconclusive: the interval is wider than 2"


def test_a_failure_counts_only_of_a_model_that_has_learned_its_training_distribution():
    figure = {"value": 0, "margin": 5, "better": -1, "learned": 95}
    assert answer_to(figure, [0.0] * 3, validation=95.0) == "reproduced"
    answer = "inconclusive: validation accuracy 94.0, and 95 is needed"
    assert answer_to(figure, [0.0] * 3, validation=94.0) == answer
    assert answer_to(figure, [0.0] * 3, validation=np.nan) == "inconclusive: a seed diverged"
    assert answer_to(figure, [0.0, 0.0, np.nan]) == "inconclusive: a seed diverged"


def test_a_result_of_another_recipe_or_of_fewer_updates_does_not_count_as_the_recipes():
    figure, steps = {"value": 50, "margin": 1}, RECIPE.steps
    answer = f"inconclusive: of another recipe (batch_size: 7 → {RECIPE.batch_size})"
    assert answer_to(figure, [50.0] * 3, batch_size=7, log_every=7) == answer
    assert answer_to(figure, [48.0] * 3, steps=steps) == "not reproduced"
    fewer, more = {"steps": steps - 1}, {"steps": steps + 1}
    assert answer_to(figure, [48.0] * 3, **fewer).startswith("inconclusive: fewer updates")
    assert answer_to(figure, [50.0] * 3, **fewer) == "reproduced"
    failed = {"value": 0, "margin": 5, "better": -1, "learned": 95}
    assert answer_to(failed, [0.0] * 3, **fewer).startswith("inconclusive: fewer updates")
    assert answer_to(figure, [50.0] * 3, **more).startswith("inconclusive: of another recipe")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid_and_has_what_its_figures_need(name):
    result, path = published.load(name)
    assert f"python scripts/reproduce.py {name}" in (ROOT / path).read_text()
    result.check(path, {})
    assert result.seeds >= FEWEST
    for figure in result.figures.values():
        assert figure.margin in (0.5, 1, 5)
        # A published failure is of a model that has learned.
        if figure.better != TEXT_METRICS[result.metric.split(",")[0]].better:
            assert figure.learned
    programs = plan(result.sweep(path, {}), 1)
    assert len(programs) == len(result.figures) * result.seeds


def test_the_hours_of_a_seed_are_measured_or_estimated():
    flops = 2 * 3600 * published.GPU_RATE
    result = replace(published.load("scan_simple")[0], flops=flops)
    estimated = f"{flops / published.CPU_RATE / 3600:.0f} on 2 CPU cores, 2 on a GPU"
    assert result.hours(10, None) == estimated
    record = {"devices": "1 × cpu", "outcomes": {"a": outcome([1.0])}}  # 0.5 s an update
    assert result.hours(14_400, record) == f"{estimated}; measured: 2 on 1 × cpu"


def test_programs_average_before_they_evaluate(tmp_path):
    result, path = published.load("multi30k")
    (program, *_), small = plan(result.sweep(path, {"steps": 3000}, 1), 1), tmp_path / "small"
    train, average, evaluate = program.commands(small, None)
    assert "--config.steps=3000" in train
    assert average[1:] == [f"--workdir={small}", "--last=10", f"--into={small}_average"]
    assert evaluate[1:3] == [f"--workdir={small}_average", f"--out={small}"]


def finished(root, programs, metric, values):
    """What the programs would have left, with these values of the seeds."""
    for program, value in zip(programs, values, strict=True):
        folder = Workdir(str(root / program.name))
        (folder.checkpoints / "20").mkdir(parents=True)
        folder.write_config(program.resolved(), {})
        validation = {"validation/sequence_accuracy": 0.99}
        write_json(folder.results, {"devices": "1 × test", "replicas": [validation]})
        score = {"value": value, "low": value - 0.1, "high": value + 0.1, "signature": "v:1"}
        evaluated = {"step": 20, "replicas": [{"text": {metric: score}}]}
        write_json(folder.path / "eval_test.json", evaluated)
        with MetricsWriter(folder.path, 0, 1) as writer:
            for step in (10, 20):
                writer.write(step, [{"train/steps_per_second": 2.0}])
                writer.write(step, [{"validation/loss": value / step}])


def test_the_page_states_what_was_run_and_what_was_not(tmp_path):
    result, path = published.load("scan_length")
    programs = plan(result.sweep(path, {}, 3), 1)
    finished(tmp_path / "runs", programs, "exact_match", [1.0, 2.0, 1.5, 99.0, 99.5, 98.9])
    recipes = result.recipes(path, {})
    record = published.write_record(result, recipes, programs, tmp_path / "runs", "the command")
    absolute, relative = (record["outcomes"][name] for name in result.figures)
    assert (list(absolute.values), list(relative.values)) == ([1.0, 2.0, 1.5], [99.0, 99.5, 98.9])
    assert absolute.seconds_per_update == 0.5
    curve = {name: pytest.approx(each) for name, each in absolute.curve.items()}
    assert curve == {"step": [10, 20], "mean": [0.15, 0.075], "min": [0.1, 0.05], "max": [0.2, 0.1]}
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(tmp_path / "runs" / "published.json", folder / "scan_length.json")
    page = published.write_page(folder).read_text()
    assert (folder / "scan_length.png").exists()
    rows = re.findall(r"^\| (scan_length, \w+) \|.*\| ([^|]*) \| ([^|]*) \|$", page, re.M)
    assert rows == [(f"scan_length, {x}", "20 of 50,000", "reproduced") for x in result.figures]
    assert page.count("Not run here.") == len(NAMES) - 1
    assert "Signature: `v:1`" in page


def test_replicas_of_a_program_belong_to_their_own_variants(tmp_path):
    result, path = published.load("scan_length")
    rates = {name: Figure(value=0, margin=5, overrides={"optimizer.learning_rate": rate})
             for name, rate in (("slow", 1e-4), ("fast", 1e-3))}  # fmt: skip
    result = replace(result, figures=rates)
    (program,) = plan(result.sweep(path, {}, 2), 4)
    folder = Workdir(str(tmp_path / program.name))
    folder.path.mkdir(parents=True)
    folder.write_config(program.resolved(), {})
    validation = [{"validation/sequence_accuracy": 0.1 * k} for k in range(4)]
    write_json(folder.results, {"devices": "1 × test", "replicas": validation})
    scores = [{"value": k, "low": k, "high": k, "signature": ""} for k in range(4)]
    texts = [{"text": {"exact_match": score}} for score in scores]
    write_json(folder.path / "eval_test.json", {"step": 20, "replicas": texts})
    with MetricsWriter(folder.path, 0, 4) as writer:
        writer.write(
            10, [{"validation/loss": float(k), "train/steps_per_second": 1.0} for k in range(4)]
        )
    recipes = result.recipes(path, {})
    record = published.write_record(result, recipes, [program], tmp_path, "the command")
    outcomes = record["outcomes"]
    assert program.members == (("slow", 0), ("slow", 1), ("fast", 0), ("fast", 1))
    assert [outcomes[name].values for name in rates] == [[0, 1], [2, 3]]
    assert [outcomes[name].curve["mean"] for name in rates] == [[0.5], [2.5]]
    assert outcomes["fast"].validation == pytest.approx([20, 30])
    assert outcomes["fast"].seconds_per_update == 0.25  # of one of four replicas
    assert outcomes["fast"].config["optimizer"]["learning_rate"] == 1e-3


def test_mistakes_are_explained():
    refused("name=scan_simpl: choose .* mean scan_simple", published.load, "scan_simpl")
    refused("nothing.py: there is no such file", published.load, "nothing.py")
    refused(r"small.py does not define a function get_published\(\)", published.load,
            "configs/ablations/small.py")  # fmt: skip
    result, path = published.load("multi30k")
    message = "average=10 checkpoints, and there will be 9: raise steps"
    refused(message, result.check, path, {"steps": 539, "optimizer.warmup_steps": 0})
    refused("metric=blue: choose .* mean bleu", replace(result, metric="blue").check, path,
            {"data.metrics": ("bleu",)})  # fmt: skip
    refused("give at least one", replace, result, figures={})


EMPTY = json.dumps(dict.fromkeys(published.RECORD, "") | {"outcomes": {}})


@pytest.mark.parametrize("text", [EMPTY, '{"outcomes": {"a": 1}}', "[]", "no JSON"])
def test_a_damaged_record_is_named(text, tmp_path):
    (tmp_path / "scan_jump.json").write_text(text)
    refused("scan_jump.json (is damaged|cannot be read)", published.saved, tmp_path, "scan_jump")


def test_the_page_in_the_repository_is_that_of_its_records(tmp_path):
    results = ROOT / "docs/results/published"
    shutil.copytree(results, tmp_path / "published")
    page = published.write_page(tmp_path / "published").read_text()
    assert page == results.with_suffix(".md").read_text()


def test_a_seed_that_diverged_is_kept_in_the_record(tmp_path):
    result, path = published.load("scan_jump")
    programs, runs = plan(result.sweep(path, {}, 3), 1), tmp_path / "runs"
    finished(runs, programs, "exact_match", [0.0, 0.0, math.nan])
    record = published.write_record(result, result.recipes(path, {}), programs, runs, "a command")
    assert np.isnan(record["outcomes"]["absolute"].values[2])
    ((*_, answer),) = published.summary("scan_jump", result, path, record)
    assert answer == "inconclusive: a seed diverged"
    shutil.copy(runs / "published.json", tmp_path / "scan_jump.json")
    assert "0.00, 0.00, nan" in published.write_page(tmp_path).read_text()


def numbers(folder: Path, name: str, count: int) -> None:
    """Writes parallel text in BPE pieces: a target is its source in reverse order."""
    rng = random.Random(name)
    lines = [[rng.choice(WORDS) for _ in range(rng.randint(4, 9))] for _ in range(count)]
    sides = {"de": lines, "en": [line[::-1] for line in lines]}
    for side, own in sides.items():
        text = "\n".join(map(" ".join, own)) + "\n"
        (folder / f"{name}.{side}").write_text(text, encoding="utf-8")


SMALL = """
from pathlib import Path
from transformer.config import load_config

FILE = {file!r}

def get_config():
    config = load_config(FILE)
    for name, own in {{"train": "train", "validation": "valid", "test": "test"}}.items():
        config.data[name] = f"{folder}/{{own}}.de,{folder}/{{own}}.en"
    config.model.num_layers, config.model.d_model, config.model.d_ff = 1, 32, 64
    config.batch_size, config.data.pack_length = 16, 32
    config.eval_every = config.save_every = 20
    config.optimizer.warmup_steps = 50
    return config

def get_published():
    from lab.published import Figure, Published

    return Published(
        task="numbers", source="a test", data="here", metric="joined_bleu",
        figures={{"small": Figure(value=0, margin=0.5)}}, average=2, flops=1e12,
    )
"""


@pytest.mark.slow
def test_iwslt14_runs_200_steps_on_a_corpus_in_its_format_and_resumes(tmp_path):
    for name, count in (("train", 400), ("valid", 40), ("test", 40)):
        numbers(tmp_path, name, count)
    file = tmp_path / "numbers.py"
    file.write_text(SMALL.format(file=str(ROOT / "configs/published/iwslt14.py"), folder=tmp_path))
    command = ["scripts/reproduce.py", str(file), "--steps=200", "--seeds=1"]
    command += [f"--workdir={tmp_path}/runs", f"--data_dir={tmp_path}/data"]
    dry = finish(start(*command, "--dry_run"))
    assert dry.count("python train.py") == 1
    first = finish(start(*command))
    assert "inconclusive: 1 of at least 3 seeds" in first
    assert "200 of 50,000" in first
    again = finish(start(*command))
    assert "1 of 1 programs are already done" in again
    assert "joined_bleu" in again
    record = json.loads((tmp_path / "runs" / "published.json").read_text())
    assert record["outcomes"]["small"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:none")


def test_a_missing_corpus_ends_in_one_line_that_says_where_it_comes_from(tmp_path):
    text = (ROOT / "configs/published/multi30k.py").read_text()
    (file := tmp_path / "own.py").write_text(text.replace("corpus/multi30k", "corpus/nowhere"))
    message = complaint("scripts/reproduce.py", str(file), f"--workdir={tmp_path}/runs")
    assert "corpus/nowhere/train.en: there is no such file; get it from github.com/Liv" in message


def test_what_would_spoil_a_result_is_refused_before_the_training(tmp_path):
    result, path = published.load("scan_jump")
    programs = plan(result.sweep(path, {}, 4), 1)
    finished(tmp_path, programs, "exact_match", [0.0] * 4)
    published.write_record(result, result.recipes(path, {}), programs, tmp_path, "a command")
    command = ("scripts/reproduce.py", f"--workdir={tmp_path}")
    with helpers.program(*command, "--seeds=3") as script:
        refused("--seeds=3 .* holds a result of 4 seeds", script.main, "scan_jump")
    with helpers.program(*command, "--seeds=4", "--steps=20") as script:
        refused("--steps=20: .* and 5000 steps", script.main, "scan_jump")
    with helpers.program(*command, "--seeds=4", "--steps=6000") as script:
        refused(r"another config \(steps: 5000 → 6000\)", script.main, "scan_jump")
    publish = f"--publish={ROOT / 'docs/results/published'}"
    with helpers.program(command[0], f"--workdir={tmp_path}/new", "--steps=20", publish) as script:
        refused("scan_jump.json holds .* and 5000 steps", script.main, "scan_jump")
    shutil.copy(ROOT / path, own := tmp_path / "scan_jump.py")
    with helpers.program(*command, f"--publish={tmp_path}") as script:
        refused("only results in configs/published have a page", script.main, str(own))


def test_the_list_has_every_result_with_its_cost_and_verdict(capsys):
    with helpers.program("scripts/reproduce.py", "--list") as script:
        script.main()
    said = capsys.readouterr().out
    assert all(said.count(name) >= 2 for name in NAMES)
    assert "on 2 CPU cores" in " ".join(said.split())


def test_published_results_need_a_published(tmp_path):
    (file := tmp_path / "own.py").write_text("def get_published():\n    return 1\n")
    refused(r"get_published\(\) returns no Published", published.load, str(file))
