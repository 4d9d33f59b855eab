"""The typed config of a run, and how it is made from the ConfigDict of a program or a file.

Each section is a dataclass; its fields hold default, type, constraint and comment of each knob.
"""

import importlib
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from transformer import renamed
from transformer.data.datasets import DataConfig
from transformer.errors import UserError, explained, nearest
from transformer.inference.decoding import DecodingConfig
from transformer.inference.text_metrics import BLEU_TOKENIZERS, TEXT_METRICS, VALIDATION_METRICS
from transformer.knobs import Choice, Count, Range, Rate, Size, SizeOrZero, constrained
from transformer.metrics import METRICS
from transformer.modules.config import ModelConfig
from transformer.parallel.mesh import MeshConfig
from transformer.parallel.replicas import PerReplica, Population
from transformer.training.optimizer import OptimizerConfig

TEXT_METRIC = Choice(TEXT_METRICS)
loaded_plugins: set[str] = set()

# Knobs, or prefixes of knobs, that change how a run is carried out or watched, not its result.
RUNTIME_KNOBS = ("log_every", "keep_checkpoints", "debug_nans", "mesh.", "data.num_workers")
FREE_KNOBS = (*RUNTIME_KNOBS, "decoding.")
# Likewise, unless early stopping (`patience`) depends on them.
EVALUATION_KNOBS = ("eval_every", "save_every", "best_metric", "decode_every", "decode_examples")
EVALUATION_KNOBS += ("data.metrics", "data.bleu_tokenizer")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Population):
    """All knobs of a run; a UserError if one is out of its range or contradicts another."""

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
    init_from: str = ""  # the folder of a run whose parameters this run starts from
    init_new: Sequence[str] = ()  # patterns of those to initialise anew, such as ("decoder/*",)
    freeze: Sequence[str] = ()  # patterns of parameters that stay fixed, such as ("encoder/*",)
    # picks the best checkpoint; one of decoded text needs decode_every
    best_metric: Annotated[str, Choice(VALIDATION_METRICS)] = "sequence_accuracy"
    # evaluations without a better best_metric after which the run ends; 0: never
    patience: SizeOrZero = 0
    # evaluations between decodings of a sample for data.metrics; 0: never
    decode_every: SizeOrZero = 0
    decode_examples: Size = 256  # of validation, in the sample
    plugins: Sequence[str] = ()  # modules, imported first, that add entries to tables
    per_replica: PerReplica = field(default_factory=PerReplica)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)  # unless flags say otherwise
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        for knob, value, constraint in self.constrained():
            constraint.check(knob, value)
        for message in self.contradictions():
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

    def contradictions(self) -> Iterator[str]:
        """Yields a message for each rule that the knobs break."""
        data, model, mesh, warmup = self.data, self.model, self.mesh, self.optimizer.warmup_steps
        batch_size, parts = f"batch_size={self.batch_size}", self.accumulation_steps
        if self.steps * self.batch_size >= 2**32:  # where the order of the data would repeat
            yield f"steps={self.steps} × {batch_size} passes 2**32 examples; lower one of them"
        if self.batch_size % parts:
            yield f"accumulation_steps={parts} does not divide {batch_size}; choose one that does"
        if parts > 1 and model.norm == "batch":
            yield f"accumulation_steps={parts}: model.norm=batch needs the whole batch; set it to 1"
        for knob in ("target_tokenizer", "target_tokenizer_model"):
            shared, value = model.tie_embeddings in ("all", "inputs"), getattr(data, knob)
            if shared and value is not None:
                needed = f"model.tie_embeddings={model.tie_embeddings} needs one vocabulary"
                yield f"data.{knob}={value}: {needed}; set it to target_output or none"
        if self.init_new and not self.init_from:
            yield f"init_new={self.init_new}: there is no init_from; set it to a folder of a run"
        if self.best_metric in TEXT_METRICS and not self.decode_every:
            knob = f"best_metric={self.best_metric}: decode_every=0"
            yield f"{knob} never decodes; set it to 1, or choose one of {', '.join(METRICS)}"
        if warmup >= self.steps:
            knob = f"optimizer.warmup_steps={warmup}"
            yield f"{knob} is not below steps={self.steps}; lower it, or raise steps"
        if model.architecture == "recurrent" and data.pack_length:
            knob = f"data.pack_length={data.pack_length}: model.architecture=recurrent"
            yield f"{knob} reads one example a row; set it to 0"
        sizes = {f"mesh.{name}": getattr(mesh, name) for name in ("fsdp", "tensor", "context")}
        # XLA's partitioner (jaxlib 0.10.2) gives wrong numbers in the decoder's loop.
        if model.architecture == "recurrent" and set(sizes.values()) != {1}:
            knobs = ", ".join(f"{name}={size}" for name, size in sizes.items())
            yield f"{knobs}: model.architecture=recurrent is sharded by mesh.data alone; set all 1"

    def save_intervals(self) -> tuple[int, ...]:
        """The state is saved at each step that one of them divides."""
        # With early stopping the best evaluation must have a checkpoint.
        return (self.save_every, *[self.eval_every] * (self.patience > 0))

    def text_metrics(self) -> list[str]:
        """The metrics of the text that is decoded while training."""
        best = [self.best_metric] if self.best_metric in TEXT_METRICS else []
        return list(dict.fromkeys((*self.data.metrics, *best))) or ["exact_match"]

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> "RunConfig":
        """Imports the plugins of `config`; returns it typed, or raises a UserError for a knob."""
        known = flat_knobs(default_config())
        for name in flat_knobs(config):
            if name not in known:
                raise UserError(f"{name}: unknown option{nearest(name, known)}")
        values: dict[str, Any] = dict(config)
        load_plugins(values.get("plugins", ()))
        for name, section in sections(cls).items():
            if name in values:
                try:
                    values[name] = section(**values[name])
                except UserError as error:
                    if section is not DecodingConfig:
                        raise
                    # Its messages are those of flags, which have no section.
                    knob = str(error).partition("=")[0] in values[name]
                    raise UserError(f"decoding{'.' if knob else ': '}{error}") from error
        run = cls(**values)
        for knob, value, constraint in () if run.plugins else run.constrained():
            if isinstance(constraint, Choice) and value not in constraint.built_in:
                remedy = "define it in a module that config.plugins names"
                raise UserError(f"{knob}={value} is defined for this process alone; {remedy}")
        return run


