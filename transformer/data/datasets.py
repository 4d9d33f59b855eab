"""Datasets by name: the entries of `DATASETS` and all TFDS builders, prepared on first use."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import tensorflow_datasets as tfds

from transformer.console import quiet
from transformer.data import text, toy
from transformer.data.config import DataConfig
from transformer.errors import UserError, check_choice, explained, nearest, reason

CHUNK = 20_000  # number of examples held in memory as text
# Importing a module registers its builders with TFDS.
BUILDER_MODULES = (
    "transformer.data.pronunciations",
    "tensorflow_datasets.summarization",
    "tensorflow_datasets.text",
    "tensorflow_datasets.text_simplification",
    "tensorflow_datasets.translate",
)


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

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """See `readable`."""
        return readable(f"{self.name} under {self.builder.data_dir}")

    def num_examples(self, split: str) -> int:
        """The number of examples of a split."""
        split, splits = self.split(split), self.builder.info.splits
        sizes = {name: info.num_examples for name, info in splits.items()}
        named = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        unknown = f"{split!r} is not a split of {self.name}, or not a slice of one: {named}"
        with explained(unknown + nearest(split, sizes), KeyError, ValueError, AssertionError):
            count = splits[split].num_examples
            if count < 0:  # the slice ends before it begins
                raise ValueError(split)
        if count == 0:
            raise UserError(f"split {split!r} of {self.name} is empty")
        return count

    def columns(
        self, split: str, fields: Sequence[str], stride: int = 1
    ) -> Iterator[list[list[Any]]]:
        """Features of every `stride`-th example, in chunks."""
        count = self.num_examples(split)
        with self.readable():
            source = self.builder.as_data_source(split=self.split(split))
            if len(source) != count:
                raise ValueError(f"{len(source)} examples in {split} instead of {count}")
            every = range(0, count, stride)
            for first in range(0, len(every), CHUNK):
                found = source.__getitems__(every[first : first + CHUNK])
                yield [[each[name] for each in found] for name in fields]

    def texts(self, split: str, stride: int = 1) -> Iterator[tuple[list[str], list[str]]]:
        """Sources and targets of every `stride`-th example, in chunks."""
        features = list(self.builder.info.features)
        for knob, name in zip(("data.source", "data.target"), self.fields, strict=True):
            check_choice(features, name, knob)
        for chunk in self.columns(split, self.fields, stride):
            with self.readable():
                sources, targets = ([text.cleaned(x.decode()) for x in side] for side in chunk)
            yield sources, targets


def open_dataset(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The dataset of `config`, which is prepared if necessary."""
    return DATASETS.get(config.dataset.partition("/")[0], from_tfds)(config, data_dir)


def toy_strings(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The strings of a toy task."""
    name = f"{config.task}_{config.size}"
    builder = prepare(partial(toy.ToyStrings, config=name), f"toy_strings/{name}", data_dir)
    return PreparedDataset(builder, config.fields())


def text_files(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """Your own text files. A split is a file, or `validation` or `test`, cut from train."""
    files, split_names = _files_of_splits(config)
    builder = prepare_files(files, config, data_dir)
    for split in text.CUT.values():
        if getattr(config, split) == split and split not in builder.info.splits:
            raise UserError(
                f"data.{split}={split}: {config.train} is too small to cut one source in a hundred "
                f"from it; name a file, or a slice: --config.data.{split}=train[:10]"
            )
    return PreparedDataset(builder, text.COLUMNS, split_names)


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
    fields = config.fields()
    own = text.FilesConfig(name=text.digest(files, fields), files=dict(files), fields=fields)
    return prepare(partial(text.TextPairs, config=own), f"text_pairs/{own.name}", data_dir)


def reopen_dataset(config: DataConfig, name: str, data_dir: str | None) -> PreparedDataset:
    """The dataset that a run recorded as `name`, even if its files have moved or changed since."""
    if config.dataset != "files":
        return open_dataset(config, data_dir)
    own = text.FilesConfig(name=name.split("/")[1], files={}, fields=config.fields())
    make = partial(text.TextPairs, config=own)
    with quiet(), readable(f"{name} under {data_dir or 'the default of TFDS'}"):
        there = make(data_dir=data_dir).is_prepared()
    if there:
        names = _files_of_splits(config)[1]
        return PreparedDataset(prepare(make, name, data_dir), text.COLUMNS, names)
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
    name = config.dataset

    def make(data_dir: str | None) -> Any:
        try:
            return tfds.builder(name, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            raise UserError(f"data.dataset={name}: {_why_unknown(name, error)}") from error

    return PreparedDataset(prepare(make, name, data_dir), config.fields())


def _why_unknown(name: str, error: Exception) -> str:
    """Says which names TFDS knows in the place of an unknown one."""
    known = [*DATASETS, *tfds.list_builders(with_community_datasets=False)]
    family, _, wanted = name.partition("/")
    if family not in known:
        return (
            f"choose one of {', '.join(DATASETS)}, or a name that TFDS knows, such as "
            f"wmt14_translate/de-en{nearest(name, known)}"
        )
    configs = tfds.builder_cls(family).builder_configs
    if wanted and wanted.partition(":")[0] not in configs:
        names = [f"{family}/{config}" for config in configs] or [family]
        return f"choose one of {', '.join(names)}{nearest(name, names)}"
    return " ".join(str(error).split()).rpartition('}": ')[2][:200]  # such as the version


# Functions that return a dataset; any other name is one of TFDS.
DATASETS: dict[str, Callable[[DataConfig, str | None], PreparedDataset]] = {
    "toy_strings": toy_strings,
    "files": text_files,
}


@quiet()
def prepare(make: Callable[..., Any], name: str, data_dir: str | None) -> Any:
    """The builder that `make(data_dir=…)` returns, with its dataset `name` prepared on disk."""

    def find() -> Any:
        with readable(f"{name} under {data_dir or 'the default of TFDS'}"):
            return make(data_dir=data_dir)

    builder = find()
    if not builder.is_prepared():
        print(f"preparing {builder.info.full_name} under {builder.data_dir}")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints notes
                builder.download_and_prepare(file_format="array_record")
        except UserError:
            raise
        except Exception as error:  # TFDS and array_record raise their own types
            builder = find()
            if not builder.is_prepared():  # nor by another process meanwhile
                raise UserError(
                    f"cannot prepare {builder.info.full_name} under {builder.data_dir}: "
                    f"{reason(error)}; choose another --data_dir, install what is missing, or copy "
                    "the dataset there from a machine that can prepare it"
                ) from error
    name = f"{builder.info.full_name} under {builder.data_dir}"
    with readable(name):
        if not builder.info.splits:  # TFDS accepts any folder of that name
            raise ValueError("it has no splits")
        formats = builder.info.available_file_formats()
    if not formats & tfds.core.FileFormat.with_random_access():
        raise UserError(
            f"the dataset {name} is stored as {', '.join(each.value for each in formats)}, which "
            "only TensorFlow reads; choose another --data_dir to prepare it again, or convert it "
            "with tfds build --file_format=array_record"
        )
    return builder


def readable(what: str) -> contextlib.AbstractContextManager[None]:
    """Explains why TFDS and array_record cannot read the files of a dataset."""
    remedy = "if it is damaged, delete its folder to prepare it again"
    return explained(f"cannot read the dataset {what}: {{reason}}; {remedy}")
