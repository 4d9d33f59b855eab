"""What a sweep file says, and how its runs are put together into programs.

A sweep file is a Python file with a function `get_sweep() -> Sweep`; see `configs/ablations`.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from transformer.config import RunConfig, flat_knobs, load_config
from transformer.errors import UserError, nearest

Overrides = Mapping[str, Any]

# The knobs in which replicas of one program may differ, and their names in `per_replica`.
REPLICA_KNOBS = {
    "seed": "seed",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.warmup_steps": "warmup_steps",
    "optimizer.weight_decay": "weight_decay",
    "label_smoothing": "label_smoothing",
    "model.dropout_rate": "dropout_rate",
    "model.attention_dropout_rate": "attention_dropout_rate",
}


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of a published table: what it changes at the paper's size, and its column.

    overrides: of `configs/vaswani_base.py`.
    millions: the parameters that the paper prints, where it does.
    """

    overrides: Overrides = field(default_factory=dict)
    millions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is compared.

    config: the config file that every run starts from.
    variants: name → what it changes, `{"model.norm": "rms"}`.
    baseline: the variant that the others are compared with.
    seeds: how many, from 0; the same for each variant, so that runs pair.
    overrides: what all runs change.
    target: the validation sequence accuracy of "to the target".
    splits: evaluated by source length besides the test split, such as `test_longer`.
    paper: name → row of the published table that the sweep is a small copy of.
    note: sentences for the top of the report.
    """

    config: str
    variants: Mapping[str, Overrides]
    baseline: str
    seeds: int
    overrides: Overrides = field(default_factory=dict)
    target: float = 0.9
    splits: Sequence[str] = ()
    paper: Mapping[str, PaperRow] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self):
        if self.baseline not in self.variants:
            raise UserError(
                f"the sweep's baseline {self.baseline!r} is none of its variants: "
                f"{', '.join(self.variants)}{nearest(self.baseline, self.variants)}"
            )
        if self.seeds < 1:
            raise UserError(f"the sweep has seeds={self.seeds}: it must be at least 1")


def grid(**axes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Every combination: `grid(model__norm=["layer", "rms"], model__num_layers=[1, 2])`.

    `__` stands for the dot of a knob's name; variants are called `layer, 1` and so on.
    """
    return combined(
        *({str(value): {knob(name): value} for value in values} for name, values in axes.items())
    )


def zipped(**axes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The first of each list together, then the second of each: lists of one length."""
    names = [knob(name) for name in axes]
    return {
        ", ".join(map(str, values)): dict(zip(names, values, strict=True))
        for values in zip(*axes.values(), strict=True)
    }


def combined(*axes: Mapping[str, Overrides]) -> dict[str, dict[str, Any]]:
    """Every combination of named variants, their names joined by commas."""
    result = {}
    for chosen in itertools.product(*(axis.items() for axis in axes)):
        overrides: dict[str, Any] = {}
        for _, each in chosen:
            overrides |= each
        result[", ".join(name for name, _ in chosen if name)] = overrides
    return result


def knob(name: str) -> str:
    """`model__norm` → `model.norm`"""
    return name.replace("__", ".")


@dataclass(frozen=True)
class Run:
    """One seed of one variant."""

    variant: str
    seed: int


@dataclass(frozen=True)
class Program:
    """Runs that are trained together, as one call of `train.py`.

    name: of its folder.
    config: the config file.
    overrides: of it, the population's included.
    members: the run that each replica is, in order.
    splits: to be evaluated besides.
    """

    name: str
    config: str
    overrides: Overrides
    members: tuple[Run, ...]
    splits: tuple[str, ...]

    def commands(self, workdir: Path, data_dir: str | None) -> list[list[str]]:
        """The command lines that carry it out, without the interpreter."""
        place = [f"--workdir={workdir}"] + ([f"--data_dir={data_dir}"] if data_dir else [])
        overrides = [f"--config.{name}={written(value)}" for name, value in self.overrides.items()]
        train = ["train.py", f"--config={self.config}", *overrides, *place]
        return [train, *(["eval.py", *place, f"--split={split}"] for split in self.splits)]

    def resolved(self) -> Any:
        """The config that it runs with.

        Raises:
          UserError: an override is unknown, ill-typed or contradicts another.
        """
        config = load_config(self.config)
        try:
            config.update_from_flattened_dict(dict(self.overrides))
            RunConfig.from_config_dict(config)
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the sweep's variant {self.members[0].variant!r}: {reason}") from error
        return config


def written(value: Any) -> str:
    """A value as a flag takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def load_sweep(path: str) -> Sweep:
    """What the `get_sweep` of a sweep file gives.

    Raises:
      UserError: there is no such file, or it fails.
    """
    sweep = load_config(path, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(f"{path}: get_sweep() gives a {type(sweep).__name__} and not a Sweep")
    return sweep


def plan(sweep: Sweep, most: int) -> list[Program]:
    """The programs that carry out a sweep: runs that can share one do.

    Runs can share a program if they differ in nothing but `REPLICA_KNOBS`.

    Args:
      sweep: what is compared.
      most: replicas a program may have.

    Raises:
      UserError: a variant's overrides are unknown or contradict each other.
    """
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for variant, overrides in sweep.variants.items():
        for seed in range(sweep.seeds):
            run = Run(variant, seed)
            own = {**sweep.overrides, **overrides, "seed": seed}
            alone = Program(variant, sweep.config, own, (run,), ()).resolved()
            shared = {k: v for k, v in flat_knobs(alone).items() if k not in REPLICA_KNOBS}
            groups.setdefault(json.dumps(shared, sort_keys=True), []).append((run, own))
    programs, names = [], set()
    for group in groups.values():
        chunks = math.ceil(len(group) / most)
        size = math.ceil(len(group) / chunks)
        for start in range(0, len(group), size):
            members = group[start : start + size]
            variants = dict.fromkeys(run.variant for run, _ in members)
            name = slug(" and ".join(variants))
            while name in names:
                name += "-more"
            names.add(name)
            programs.append(
                Program(
                    name,
                    sweep.config,
                    together([own for _, own in members], load_config(sweep.config)),
                    tuple(run for run, _ in members),
                    tuple(sweep.splits),
                )
            )
    for program in programs:
        program.resolved()
    return programs


def together(members: Sequence[Overrides], base: ConfigDict) -> dict[str, Any]:
    """The overrides of the population that several runs make; of one run, its own."""
    if len(members) == 1:
        return dict(members[0])
    defaults = flat_knobs(base)
    overrides = {k: v for k, v in members[0].items() if k not in REPLICA_KNOBS}
    overrides["replicas"] = len(members)
    for name, own in REPLICA_KNOBS.items():
        values = tuple(member.get(name, defaults[name]) for member in members)
        if len(set(values)) > 1:
            overrides[f"per_replica.{own}"] = values
        elif values[0] != defaults[name]:
            overrides[name] = values[0]
    return overrides


def slug(text: str, longest: int = 60) -> str:
    """A name for a folder; one that would be long ends in a digest of all of it."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") or "variant"
    if len(name) <= longest:
        return name
    return f"{name[:longest]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def all_runs(programs: Iterable[Program]) -> list[tuple[Program, int, Run]]:
    """Each run with its program and its number in it."""
    return [(each, k, run) for each in programs for k, run in enumerate(each.members)]
