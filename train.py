"""Trains a model, or resumes training from the newest checkpoint.

python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `cli.run`: a quarter of the time of the imports

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from transformer import cli
from transformer.config import RunConfig
from transformer.console import facts, table
from transformer.inference import evaluation
from transformer.inference.decoding import GREEDY
from transformer.metrics import PRINTED
from transformer.parallel.replicas import split_replicas
from transformer.run import Run

CONFIG = config_flags.DEFINE_config_file("config", None, "A file, such as configs/toy_reverse.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/<config's name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
ALLOW_CHANGES = flags.DEFINE_bool(
    "allow_changes", False, "Resume from a checkpoint that was trained with another config."
)
PROFILE = flags.DEFINE_integer(
    "profile", 0, "Steps to write a profile of before training; 0: none.", lower_bound=0
)
cli.define_host_flags()
flags.mark_flag_as_required("config")


def main() -> None:
    """Trains, then prints the final metrics and a few outputs."""
    config = RunConfig.from_config_dict(CONFIG.value)
    cli.set_up_jax(config)
    cli.join_hosts(interruptible=True)
    flag = flags.FLAGS["config"]
    file = Path(config_flags.get_config_filename(flag))
    overrides = config_flags.get_override_values(flag)
    facts({"config": " ".join([str(file), *(f"{k}={v}" for k, v in overrides.items())])})
    run = Run(config, WORKDIR.value or f"runs/{file.stem}", data_dir=DATA_DIR.value)
    report(run, run.train(allow_changes=ALLOW_CHANGES.value, profile=PROFILE.value, exits=True))


def report(run: Run, results: Sequence[dict[str, Any]]) -> None:
    """Prints the final metrics, a few outputs, and where the files are."""
    assert run.state is not None
    show_results(f"after {run.state.taken():,} steps", results)
    show_samples(run)
    curve = run.workdir.plots / "learning_curve.png"
    facts({"results": str(run.workdir.results), "plots": str(curve)})


def show_results(title: str, results: Sequence[dict[str, Any]]) -> None:
    """Prints the final metrics; for a population, their mean, minimum and maximum."""
    over = {"": np.mean} if len(results) == 1 else {"mean": np.mean, "min": np.min, "max": np.max}
    rows = []
    for split, (word, summary) in itertools.product(("validation", "test"), over.items()):
        values = {name: [result[f"{split}/{name}"] for result in results] for name in PRINTED}
        cells = [PRINTED[name].format(float(summary(values[name]))) for name in PRINTED]
        rows.append((f"{split} {word}".strip(), *cells))
    table(title, ("split", *(name.replace("_", " ") for name in PRINTED)), rows)


def show_samples(run: Run, count: int = 3) -> None:
    """Prints what the model, or the first replica, outputs for a few sources."""
    assert run.state is not None
    validation = run.data["validation"]
    with jax.set_mesh(run.mesh):
        # A whole batch: `eval.py` decodes by the same program, which is then compiled.
        samples = validation.head(max(count, run.rows_at_once(validation, GREEDY)))
        found = run.decode(run.state.variables(), samples, GREEDY)
    found = split_replicas(found, run.config.replicas)[0]
    evaluation.show_samples(run.tokenizers, samples, found, count)


if __name__ == "__main__":
    cli.run(main)
