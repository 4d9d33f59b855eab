"""Sweeps: what is compared, and which runs share a program."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.config import RunConfig, default_config, flat_knobs, load_config
from transformer.errors import UserError, check_choice
from transformer.metrics import METRICS
from transformer.modules.model import Model
from transformer.parallel.replicas import PerReplica
from transformer.workdir import Workdir

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class PaperRow:
    """A row of a published table."""

    overrides: Overrides = field(default_factory=dict)  # of `configs/vaswani_base.py`
    millions: int | None = None  # parameters that the paper prints, if any


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Variants of a config, each trained with the same seeds, and the baseline among them."""

    config: str  # path of the config file of all runs
    variants: Mapping[str, Overrides]  # name → overrides, such as `{"model.norm": "rms"}`
    baseline: str  # the variant that the others are compared with
    seeds: int  # number of seeds, from 0
    overrides: Overrides = field(default_factory=dict)  # of all runs
    target: float = 0.9  # validation sequence accuracy for "steps to the target"
    metrics: Sequence[str] = ("sequence_accuracy", "loss")  # compared on the test split
    splits: Sequence[str] = ()  # evaluated by source length as well, such as `test_longer`
    average: int = 0  # number of last checkpoints whose mean is evaluated on `splits`; 0: the last
    paper: Mapping[str, PaperRow] = field(default_factory=dict)  # rows of the published table
    note: str = ""  # text at the top of the report

    def __post_init__(self):
        check_choice(self.variants, self.baseline, "baseline")
        for name in self.metrics:
            check_choice(METRICS, name, "metrics")
        if not isinstance(self.seeds, int) or self.seeds < 1:
            raise UserError(f"seeds={self.seeds!r}: it must be a whole number, at least 1")


