"""From a ConfigDict to typed, checked configs: nothing past this door sees the ConfigDict."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ml_collections import ConfigDict

from transformer.data.load import DataConfig
from transformer.errors import UserError, nearest
from transformer.model import ModelConfig
from transformer.optimizer import OptimizerConfig
from transformer.sharding import MeshConfig

Section = TypeVar("Section")

# Knobs that change how a run is carried out or watched, and not its result.
FREE_KNOBS = {"steps_per_call", "log_every", "eval_every", "save_every", "keep_checkpoints"}
FREE_SECTIONS = {"mesh"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `configs/base.py` explains each knob and holds its default.

    Raises:
      UserError: a number is out of its range.
    """

    seed: int
    steps: int
    batch_size: int
    steps_per_call: int
    log_every: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    label_smoothing: float
    decode_margin: int
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig

    def __post_init__(self):
        positive = ("steps", "batch_size", "steps_per_call", "log_every", "eval_every")
        for name in (*positive, "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: it must be at least 0 and below 2**32")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing={self.label_smoothing}: at least 0 and below 1")
        if self.decode_margin < 0:
            raise UserError(f"decode_margin={self.decode_margin}: it cannot be negative")
        if self.steps * self.batch_size >= 2**32:
            raise UserError(
                f"steps={self.steps} × batch_size={self.batch_size} passes 2**32 examples, "
                "where the order of the data would repeat; lower one of them"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise UserError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not below "
                f"steps={self.steps}; lower it or train longer"
            )

    @classmethod
    def resolve(cls, config: ConfigDict) -> "RunConfig":
        """Splats each section into its class.

        Raises:
          UserError: a knob is unknown or missing, or does not fit the others.
        """
        sections = {
            "data": DataConfig,
            "model": ModelConfig,
            "optimizer": OptimizerConfig,
            "mesh": MeshConfig,
        }
        values: dict[str, Any] = dict(config)
        for name, section in sections.items():
            if name in values:
                values[name] = splat(section, dict(values[name]), f"{name}.")
        return splat(cls, values, "")


def splat(section: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    """`section(**values)`, with an error that names the knob that is too many or missing."""
    known = [field.name for field in fields(section)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise UserError(
                f"the config has {prefix}{name}, which is no knob{nearest(name, known)}"
            )
    for name in known:
        if name not in values:
            raise UserError(f"the config lacks {prefix}{name}; build it from configs/base.py")
    return section(**values)


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """`model.norm: layer → rms` for each knob that changes a result and differs."""
    before, after = flat_knobs(old), flat_knobs(new)
    return [
        f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}"
        for name in sorted(before | after)
        if before.get(name, "absent") != after.get(name, "absent")
        and name not in FREE_KNOBS
        and name.split(".")[0] not in FREE_SECTIONS
    ]


def flat_knobs(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`model.norm` → value for every knob."""
    knobs = {}
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        knobs |= flat_knobs(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return knobs
