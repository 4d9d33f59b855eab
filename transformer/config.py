"""The typed config of a run, and how it is made from a ConfigDict.

Only programs and config files see a ConfigDict; the library takes a `RunConfig`. Each section is a
dataclass whose fields hold the default, type, constraint and comment of a knob.
"""

import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from ml_collections import ConfigDict, config_dict

from transformer import plugins, renamed
from transformer.data.config import DataConfig
from transformer.errors import UserError, nearest
from transformer.inference.text_metrics import BLEU_TOKENIZERS, TEXT_METRICS
from transformer.knobs import Choice, Count, Range, Rate, Size, constrained
from transformer.metrics import METRICS
from transformer.modules.config import ModelConfig
from transformer.parallel.mesh import MeshConfig
from transformer.parallel.replicas import PerReplica, Population
from transformer.training.optimizer import OptimizerConfig
from transformer.training.step import HParams, StepConfig

Section = TypeVar("Section")

TEXT_METRIC = Choice(TEXT_METRICS)

# Knobs, or prefixes of knobs, that change how a run is carried out or watched, not its result.
FREE_KNOBS = (
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "debug_nans",
    "best_metric",
    "data.metrics",
    "data.bleu_tokenizer",
    "data.num_workers",
    "mesh.",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Population):
    """All knobs of a run.

    Raises:
      UserError: a knob is out of its range or contradicts another.
    """

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # for initialisation, dropout and data order
    replicas: Annotated[int, Range(1, 10_000)] = 1  # runs trained at once, with seeds seed, seed+1…
    steps: Count = 1_800  # updates; schedules end here
    batch_size: Size = 128  # rows of a step, over all devices
    accumulation_steps: Size = 1  # gradient accumulation: number of microbatches
    max_skipped_steps: Annotated[int, Range(0, 2**31 - 2)] = 0  # non-finite updates before an error
    debug_nans: bool = False  # find the operation that produced the NaN or Inf
    log_every: Count = 100  # steps
    eval_every: Count = 250  # steps; on the validation split
    save_every: Count = 500  # steps
    keep_checkpoints: Count = 2  # latest checkpoints to keep, besides the best
    label_smoothing: Rate = 0.0  # the paper's is 0.1
    ema_decay: Rate = 0.0  # moving average of the parameters, for evaluation; 0: none
    decode_margin: Annotated[int, Range(0, 2**16)] = 50  # tokens an output may exceed its source by
    best_metric: Annotated[str, Choice(METRICS)] = "sequence_accuracy"  # picks the best checkpoint
    plugins: Sequence[str] = ()  # modules, imported first, that add entries to tables
    per_replica: PerReplica = field(default_factory=PerReplica)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        for knob, value, constraint in self.constrained():
            constraint.check(knob, value)
        for is_wrong, message in self.contradictions():
            if is_wrong:
                raise UserError(message)
        self.check_replicas()

    def constrained(self) -> Iterator[tuple[str, Any, Range | Choice]]:
        """Yields (knob, value, constraint) for each value, including those of the sections."""
        yield from constrained(self, "")
        for name in sections(type(self)):
            yield from constrained(getattr(self, name), f"{name}.")
        # Checked here, not in DataConfig: `data` does not import `inference`.
        for name in self.data.metrics:
            yield "data.metrics", str(name), TEXT_METRIC
        yield "data.bleu_tokenizer", self.data.bleu_tokenizer, Choice(BLEU_TOKENIZERS)

    def contradictions(self) -> list[tuple[bool, str]]:
        """Returns a pair for each rule: whether knobs contradict each other, and the message."""
        data, model, mesh, steps = self.data, self.model, self.mesh, self.accumulation_steps
        recurrent = model.architecture == "recurrent"
        return [
            (
                self.steps * self.batch_size >= 2**32,
                f"steps={self.steps} × batch_size={self.batch_size} passes 2**32 examples, "
                "where the order of the data would repeat; lower one of them",
            ),
            (
                self.batch_size % steps > 0,
                f"accumulation_steps={steps} does not divide batch_size={self.batch_size}; choose "
                "one that does",
            ),
            (
                steps > 1 and model.norm == "batch",
                f"accumulation_steps={steps}: model.norm=batch needs the whole batch at once; set "
                "it to 1, or choose another norm",
            ),
            (
                model.tie_embeddings and data.target_tokenizer is not None,
                f"data.target_tokenizer={data.target_tokenizer}: model.tie_embeddings=True needs "
                "one vocabulary for source, target and logits; set it to False",
            ),
            (
                recurrent and data.pack_length > 0,
                f"data.pack_length={data.pack_length}: model.architecture=recurrent reads one "
                "example a row; set it to 0",
            ),
            (
                # XLA's partitioner (jaxlib 0.10.2) gives wrong numbers in the decoder's loop.
                recurrent and (mesh.fsdp, mesh.tensor, mesh.context) != (1, 1, 1),
                f"mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor}, mesh.context={mesh.context}: "
                "model.architecture=recurrent is sharded over the batch alone; set all three to 1",
            ),
            (
                self.optimizer.warmup_steps >= self.steps,
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not below "
                f"steps={self.steps}; lower it or train longer",
            ),
        ]

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> "RunConfig":
        """Imports the plugins that `config` names, and returns the typed config.

        Raises:
          UserError: a knob is unknown, out of its range or contradicts another.
        """
        values: dict[str, Any] = dict(config)
        plugins.load(values.get("plugins", ()))
        for name, section in sections(cls).items():
            if name in values:
                values[name] = build(section, dict(values[name]), f"{name}.")
        run = build(cls, values, "")
        for knob, value, constraint in () if run.plugins else run.constrained():
            if isinstance(constraint, Choice) and value not in constraint.built_in:
                raise UserError(
                    f"{knob}={value} is defined in this process only, and no other could load the "
                    "run; put it into a module, and name that by config.plugins"
                )
        return run

    def step_config(self) -> StepConfig:
        """The part of the config that the train step depends on."""
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