def load_plugins(names: Iterable[str]) -> None:
    """Imports modules that add entries to tables, such as `NORMS["mine"] = MyNorm`."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"plugins={names}: names of modules, such as ('my_norms',)")
    for name in names:
        remedy = "install it, or name its folder in PYTHONPATH"
        with explained(f"plugins: {name} cannot be imported ({{kind}}: {{reason}}); {remedy}"):
            importlib.import_module(name)
        loaded_plugins.add(name)


def sections(config: type) -> dict[str, Any]:
    """Returns the fields of a config that are configs themselves: name → class."""
    return {name: kind for name, kind in get_type_hints(config).items() if is_dataclass(kind)}


def default_config(section: Any = RunConfig) -> Any:
    """Returns a ConfigDict of every knob at its default, for a config file to change."""
    config, types = ConfigDict(), get_type_hints(section)
    for knob in fields(section):
        kind = types[knob.name]
        if is_dataclass(kind):
            config[knob.name] = default_config(kind)
        elif knob.default is None:  # `int | None`
            config[knob.name] = config_dict.placeholder(get_args(kind)[0])
        else:
            config[knob.name] = knob.default
    return config


def load_config(path: str | Path, function: str = "get_config") -> Any:
    """Returns what a function of a Python file returns, by default the config of a config file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; see configs/")
    with explained(f"{path}: {{kind}}: {{reason}}"):  # whatever the user's code raises
        found = runpy.run_path(str(path))
        if function not in found:
            raise UserError(f"{path} does not define a function {function}()")
        return found[function]()


def saved_config(saved: Mapping[str, Any]) -> Any:
    """Returns the config of a saved run, with current names and the defaults of newer knobs."""
    config = default_config()
    flat, known = flat_knobs(ConfigDict(saved)).items(), flat_knobs(config)
    knobs = {renamed.KNOBS.get(k, k): value for k, value in flat if k not in renamed.REMOVED}
    for name, value in knobs.items():
        knobs[name] = renamed.VALUES.get(name, {}).get(value, value)
        if name not in known:
            unknown = f"this version does not know the run's knob {name}{nearest(name, known)}"
            raise UserError(f"{unknown}; use the version that saved it")
        if knobs[name] is None and known[name] is not None:
            raise ValueError(f"{name} is null")
    config.update_from_flattened_dict(renamed.BEFORE | knobs)
    return config


def continued(config: Any, saved: ConfigDict) -> Any:
    """Returns `config` in which knobs newer than a saved run keep the values it trained with."""
    default, before, now = map(flat_knobs, (default_config(), saved, config))
    config = config.copy_and_resolve_references()
    for name, value in renamed.BEFORE.items():
        if before[name] == value and now[name] == default[name]:
            config.update_from_flattened_dict({name: value})
    return config


def differences(old: ConfigDict, new: ConfigDict, free: tuple[str, ...] | None = None) -> list[str]:
    """Returns `model.norm: layer → rms` for each knob that differs, but for the `free` ones.

    By default free are those that do not change the parameters that training gives.
    """
    before, after = flat_knobs(old), flat_knobs(new)
    free = FREE_KNOBS + EVALUATION_KNOBS * (not new.patience) if free is None else free
    names = [name for name in sorted(before | after) if not name.startswith(free)]
    values = [(name, before.get(name, "absent"), after.get(name, "absent")) for name in names]
    # The file may have moved; `open_corpus` compares its content.
    values = [row for row in values if not (row[0].endswith("tokenizer_model") and all(row))]
    return [f"{name}: {one} → {other}" for name, one, other in values if one != other]


def fixed_knobs(config: Any) -> set[str]:
    """Returns the knobs that a run can never change, as its vocabulary depends on them."""
    kinds = {config.data.tokenizer, config.data.target_tokenizer}
    fixed = {f"data.{side}tokenizer{file}" for side in ("", "target_") for file in ("", "_model")}
    fixed |= {"data.vocab_size"} if kinds & {"words", "bpe", "unigram"} else set()
    separate = config.data.target_tokenizer or config.data.target_tokenizer_model
    fixed |= {"model.separate_vocabularies"} if separate else set()
    return fixed


def flat_knobs(config: ConfigDict) -> dict[str, Any]:
    """Returns `model.norm` → value for every knob."""
    knobs = flatten_dict(config.to_dict(), sep=".")  # JSON makes lists of tuples
    return {name: tuple(x) if isinstance(x, list) else x for name, x in knobs.items()}
