"""The results of a sweep's runs, read from their folders."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.sweeps.sweep import Program, Sweep
from transformer.errors import explained
from transformer.files import nan_for_null
from transformer.training.metrics import read_metrics
from transformer.workdir import Workdir

TARGET_METRIC = "validation/sequence_accuracy"


@dataclass(frozen=True)
class Record:
    """The results of one seed of one variant."""

    seed: int
    outcomes: dict[str, Any]  # test metrics, and the steps to the target; None: not reached
    seconds: float | None  # of training to the target: the program's divided by its replicas
    tokens_per_second: float  # useful target tokens of this replica, times the replicas
    parameters: int
    flops_per_step: int
    curve: list[tuple[int, float]]  # step, validation sequence accuracy
    by_length: dict[str, list[tuple[int, float, float]]]  # length, sequence and token accuracy


def read_all(sweep: Sweep, programs: Iterable[Program], root: Path) -> dict[str, list[Record]]:
    """Variant → the records of its seeds in order, of finished programs."""
    found: dict[str, list[Record]] = {variant: [] for variant in sweep.variants}
    for program in programs:
        for k, (variant, seed) in enumerate(program.members):
            found[variant].append(_read(sweep, program, k, seed, root / program.name))
    return {name: sorted(each, key=lambda one: one.seed) for name, each in found.items()}


def _read(sweep: Sweep, program: Program, replica: int, seed: int, folder: Path) -> Record:
    workdir, size = Workdir(str(folder)), len(program.members)
    results = read_json(workdir.results)
    final = nan_for_null(results["replicas"][replica])
    rows = [row for row in read_metrics(workdir.metrics) if row.get("replica", 0) == replica]
    trained = [row for row in rows if "train/steps_per_second" in row]
    curve = [(row["step"], row[TARGET_METRIC]) for row in rows if TARGET_METRIC in row]
    reached = next((step for step, accuracy in curve if accuracy >= sweep.target), None)
    seconds, before = 0.0, 0
    for row in trained:
        if reached is not None and row["step"] <= reached:
            seconds += (row["step"] - before) / row["train/steps_per_second"]
            before = row["step"]
    tokens = [row["train/target_tokens_per_second"] for row in trained]
    by_length = {}
    for split in program.splits:
        evaluated = read_json(folder / f"eval_{split}.json")["replicas"][replica]
        by_length[split] = [
            (row["length"], row["sequence_accuracy"], row["token_accuracy"])
            for row in map(nan_for_null, evaluated["by_source_length"])
        ]
    return Record(
        seed=seed,
        outcomes={name: final[f"test/{name}"] for name in sweep.metrics} | {"steps": reached},
        seconds=None if reached is None else seconds / size,
        tokens_per_second=size * sum(tokens) / len(tokens),
        parameters=results["parameters"],
        flops_per_step=results["flops_per_step"],
        curve=curve,
        by_length=by_length,
    )


def read_json(path: Path) -> Any:
    """The content of a result file."""
    message = f"{path} cannot be read ({{reason}}); delete the folder and run again"
    with explained(message, OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def curve(records: Sequence[Record], seconds_per_step: float = 1.0) -> tuple[Any, ...]:
    """Steps, or seconds, and the mean, lowest and highest validation accuracy of the seeds."""
    values = np.array([[accuracy for _, accuracy in record.curve] for record in records])
    steps = [step * seconds_per_step for step, _ in records[0].curve]
    return steps, values.mean(0), values.min(0), values.max(0)
