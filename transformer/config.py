"""From a ConfigDict to typed, checked configs: nothing past this door sees the ConfigDict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from transformer.data.data_config import DataConfig
from transformer.errors import UserError, nearest, within
from transformer.model_config import ModelConfig
from transformer.optimizer import OptimizerConfig
from transformer.sharding import MeshConfig
from transformer.training import Hyperparameters, Recipe

Section = TypeVar("Section")

# The least and the most of whole numbers. What is above is a slip of the finger: it would take
# hours to trace, or pass the 32 bits that steps are counted in.
RANGES = {
    "seed": (0, 2**32 - 1),
    "replicas": (1, 10_000),
    "steps": (1, 2**31 - 1),
    "batch_size": (1, 2**20),
    "accumulate": (1, 2**20),
    "max_skipped_steps": (0, 2**31 - 2),
    "steps_per_call": (1, 2**31 - 1),
    "log_every": (1, 2**31 - 1),
    "eval_every": (1, 2**31 - 1),
    "save_every": (1, 2**31 - 1),
    "keep_checkpoints": (1, 2**31 - 1),
    "decode_margin": (0, 2**16),
}

# Knobs that change how a run is carried out or watched, and not its result.
FREE_KNOBS = {
    "steps_per_call",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "debug_nans",
    "data.metrics",
    "data.bleu_tokenizer",
    "data.workers",
}
FREE_SECTIONS = {"mesh"}


@dataclass(frozen=True, kw_only=True)
class PerReplica:
    """Where the replicas of a population differ: a value each, or () where they do not."""

    seed: Sequence[Any]
    learning_rate: Sequence[Any]
    warmup_steps: Sequence[Any]
    weight_decay: Sequence[Any]
    label_smoothing: Sequence[Any]
    dropout: Sequence[Any]
    attention_dropout: Sequence[Any]

    def __post_init__(self):
        for field in fields(self):
            values = getattr(self, field.name)
            whole = field.name in ("seed", "warmup_steps")
            if not isinstance(values, tuple | list) or not all(
                isinstance(value, int if whole else int | float) and not isinstance(value, bool)
                for value in values
            ):
                raise UserError(
                    f"per_replica.{field.name}={values}: it takes a {'whole ' if whole else ''}"
                    "number for each replica, such as (1,2,3)"
                )
            if not whole:  # 0 means 0.0, as it does for the knob of a single run
                object.__setattr__(self, field.name, tuple(map(float, values)))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `configs/base.py` explains each knob and holds its default.

    Raises:
      UserError: a number is out of its range.
    """

    seed: int
    replicas: int
    steps: int
    batch_size: int
    accumulate: int
    max_skipped_steps: int
    debug_nans: bool
    steps_per_call: int
    log_every: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    label_smoothing: float
    ema_decay: float
    decode_margin: int
    per_replica: PerReplica
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig

    def __post_init__(self):
        for name, (least, most) in RANGES.items():
            within(name, getattr(self, name), least, most)
        for name in ("label_smoothing", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)}: at least 0 and below 1")
        if self.steps * self.batch_size >= 2**32:
            raise UserError(
                f"steps={self.steps} × batch_size={self.batch_size} passes 2**32 examples, "
                "where the order of the data would repeat; lower one of them"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; "
                "choose one that does"
            )
        if self.accumulate > 1 and self.model.norm == "batch":
            raise UserError(
                f"accumulate={self.accumulate}: model.norm=batch needs the whole batch at once; "
                "set it to 1, or choose another norm"
            )
        if self.model.tie_embeddings and self.data.target_tokenizer is not None:
            raise UserError(
                f"data.target_tokenizer={self.data.target_tokenizer}: model.tie_embeddings=True "
                "needs one vocabulary for source, target and logits; set it to False"
            )
        if self.data.pack and self.model.architecture == "recurrent":
            raise UserError(
                f"data.pack={self.data.pack}: model.architecture=recurrent reads one example a "
                "row; set it to 0"
            )
        inside = self.mesh.fsdp, self.mesh.tensor, self.mesh.context
        if self.model.architecture == "recurrent" and inside != (1, 1, 1):
            # XLA's partitioner (jaxlib 0.10.2) gives wrong numbers in the decoder's loop.
            raise UserError(
                f"mesh.fsdp={inside[0]}, mesh.tensor={inside[1]}, mesh.context={inside[2]}: "
                "model.architecture=recurrent is split over the batch alone; set all three to 1"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise UserError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not below "
                f"steps={self.steps}; lower it or train longer"
            )
        for name, values in vars(self.per_replica).items():
            if values and (len(values) != self.replicas or self.replicas == 1):
                raise UserError(
                    f"per_replica.{name} has {len(values)} values and replicas={self.replicas}; "
                    "give as many as there are replicas, two or more"
                )
        for k in range(self.replicas if self.replicas > 1 else 0):
            self.replica(k)  # each is a run that must stand by itself

    @classmethod
    def resolve(cls, config: ConfigDict) -> "RunConfig":
        """Splats each section into its class.

        Raises:
          UserError: a knob is unknown or missing, or does not fit the others.
        """
        sections = {
            "per_replica": PerReplica,
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

    def replica(self, k: int) -> "RunConfig":
        """The single run that replica `k` of this population is."""
        own = {name: values[k] for name, values in vars(self.per_replica).items() if values}
        own = {"seed": self.seed + k} | own
        alike = PerReplica(**{field.name: () for field in fields(PerReplica)})
        inside = {
            section: replace(
                getattr(self, section),
                **{name: own.pop(name) for name in names if name in own},
            )
            for section, names in {
                "optimizer": ("learning_rate", "warmup_steps", "weight_decay"),
                "model": ("dropout", "attention_dropout"),
            }.items()
        }
        return replace(self, replicas=1, per_replica=alike, **inside, **own)

    def recipe(self) -> Recipe:
        """How the model is trained."""
        numbers = Hyperparameters(
            learning_rate=self.optimizer.learning_rate,
            warmup_steps=self.optimizer.warmup_steps,
            weight_decay=self.optimizer.weight_decay,
            label_smoothing=self.label_smoothing,
            dropout=self.model.dropout,
            attention_dropout=self.model.attention_dropout,
        )
        return Recipe(
            optimizer=self.optimizer,
            steps=self.steps,
            ema_decay=self.ema_decay,
            accumulate=self.accumulate,
            max_skipped=self.max_skipped_steps,
            numbers=numbers,
        )

    def seeds(self) -> Any:
        """The seed, or in a population that of each replica, [R]; uint32."""
        if self.replicas == 1:
            return np.uint32(self.seed)
        return np.array([self.replica(k).seed for k in range(self.replicas)], np.uint32)

    def numbers(self) -> dict[str, np.ndarray]:
        """The hyperparameters in which the replicas differ: name → [R] float32."""
        return {
            name: np.array(values, np.float32)
            for name, values in vars(self.per_replica).items()
            if values and name != "seed"
        }


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
        if isinstance(value, ConfigDict):
            knobs |= flat_knobs(value, f"{prefix}{name}.")
        else:  # JSON makes lists of tuples
            knobs[prefix + name] = tuple(value) if isinstance(value, list) else value
    return knobs
