"""From a ConfigDict to typed, checked configs: nothing past this door sees the ConfigDict."""

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
from ml_collections import ConfigDict, config_dict

from transformer import plugins
from transformer.data.config import DataConfig
from transformer.data.tokenizer import TOKENIZERS
from transformer.data.toy import TASKS
from transformer.errors import UserError, choose, nearest, within
from transformer.inference.text_metrics import BLEU_TOKENIZERS, TEXT_METRICS
from transformer.metrics import METRICS
from transformer.modules.config import TABLES, ModelConfig
from transformer.parallel.mesh import MeshConfig
from transformer.renamed import KNOBS
from transformer.training.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig
from transformer.training.step import HParams, StepConfig

Section = TypeVar("Section")

# The least and the most of whole numbers. What is above is a slip of the finger: it would take
# hours to trace, or pass the 32 bits that steps are counted in.
RANGES = {
    "seed": (0, 2**32 - 1),
    "replicas": (1, 10_000),
    "steps": (1, 2**31 - 1),
    "batch_size": (1, 2**20),
    "accumulation_steps": (1, 2**20),
    "max_skipped_steps": (0, 2**31 - 2),
    "log_every": (1, 2**31 - 1),
    "eval_every": (1, 2**31 - 1),
    "save_every": (1, 2**31 - 1),
    "keep_checkpoints": (1, 2**31 - 1),
    "decode_margin": (0, 2**16),
}

# Knobs that change how a run is carried out or watched, and not its result.
FREE_KNOBS = {
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "debug_nans",
    "best_metric",
    "data.metrics",
    "data.bleu_tokenizer",
    "data.num_workers",
}
FREE_SECTIONS = {"mesh"}

# Knobs of saved runs that are no more.
GONE = {"steps_per_call"}

# What runs did that were saved before a knob existed, where that is not its default.
BEFORE: dict[str, Any] = {
    "model.separate_vocabularies": False,
    "model.qk_norm_epsilon": 1e-6,
}


# What the tables hold without plugins.
BUILT_IN = {
    **{f"model.{name}": frozenset(entries) for name, entries in TABLES.items()},
    **{"optimizer.name": frozenset(OPTIMIZERS), "optimizer.schedule": frozenset(SCHEDULES)},
    **{"data.task": frozenset(TASKS), "data.metrics": frozenset(TEXT_METRICS)},
    **dict.fromkeys(("data.tokenizer", "data.target_tokenizer"), frozenset(TOKENIZERS)),
}