def grid(**axes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """All combinations: `grid(model__norm=["layer", "rms"], model__num_layers=[1, 2])`.

    `__` stands for the dot in an option's name; the variants are named `layer, 1` and so on.
    """
    return combined(*({str(x): {name: x} for x in values} for name, values in _axes(axes)))


def zipped(**axes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The first value of each list, then the second of each; named as in `grid`."""
    names, lists = zip(*_axes(axes), strict=True)
    rows = zip(*lists, strict=True)
    return {", ".join(map(str, row)): dict(zip(names, row, strict=True)) for row in rows}


def _axes(axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Sequence[Any]]]:
    for name, values in axes.items():
        if isinstance(values, str):
            raise UserError(f"{name}={values!r}: it must be a list, such as [{values!r}]")
        yield name.replace("__", "."), values


def combined(*axes: Mapping[str, Overrides]) -> dict[str, dict[str, Any]]:
    """All combinations of named variants; their names are joined by commas."""
    result = {}
    for chosen in itertools.product(*(axis.items() for axis in axes)):
        overrides = {name: value for _, each in chosen for name, value in each.items()}
        result[", ".join(name for name, _ in chosen if name)] = overrides
    return result


def load_sweep(path: str) -> Sweep:
    """The `Sweep` that `get_sweep()` of a Python file returns; see `configs/ablations`."""
    sweep = load_config(path, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(f"{path}: get_sweep() returns a {type(sweep).__name__}, not a Sweep")
    return sweep


def parameters(path: str, overrides: Overrides, vocab_size: int) -> int:
    """The number of parameters of a config file's model, by shape evaluation alone."""
    config = load_config(path)
    config.update_from_flattened_dict(dict(overrides))
    return Model(RunConfig.from_config_dict(config).model, vocab_size).count_parameters()


@dataclass(frozen=True)
class Program:
    """Runs that are trained together as the replicas of one call of `train.py`."""

    name: str  # of its folder
    config: str  # path of the config file
    overrides: Overrides  # those of the population included
    members: Sequence[tuple[str, int]]  # the variant and the seed of each replica
    splits: Sequence[str] = ()  # evaluated in addition to the test split
    average: int = 0  # see `Sweep`

    def commands(self, workdir: Path, data_dir: str | None) -> list[list[str]]:
        """The command lines of training and evaluation, without the interpreter."""
        place = [f"--workdir={workdir}"] + ([f"--data_dir={data_dir}"] if data_dir else [])
        overrides = [f"--config.{name}={_as_flag(value)}" for name, value in self.overrides.items()]
        commands = [["train.py", f"--config={self.config}", *overrides, *place]]
        if self.average:
            into = f"--into={averaged(workdir)}"
            commands.append(["scripts/average.py", *place[:1], f"--last={self.average}", into])
            place = [f"--workdir={averaged(workdir)}", f"--out={workdir}", *place[1:]]
        return commands + [["eval.py", *place, f"--split={split}"] for split in self.splits]

    def outputs(self, workdir: Path) -> list[Path]:
        """The files that training and evaluation end with."""
        evaluated = [workdir / f"eval_{split}.json" for split in self.splits]
        return [Workdir(str(workdir)).results, *evaluated]

    def resolved(self) -> Any:
        """Its config, or a UserError that names the variant."""
        config = load_config(self.config)
        try:
            config.update_from_flattened_dict(dict(self.overrides))
            RunConfig.from_config_dict(config)
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"variant {self.members[0][0]!r} of the sweep: {reason}") from error
        return config


def averaged(workdir: Path) -> Path:
    """The folder of the mean of a run's last checkpoints."""
    return workdir.with_name(f"{workdir.name}_average")


def _as_flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def plan(sweep: Sweep, max_replicas: int) -> list[Program]:
    """The programs of a sweep: runs that differ in options of `per_replica` alone share one."""
    replica_knobs = knobs_per_replica()
    groups: dict[str, list[tuple[tuple[str, int], Overrides]]] = {}
    for variant, seed in itertools.product(sweep.variants, range(sweep.seeds)):
        own = {**sweep.overrides, **sweep.variants[variant], "seed": seed}
        config = Program(variant, sweep.config, own, [(variant, seed)]).resolved()
        shared = {k: v for k, v in flat_knobs(config).items() if k not in replica_knobs}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(((variant, seed), own))
    programs: list[Program] = []
    for group in groups.values():
        size = math.ceil(len(group) / math.ceil(len(group) / max_replicas))
        for start in range(0, len(group), size):
            members, overrides = zip(*group[start : start + size], strict=True)
            name = slug(" and ".join(dict.fromkeys(variant for variant, _ in members)))
            same = sum(each.name.split("-")[0] == name for each in programs)
            name += f"-{same + 1}" * (same > 0)
            together = population(overrides, flat_knobs(load_config(sweep.config)))
            rest = sweep.splits, sweep.average
            programs.append(Program(name, sweep.config, together, members, *rest))
            programs[-1].resolved()
    return programs


def knobs_per_replica() -> dict[str, str]:
    """Each option in which replicas of one program may differ → its name in `per_replica`."""
    knobs = [each for each in flat_knobs(default_config()) if not each.startswith("per_replica.")]
    names = {name: name.rpartition(".")[2] for name in knobs}
    return {name: own for name, own in names.items() if hasattr(PerReplica, own)}


def population(members: Sequence[Overrides], defaults: Overrides) -> dict[str, Any]:
    """The overrides of the population that several runs form; those of a single run, unchanged."""
    if len(members) == 1:
        return dict(members[0])
    replica_knobs = knobs_per_replica()
    overrides = {k: v for k, v in members[0].items() if k not in replica_knobs}
    overrides["replicas"] = len(members)
    for name, own in replica_knobs.items():
        values = tuple(member.get(name, defaults[name]) for member in members)
        if len(set(values)) > 1:
            overrides[f"per_replica.{own}"] = values
        elif values[0] != defaults[name]:
            overrides[name] = values[0]
    return overrides


def slug(text: str, longest: int = 60) -> str:
    """A name for a folder; a long one is cut and ends in a digest of the whole."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") or "variant"
    if len(name) <= longest:
        return name
    return f"{name[:longest]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