def sections(config: type) -> dict[str, Any]:
    """Returns the fields of a config that are configs themselves: name → class."""
    return {name: kind for name, kind in get_type_hints(config).items() if is_dataclass(kind)}


def build(section: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    """Returns `section(**values)`, or raises a UserError that names an unknown knob."""
    known = [knob.name for knob in fields(section)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            names = [prefix + other for other in known]
            raise UserError(f"{prefix}{name}: unknown option{nearest(prefix + name, names)}")
    return section(**values)


def default_config() -> Any:
    """Returns a ConfigDict of every knob at its default, for a config file to change."""

    def of(section: Any) -> ConfigDict:
        config, types = ConfigDict(), get_type_hints(section)
        for knob in fields(section):
            kind = types[knob.name]
            if is_dataclass(kind):
                config[knob.name] = of(kind)
            elif knob.default is None:  # `int | None`
                config[knob.name] = config_dict.placeholder(get_args(kind)[0])
            else:
                config[knob.name] = knob.default
        return config

    return of(RunConfig)


def load_config(path: str | Path, function: str = "get_config") -> Any:
    """Returns what a function of a Python file returns, by default the config of a config file.

    Raises:
      UserError: there is no such file, or it fails.
    """
    try:
        return runpy.run_path(str(path))[function]()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; see configs/") from error
    except UserError:
        raise
    except Exception as error:  # anything that the user's code may raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {type(error).__name__}: {reason}") from error


def saved_config(saved: Mapping[str, Any]) -> Any:
    """Returns the config of a saved run, with current names and the defaults of newer knobs.

    Raises:
      UserError: it has a knob that this version does not know.
    """
    config = default_config()
    knobs, known = renamed.knobs(flat_knobs(ConfigDict(saved))), flat_knobs(config)
    for name in knobs:
        if name not in known:
            raise UserError(
                f"the run has the knob {name}, which this version does not know"
                f"{nearest(name, known)}; use the version that the run was saved by"
            )
        if knobs[name] is None and known[name] is not None:
            raise ValueError(f"{name} is null")
    config.update_from_flattened_dict(renamed.BEFORE | knobs)
    return config


def continued(config: Any, saved: ConfigDict) -> Any:
    """Returns `config` in which knobs newer than a saved run keep the values it trained with."""
    default, before, now = map(flat_knobs, (default_config(), saved, config))
    older = {
        name: value
        for name, value in renamed.BEFORE.items()
        if before[name] == value and now[name] == default[name]
    }
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(older)
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns `model.norm: layer → rms` for each knob that differs and changes a result."""
    before, after = flat_knobs(old), flat_knobs(new)
    return [
        f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}"
        for name in sorted(before | after)
        if before.get(name, "absent") != after.get(name, "absent")
        and not name.startswith(FREE_KNOBS)
    ]


def fixed_knobs(config: Any) -> set[str]:
    """Returns the knobs that a run can never change, as its vocabulary depends on them."""
    kinds = {config.data.tokenizer, config.data.target_tokenizer}
    fixed = {"data.tokenizer", "data.target_tokenizer"}
    if config.data.target_tokenizer is not None:
        fixed.add("model.separate_vocabularies")
    return fixed | ({"data.vocab_size"} if kinds & {"words", "bpe", "unigram"} else set())


def flat_knobs(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns `model.norm` → value for every knob."""
    knobs = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            knobs |= flat_knobs(value, f"{prefix}{name}.")
        else:  # JSON makes lists of tuples
            knobs[prefix + name] = tuple(value) if isinstance(value, list) else value
    return knobs
