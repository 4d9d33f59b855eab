"""Kills a run at random moments, again and again, and compares it with one that was left alone.

Each time it is started again by the same command. What it ends with must be the same to the
last bit: every array of its checkpoints, which of them are kept and which is the best, and each
line of its metrics but for their speed. A run that ends before the last kill is followed by
another from the beginning.

Usage:
    python scripts/torture.py --kills=100
    python scripts/torture.py --kills=20 --command='train.py --config=configs/toy_copy.py'
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from transformer import cli, sharding
from transformer.checkpoint import Checkpoints
from transformer.config import RunConfig
from transformer.console import console, facts, table
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.model import Model
from transformer.training import abstract_state
from transformer.workdir import Workdir

SMALL = (
    "train.py --config=configs/toy_reverse.py --config.data.size=tiny --config.model.width=16 "
    "--config.model.heads=2 --config.model.ff_width=32 --config.model.dropout=0.1 "
    "--config.optimizer.warmup_steps=5 --config.steps=2000 --config.log_every=20 "
    "--config.eval_every=100 --config.save_every=100"
)

KILLS = flags.DEFINE_integer("kills", 100, "How often it is killed.", lower_bound=1)
COMMAND = flags.DEFINE_string("command", SMALL, "train.py and its flags, without --workdir.")
WORKDIR = flags.DEFINE_string("workdir", "runs/torture", "Takes both runs.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

ROOT = Path(__file__).parent.parent


def main() -> None:
    """One run is left alone, another is killed; then both are looked at."""
    words = cli.host_command(COMMAND.value)
    root, rng = Path(WORKDIR.value).absolute(), random.Random(SEED.value)
    shutil.rmtree(root, ignore_errors=True)
    whole, killed = root / "whole", root / "killed"
    started = time.monotonic()
    finish(start(words, whole), whole)
    duration = time.monotonic() - started
    facts({"left alone": f"{duration:.1f} s"})

    moments: Counter[str] = Counter()
    runs = 0
    while moments.total() < KILLS.value:
        process = start(words, killed)
        try:
            process.wait(rng.uniform(0.0, duration))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments[moment(killed)] += 1
            continue
        finish(process, killed)
        compare(whole, killed)
        runs += 1
        shutil.rmtree(killed)
    finish(start(words, killed), killed)
    compare(whole, killed)
    table(
        f"{KILLS.value} kills",
        ("while it was", "times"),
        [(k, str(n)) for k, n in moments.most_common()],
    )
    runs += 1
    console.print(f"{runs} run{'s' * (runs > 1)} ended as the one left alone, bit for bit")


def start(words: list[str], workdir: Path) -> subprocess.Popen:
    """The command in a process, its output in a file beside the folder."""
    more = [f"--workdir={workdir}"]
    more += [f"--data_dir={DATA_DIR.value}"] if DATA_DIR.value else []
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with log_of(workdir).open("w") as log:
        return subprocess.Popen(
            [sys.executable, *words, *more], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


def log_of(workdir: Path) -> Path:
    """What the last process in a folder has said."""
    return workdir.with_suffix(".log")


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for the end of a run, which must be a good one."""
    if process.wait() != 0:
        said = log_of(workdir).read_text().strip().splitlines() or ["nothing"]
        raise UserError(
            f"{workdir}: exit status {process.returncode}, {said[-1]}; see {log_of(workdir)}"
        )


def moment(workdir: Path) -> str:
    """What a process was doing when it was killed, from what it left."""
    checkpoints = workdir / "checkpoints"
    if "compiled" not in log_of(workdir).read_text():
        return "starting or compiling"
    if list(checkpoints.glob("*.orbax-checkpoint-tmp")):
        return "saving"
    if list(checkpoints.glob("trash/*")):
        return "deleting an old checkpoint"
    if (workdir / "results.json").exists():
        return "showing its results"
    return "training or evaluating"


def compare(whole: Path, other: Path) -> None:
    """Raises a UserError for the first difference between two finished runs."""
    for what in (metrics, kept, arrays):
        one, two = what(whole), what(other)
        for name in sorted(one.keys() | two.keys()):
            if one.get(name) != two.get(name):
                raise UserError(
                    f"{other} is not what {whole} is in its {what.__name__}: {name}; both folders "
                    "are left as they are"
                )


def metrics(workdir: Path) -> dict[str, Any]:
    """Each line of the metrics but for their speed, which none has twice, and none by half."""
    text = (workdir / "metrics.jsonl").read_text()
    found: dict[str, Any] = {"ends with a whole line": text.endswith("\n")}
    for line in text.splitlines():
        row = json.loads(line)
        row = {k: v for k, v in row.items() if not k.endswith(("per_second", "mfu"))}
        name = f"{row['step']:>9} {row.get('replica', '')} {min(row.keys() - {'step', 'replica'})}"
        found[name] = "twice" if name in found else row
    return found


def kept(workdir: Path) -> dict[str, Any]:
    """Which checkpoints there are, and which is the best."""
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        return {"all": sorted(checkpoints.manager.all_steps()), "best": checkpoints.find("best")}


def arrays(workdir: Path) -> dict[str, bytes]:
    """Every array of every checkpoint, by its name."""
    cfg = RunConfig.resolve(Workdir(str(workdir)).read_config())
    model = Model(cfg.model, open_corpus(cfg.data, DATA_DIR.value).tokenizer.vocab_size)
    like = abstract_state(model, cfg.recipe(), sharding.one_device(), cfg.replicas, cfg.numbers())
    found = {}
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        for step in checkpoints.manager.all_steps():
            leaves, _ = jax.tree_util.tree_flatten_with_path(checkpoints.restore(step, like))
            for path, leaf in leaves:
                found[f"{step} {jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    return found


if __name__ == "__main__":
    cli.run(main)
