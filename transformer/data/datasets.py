"""Datasets by name: the entries of `DATASETS` and all TFDS builders, prepared on first use."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import tensorflow_datasets as tfds

from transformer.console import quiet
from transformer.data import text, toy
from transformer.data.tokenizer import TOKENIZERS
from transformer.errors import UserError, check_choice, explained, nearest, reason
from transformer.knobs import Choice, Range, SizeOrZero, validate

CHUNK = 20_000  # number of examples held in memory as text
# Importing a module registers its builders with TFDS.
BUILDER_MODULES = (
    "transformer.data.pronunciations",
    "transformer.data.scan",
    "tensorflow_datasets.summarization",
    "tensorflow_datasets.text",
    "tensorflow_datasets.text_simplification",
    "tensorflow_datasets.translate",
)
Tokenizer = Annotated[str, Choice(TOKENIZERS)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset, its splits, the tokenizers, packing and text metrics."""

    dataset: str = "toy_strings"  # DATASETS in data/datasets.py, or a name in TFDS
    task: Annotated[str, Choice(toy.TASKS)] = "reverse"  # for toy_strings; TASKS in data/toy.py
    size: Annotated[str, Choice(toy.SIZES)] = "small"  # for toy_strings; SIZES in data/toy.py
    source: str = "source"  # the field of the source text
    target: str = "target"  # the field of the target text
    train: str = "train"  # TFDS split or slice, such as train[:10%]; for files, a file
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    tokenizer: Tokenizer = "characters"  # TOKENIZERS in data/tokenizer.py
    target_tokenizer: Tokenizer | None = None  # None: one for both sides
    tokenizer_model: str | None = None  # the file of a SentencePiece model, instead of tokenizer
    target_tokenizer_model: str | None = None  # likewise of the target alone
    vocab_size: Annotated[int, Range(264, 2**20)] = 8_000  # maximum, for words, bpe, unigram
    max_length: SizeOrZero = 0  # filters out longer training examples; 0: no filter
    metrics: Sequence[str] = ()  # for decoded text; TEXT_METRICS in inference/text_metrics.py
    bleu_tokenizer: str = "13a"  # sacrebleu's tokenizer; zh for Chinese, ja-mecab for Japanese
    num_workers: Annotated[int, Range(0, 1_000)] = 0  # to stream batches; 0: rows on devices
    pack_length: SizeOrZero = 0  # length of packed training rows; 0: one example per row

    def __post_init__(self):
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        validate(self, "data.")


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset on disk. Its methods take the name of a split, or of a slice, as in the config."""

    builder: Any  # of TFDS
    fields: tuple[str, str]  # the names of the features with the two texts of a pair
    split_names: Mapping[str, str] = field(default_factory=dict)  # config → dataset, if they differ

    @property
    def name(self) -> str:
        """The name with config and version: `wmt14_translate/de-en/1.0.0`."""
        return self.builder.info.full_name

    def split(self, name: str) -> str:
        """The dataset's name of a split of the config."""
        return self.split_names.get(name, name)

    def num_examples(self, split: str) -> int:
        split, splits = self.split(split), self.builder.info.splits
        named = ", ".join(f"{name} ({info.num_examples})" for name, info in splits.items())
        with explained(
            f"{split!r} is not a split of {self.name}, or is empty; choose one, or a slice such as "
            f"train[:10]: {named}{nearest(split, splits)}"
        ):
            count = splits[split].num_examples
            if count <= 0:  # a slice ends before it begins
                raise ValueError(split)
        return count

    def texts(self, split: str, stride: int = 1, fields: Sequence[str] = ()) -> Iterator[list]:
        """Sources and targets, or other fields, of every `stride`-th example, in chunks."""
        count, features = self.num_examples(split), list(self.builder.info.features)
        for knob, name in zip(("data.source", "data.target"), self.fields, strict=True):
            check_choice(features, name, knob)
        with readable(self.name, self.builder.data_dir):
            source = self.builder.as_data_source(split=self.split(split))
            if len(source) != count:
                raise ValueError(f"{len(source)} examples in {split} instead of {count}")
            every = range(0, count, stride)
            for first in range(0, len(every), CHUNK):
                found = source.__getitems__(every[first : first + CHUNK])
                yield [[_decoded(each[name]) for each in found] for name in fields or self.fields]


def _decoded(value: Any) -> str | list[str]:
    """A feature's text, or texts."""
    if isinstance(value, bytes):
        return text.cleaned(value.decode())
    return [text.cleaned(each.decode()) for each in value]


