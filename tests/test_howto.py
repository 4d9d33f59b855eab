"""The recipes of docs/howto.md, applied to a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.test_layout import ROOT

TEXT = (ROOT / "docs/howto.md").read_text()
RECIPES = dict(re.findall(r"(?ms)^## (.+?)\n(.+?)(?=^## |\Z)", TEXT))
BLOCK = re.compile(r"(?ms)^```python\n# (\S+)\n(.+?)^```\n")
TABLE = re.compile(r"(?ms)^(\w+) = \{\n    \.\.\.\n(.+?)^\}\n")
IMPORTS = re.compile(r"(?s)((?:(?:import|from) [^\n]+\n)*)(.+)")
FLAG = re.compile(r"`(--config\S+?)`")
SMALL = """data.size=tiny batch_size=8 mesh.data=1 model.d_model=16 model.d_ff=16
model.num_heads=2 steps=2 optimizer.warmup_steps=0 decode_margin=2"""


def apply(path, code):
    """Writes a block into the file that it names, as a reader would."""
    if not path.exists():
        path.write_text(code)
        return
    imports, code = IMPORTS.match(code).groups()
    text, table = path.read_text(), TABLE.search(code)
    begin = re.compile(rf"(?m)^{table[1]}\b[^\n]*= \{{")
    assert len(begin.findall(text)) == 1, f"{path} has no table {table[1]}"
    text = begin.sub(lambda found: f"{code[: table.start()]}{found[0]}\n{table[2]}", text)
    path.write_text(re.sub(r"(?m)^(?=import|from)", imports, text, count=1))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository with every recipe applied."""
    folder = tmp_path_factory.mktemp("howto")
    for name in ("transformer", "configs", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, code in BLOCK.findall(TEXT):
        apply(folder / name, code)
    return folder


def run(tree, *command):
    """Runs Python in the copy."""
    where = {"cwd": tree, "env": os.environ | {"PYTHONPATH": f"{tree}:{tree}/scripts"}}
    done = subprocess.run([sys.executable, *command], **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flags(*titles):
    """The flags that the recipes name, without a shell's quotes."""
    return [flag.replace('"', "") for title in titles for flag in FLAG.findall(RECIPES[title])]


def train(tree, data_dir, workdir, *words):
    where = (f"--workdir={workdir}", f"--data_dir={data_dir}", "--config=configs/base.py")
    small = (f"--config.{knob}" for knob in SMALL.split())
    return run(tree, "train.py", *where, *small, *words)


def test_a_recipe_is_at_most_15_lines():
    for title, text in RECIPES.items():
        assert len(re.findall(r"(?m)^(?!```).+", text)) <= 15, title


@pytest.fixture(scope="module")
def trained(tree, data_dir, tmp_path_factory):
    """The folder of a run with the new norm, position encoding, task and metrics."""
    folder = tmp_path_factory.mktemp("trained")
    chosen = flags("A norm", "A position encoding", "A task", "A metric of decoded text")
    assert len(chosen) == 4
    train(tree, data_dir, folder, *chosen)
    return folder


def test_a_run_with_the_new_parts_trains_and_logs_the_new_metric(trained):
    config = json.loads((trained / "config.json").read_text())["config"]
    assert (config["model"]["norm"], config["data"]["task"]) == ("mean_abs", "multiply")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/update_norm", "validation/top5"):
        assert [0 < row[name] < 1 for row in rows if name in row] == [True], name


@pytest.mark.slow
def test_eval_reports_the_new_text_metric(tree, trained, data_dir):
    run(tree, "eval.py", f"--workdir={trained}", f"--data_dir={data_dir}")
    (file,) = trained.glob("eval_test*.json")
    assert "length_ratio" in file.read_text()


@pytest.mark.slow
def test_the_new_dataset_trains(tree, data_dir, tmp_path):
    assert "squares" in train(tree, data_dir, tmp_path, *flags("A dataset"))


@pytest.mark.slow
def test_the_new_entries_keep_the_contract(tree):
    words = ("-m", "pytest", "-q", "-n0", "tests/test_model.py", "-k", "mean_abs or log_distance")
    run(tree, *words)


@pytest.mark.slow
def test_the_sweep_is_planned(tree, data_dir, tmp_path):
    words = ("--sweep=configs/ablations/mine.py", "--dry_run", f"--workdir={tmp_path}")
    assert "mean_abs" in run(tree, "scripts/sweep.py", *words, f"--data_dir={data_dir}")