@dataclass(frozen=True, kw_only=True)
class PerReplica:
    """Where the replicas of a population differ: a value each, or () where they do not.

    By default they differ in their seeds alone.
    """

    seed: Sequence[Any] = ()
    learning_rate: Sequence[Any] = ()
    warmup_steps: Sequence[Any] = ()
    weight_decay: Sequence[Any] = ()
    label_smoothing: Sequence[Any] = ()
    dropout_rate: Sequence[Any] = ()
    attention_dropout_rate: Sequence[Any] = ()

    def __post_init__(self):
        for each in fields(self):
            values = getattr(self, each.name)
            whole = each.name in ("seed", "warmup_steps")
            if not isinstance(values, tuple | list) or not all(
                isinstance(value, int if whole else int | float) and not isinstance(value, bool)
                for value in values
            ):
                raise UserError(
                    f"per_replica.{each.name}={values}: it takes a {'whole ' if whole else ''}"
                    "number for each replica, such as (1,2,3)"
                )
            if not whole:  # 0 means 0.0, as it does for the knob of a single run
                object.__setattr__(self, each.name, tuple(map(float, values)))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: its knobs with their defaults, some of them in sections of their own.

    Raises:
      UserError: a number is out of its range.
    """

    seed: int = 0  # of initialisation, dropout and the order of the data
    replicas: int = 1  # runs trained at once in one program, with seeds seed, seed + 1, …
    steps: int = 1_800  # updates in all; schedules end here
    batch_size: int = 128  # rows a step, over all devices
    accumulation_steps: int = 1  # parts of a batch, taken one after another to save memory
    max_skipped_steps: int = 0  # left out, for a NaN or Inf in them, before the run stops
    debug_nans: bool = False  # a run that stops for a NaN or Inf says which operation made it
    log_every: int = 100  # steps
    eval_every: int = 250  # steps; the validation split
    save_every: int = 500  # steps
    keep_checkpoints: int = 2  # the latest so many, and the best
    label_smoothing: float = 0.0  # ε of the smoothed targets; the paper's is 0.1
    ema_decay: float = 0.0  # of a moving average of parameters, to evaluate with; 0: there is none
    decode_margin: int = 50  # an output may be so many tokens longer than its source
    best_metric: str = "sequence_accuracy"  # of validation, names the best; metrics.py: METRICS
    plugins: Sequence[str] = ()  # modules that add to the tables; imported before all else
    per_replica: PerReplica = field(default_factory=PerReplica)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        for name, (least, most) in RANGES.items():
            within(name, getattr(self, name), least, most)
        choose(METRICS, self.best_metric, "best_metric")
        for name in self.data.metrics:
            choose(TEXT_METRICS, str(name), "data.metrics")
        choose(dict.fromkeys(BLEU_TOKENIZERS), self.data.bleu_tokenizer, "data.bleu_tokenizer")
        for name in ("label_smoothing", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)}: at least 0 and below 1")
        if self.steps * self.batch_size >= 2**32:
            raise UserError(
                f"steps={self.steps} × batch_size={self.batch_size} passes 2**32 examples, "
                "where the order of the data would repeat; lower one of them"
            )
        if self.batch_size % self.accumulation_steps:
            raise UserError(
                f"accumulation_steps={self.accumulation_steps} does not divide "
                f"batch_size={self.batch_size}; "
                "choose one that does"
            )
        if self.accumulation_steps > 1 and self.model.norm == "batch":
            raise UserError(
                f"accumulation_steps={self.accumulation_steps}: model.norm=batch needs the whole "
                "batch at once; "
                "set it to 1, or choose another norm"
            )
        if self.model.tie_embeddings and self.data.target_tokenizer is not None:
            raise UserError(
                f"data.target_tokenizer={self.data.target_tokenizer}: model.tie_embeddings=True "
                "needs one vocabulary for source, target and logits; set it to False"
            )
        if self.data.pack_length and self.model.architecture == "recurrent":
            raise UserError(
                f"data.pack_length={self.data.pack_length}: model.architecture=recurrent reads "
                "one example a "
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
    def from_config_dict(cls, config: ConfigDict) -> "RunConfig":
        """Splats each section into its class, once the plugins are there that it names.

        Raises:
          UserError: a knob is unknown, or does not fit the others.
        """
        values: dict[str, Any] = dict(config)
        plugins.load(values.get("plugins", ()))
        for name, section in sections(cls).items():
            if name in values:
                values[name] = splat(section, dict(values[name]), f"{name}.")
        cfg = splat(cls, values, "")
        for knob, names in BUILT_IN.items():
            chosen = attrgetter(knob)(cfg)
            for name in chosen if isinstance(chosen, tuple) else (chosen,):
                if name is not None and name not in names and not cfg.plugins:
                    raise UserError(
                        f"{knob}={name}: only this process knows it, and no other could load the "
                        "run; put it into a module, and name that by config.plugins"
                    )
        return cfg

    def replica(self, k: int) -> "RunConfig":
        """The single run that replica `k` of this population is."""
        own = {name: values[k] for name, values in vars(self.per_replica).items() if values}
        own = {"seed": self.seed + k} | own
        inside = {
            section: replace(
                getattr(self, section),
                **{name: own.pop(name) for name in names if name in own},
            )
            for section, names in {
                "optimizer": ("learning_rate", "warmup_steps", "weight_decay"),
                "model": ("dropout_rate", "attention_dropout_rate"),
            }.items()
        }
        return replace(self, replicas=1, per_replica=PerReplica(), **inside, **own)

    def step_config(self) -> StepConfig:
        """How the model is trained."""
        hparams = HParams(
            learning_rate=self.optimizer.learning_rate,
            warmup_steps=self.optimizer.warmup_steps,
            weight_decay=self.optimizer.weight_decay,
            label_smoothing=self.label_smoothing,
            dropout_rate=self.model.dropout_rate,
            attention_dropout_rate=self.model.attention_dropout_rate,
        )
        return StepConfig(
            optimizer=self.optimizer,
            steps=self.steps,
            ema_decay=self.ema_decay,
            accumulation_steps=self.accumulation_steps,
            max_skipped=self.max_skipped_steps,
            hparams=hparams,
        )

    def step_configs(self) -> list[StepConfig]:
        """How each replica is trained; of a single run one."""
        if self.replicas == 1:
            return [self.step_config()]
        return [self.replica(k).step_config() for k in range(self.replicas)]

    def smoothings(self) -> list[float]:
        """The label smoothing of each replica."""
        if self.replicas == 1:
            return [self.label_smoothing]
        return [self.replica(k).label_smoothing for k in range(self.replicas)]

    def seeds(self) -> Any:
        """The seed, or in a population that of each replica, [R]; uint32."""
        if self.replicas == 1:
            return np.uint32(self.seed)
        return np.array([self.replica(k).seed for k in range(self.replicas)], np.uint32)

    def hparams(self) -> dict[str, np.ndarray]:
        """The hyperparameters in which the replicas differ: name → [R] float32."""
        return {
            name: np.array(values, np.float32)
            for name, values in vars(self.per_replica).items()
            if values and name != "seed"
        }


def sections(config: type) -> dict[str, Any]:
    """The fields of a config that are configs themselves: name → class."""
    return {name: kind for name, kind in get_type_hints(config).items() if is_dataclass(kind)}


def splat(section: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    """`section(**values)`, with an error that names the knob that is too many."""
    known = [knob.name for knob in fields(section)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise UserError(
                f"the config has {prefix}{name}, which is no knob{nearest(name, known)}"
            )
    return section(**values)


def default_config() -> Any:
    """Every knob with its default, as a ConfigDict for a config file to change."""

    def of(section: Any) -> ConfigDict:
        config, types = ConfigDict(), get_type_hints(section)
        for knob in fields(section):
            kind = types[knob.name]
            if knob.name in sections(section):
                config[knob.name] = of(kind)
            elif knob.default is None:  # `int | None`
                config[knob.name] = config_dict.placeholder(get_args(kind)[0])
            else:
                config[knob.name] = knob.default
        return config

    return of(RunConfig)


def load_config(path: str | Path, function: str = "get_config") -> Any:
    """What the `get_config` of a config file gives, or another function of a Python file.

    Raises:
      UserError: there is no such file, or it fails.
    """
    try:
        return runpy.run_path(str(path))[function]()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; see configs/") from error
    except UserError:
        raise
    except Exception as error:  # whatever a person's file may raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {type(error).__name__}: {reason}") from error


def saved_config(saved: Mapping[str, Any]) -> Any:
    """The config of a saved run, whatever knobs there were when it was saved.

    Raises:
      UserError: it has a knob that this version does not know.
    """
    config = default_config()
    old = flat_knobs(ConfigDict(saved))
    knobs = {KNOBS.get(name, name): value for name, value in old.items() if name not in GONE}
    known = flat_knobs(config)
    for name in knobs:
        if name not in known:
            raise UserError(
                f"the run has the knob {name}, which this version does not know"
                f"{nearest(name, known)}; use the version that the run was saved by"
            )
    config.update_from_flattened_dict(BEFORE | knobs)
    return config


def continued(config: Any, saved: ConfigDict) -> Any:
    """`config` as one that goes on with a saved run, which may be older than some of its knobs."""
    usual, before, now = map(flat_knobs, (default_config(), saved, config))
    older = {k: v for k, v in BEFORE.items() if (before[k], now[k]) == (v, usual[k])}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(older)
    return config


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


def kept_knobs(config: Any) -> set[str]:
    """The knobs that a run keeps to its end, for what it has learned is in their terms."""
    kinds = {config.data.tokenizer, config.data.target_tokenizer}
    kept = {"data.tokenizer", "data.target_tokenizer"}
    if config.data.target_tokenizer is not None:
        kept.add("model.separate_vocabularies")
    return kept | ({"data.vocab_size"} if kinds & {"words", "bpe", "unigram"} else set())


def flat_knobs(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`model.norm` → value for every knob."""
    knobs = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            knobs |= flat_knobs(value, f"{prefix}{name}.")
        else:  # JSON makes lists of tuples
            knobs[prefix + name] = tuple(value) if isinstance(value, list) else value
    return knobs