def open_dataset(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The dataset of `config`, which is prepared if necessary."""
    return DATASETS.get(config.dataset.partition("/")[0], from_tfds)(config, data_dir)


def toy_strings(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The strings of a toy task."""
    name = f"{config.task}_{config.size}"
    builder = prepare(partial(toy.ToyStrings, config=name), f"toy_strings/{name}", data_dir)
    return PreparedDataset(builder, (config.source, config.target))


def text_files(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """Your own text files. A split is a file, or `validation` or `test`, cut from train."""
    files, split_names = _files_of_splits(config)
    return PreparedDataset(prepare_files(files, config, data_dir), text.COLUMNS, split_names)


def _files_of_splits(config: DataConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Split → its file, and `PreparedDataset.split_names`."""
    files, split_names = {}, {}
    for split in text.SPLITS:
        wanted = getattr(config, split)
        file, bracket, part = wanted.partition("[")
        if file not in text.SPLITS:
            files[split], split_names[wanted] = file, f"{split}{bracket}{part}"
        elif split == "train":
            raise UserError(
                f"data.train={wanted}: data.dataset=files reads a file; name one with pairs "
                "(.tsv, .jsonl), or two: sources,targets"
            )
    return files, split_names


def prepare_files(files: Mapping[str, str], config: DataConfig, data_dir: str | None) -> Any:
    """The builder of a dataset of text files, given the files of each split."""
    fields = config.source, config.target
    own = text.FilesConfig(name=text.digest(files, fields), files=dict(files), fields=fields)
    return prepare(partial(text.TextPairs, config=own), f"text_pairs/{own.name}", data_dir)


def reopen_dataset(config: DataConfig, name: str, data_dir: str | None) -> PreparedDataset:
    """The dataset that a run recorded as `name`, even if its files have moved or changed since."""
    if config.dataset != "files":
        return open_dataset(config, data_dir)
    own = text.FilesConfig(name=name.split("/")[1], files={}, fields=(config.source, config.target))
    with quiet(), readable(name, data_dir):
        builder = text.TextPairs(config=own, data_dir=data_dir)
        if builder.is_prepared():
            return PreparedDataset(builder, text.COLUMNS, _files_of_splits(config)[1])
    try:
        return open_dataset(config, data_dir)
    except UserError as error:
        raise UserError(
            f"{error}; or name the --data_dir that has {name}, or a file of pairs by --data=FILE"
        ) from error


def open_test_files(config: DataConfig, files: str, data_dir: str | None) -> PreparedDataset:
    """A file of pairs, or two, as the split `test`; `config` names the texts of JSON."""
    if not any(text.kind(path) in text.JSON for path in text.paths(files)):
        config = replace(config, source=text.COLUMNS[0], target=text.COLUMNS[1])
    return PreparedDataset(prepare_files({"test": files}, config, data_dir), text.COLUMNS)


def from_tfds(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """A dataset that is registered with TFDS, such as `wmt14_translate/de-en`."""
    for module in BUILDER_MODULES:
        importlib.import_module(module)
    builder = prepare(partial(_tfds_builder, config.dataset), config.dataset, data_dir)
    return PreparedDataset(builder, (config.source, config.target))


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    """The builder of this name; an error says which names there are."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        said = " ".join(str(error).split()).rpartition('}": ')[2][:200]  # about the version
        known = [*DATASETS, *tfds.list_builders(with_community_datasets=False)]
        family, _, config = name.partition(":")[0].partition("/")
        if family not in known:
            names = f"{', '.join(DATASETS)}, or a name in TFDS, such as wmt14_translate/de-en"
            said = f"choose one of {names}{nearest(name, known)}"
        elif config and config not in (configs := tfds.builder_cls(family).builder_configs):
            names = [f"{family}/{each}" for each in configs] or [family]
            said = f"choose one of {', '.join(names)}{nearest(name, names)}"
        raise UserError(f"data.dataset={name}: {said}") from error


# Functions that return a dataset; any other name is one of TFDS.
DATASETS: dict[str, Callable[[DataConfig, str | None], PreparedDataset]] = {
    "toy_strings": toy_strings,
    "files": text_files,
}


@quiet()
def prepare(make: Callable[..., Any], name: str, data_dir: str | None) -> Any:
    """The builder that `make(data_dir=…)` returns, with its dataset `name` prepared on disk."""
    with readable(name, data_dir):
        builder = make(data_dir=data_dir)
        if not builder.is_prepared():
            place = f"{builder.info.full_name} under {builder.data_dir}"
            print(f"preparing {place}")
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints notes
                    builder.download_and_prepare(file_format="array_record")
            except UserError:
                raise
            except Exception as error:  # TFDS and array_record raise their own types
                builder = make(data_dir=data_dir)
                if not builder.is_prepared():  # nor by another process meanwhile
                    message = f"cannot prepare {place}: {_cause_and_remedy(error)}"
                    raise UserError(message) from error
        if not builder.info.splits:  # TFDS accepts any folder of that name
            raise ValueError("it has no splits")
        formats = builder.info.available_file_formats()
        if not formats & tfds.core.FileFormat.with_random_access():
            stored = ", ".join(each.value for each in formats)
            raise ValueError(f"it is stored as {stored}, which only TensorFlow reads")
    return builder


def _cause_and_remedy(error: Exception) -> str:
    """Why a dataset cannot be prepared, and what to do."""
    copy = "copy the dataset there from a machine that can prepare it"
    if request := getattr(error, "request", None):  # of requests, which downloads
        return f"{request.url} cannot be reached; check the network, or {copy}"
    if isinstance(error, ImportError) and error.name:  # TFDS unpacks archives with TensorFlow
        return f"the package {error.name} is not installed; install it, or {copy}"
    return f"{reason(error)}; choose another --data_dir, or {copy}"


@contextlib.contextmanager
def readable(name: str, data_dir: Any) -> Iterator[None]:
    """Explains why TFDS and array_record cannot read a dataset; a disk error explains itself."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(
            f"cannot read the dataset {name} under {data_dir or 'the default of TFDS'}: "
            f"{reason(error)}; delete its folder to prepare it again, or choose another --data_dir"
        ) from error
