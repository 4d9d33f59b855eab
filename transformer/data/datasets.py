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
from transformer.data.ragged import chunk_ranges
from transformer.errors import UserError, check_choice, nearest

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
    """A dataset on disk.

    builder: the TFDS builder.
    fields: the names of the features with the two texts of a pair.
    split_names: a split's name in the config → its name in the dataset, if they differ.
    """

    builder: Any
    fields: tuple[str, str]
    split_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name with config and version: `wmt14_translate/de-en/1.0.0`."""
        return self.builder.info.full_name

    def split(self, name: str) -> str:
        """The dataset's name of a split of the config."""
        return self.split_names.get(name, name)

    def damage_explained(self) -> contextlib.AbstractContextManager[None]:
        """See `damage_explained`."""
        return damage_explained(f"{self.name} under {self.builder.data_dir}")

    def num_examples(self, split: str) -> int:
        """The number of examples of a split, or of a slice of one, by the dataset's name.

        Raises:
          UserError: there is no such split, or it is empty.
        """
        held = self.builder.info.splits
        try:
            count = held[split].num_examples
            if count < 0:  # the slice ends before it begins
                raise ValueError(split)
        except (KeyError, ValueError, AssertionError) as error:
            sizes = {name: info.num_examples for name, info in held.items()}
            named = ", ".join(f"{name} ({size})" for name, size in sizes.items())
            raise UserError(
                f"{split!r} is not a split of {self.name}, or not a slice of one: "
                f"{named}{nearest(split, sizes)}"
            ) from error
        if count == 0:
            raise UserError(f"split {split!r} of {self.name} is empty")
        return count

    def columns(
        self, split: str, fields: Sequence[str], stride: int = 1
    ) -> Iterator[list[list[Any]]]:
        """Features of every `stride`-th example, in chunks; raises as `num_examples` does."""
        count = self.num_examples(split)
        with self.damage_explained():
            source = self.builder.as_data_source(split=split)
            if len(source) != count:
                raise ValueError(f"{len(source)} examples in {split} instead of {count}")
            every = range(0, count, stride)
            for chunk in chunk_ranges(len(every), CHUNK):
                found = source.__getitems__(every[chunk.start : chunk.stop])
                yield [[each[name] for each in found] for name in fields]

    def texts(self, split: str, stride: int = 1) -> Iterator[tuple[list[str], list[str]]]:
        """Sources and targets of every `stride`-th example, in chunks.

        Raises:
          UserError: as in `num_examples`, or a feature does not exist.
        """
        features = list(self.builder.info.features)
        for knob, name in zip(("data.source", "data.target"), self.fields, strict=True):
            check_choice(features, name, knob)
        for chunk in self.columns(split, self.fields, stride):
            with self.damage_explained():
                sources, targets = ([text.cleaned(x.decode()) for x in side] for side in chunk)
            yield sources, targets


def open_dataset(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The dataset of `config`, which is prepared if necessary.

    Raises:
      UserError: there is none of that name, it cannot be prepared, or it is damaged.
    """
    return DATASETS.get(config.dataset.partition("/")[0], from_tfds)(config, data_dir)


def toy_strings(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """The strings of a toy task."""
    name = f"{config.task}_{config.size}"
    builder = prepare(partial(toy.ToyStrings, config=name), f"toy_strings/{name}", data_dir)
    return PreparedDataset(builder, config.fields())


def text_files(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """Your own text files. A split is a file, or `validation` or `test`, cut from train."""
    files, split_names = files_of_splits(config)
    builder = prepare_files(files, config, data_dir)
    for split in text.CUT.values():
        if getattr(config, split) == split and split not in builder.info.splits:
            raise UserError(
                f"data.{split}={split}: {config.train} is too small to cut one source in a hundred "
                f"from it; name a file, or a slice: --config.data.{split}=train[:10]"
            )
    return PreparedDataset(builder, text.COLUMNS, split_names)


def files_of_splits(config: DataConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Split → its file, and `PreparedDataset.split_names`."""
    files, split_names = {}, {}
    for split in text.SPLITS:
        wanted = getattr(config, split)
        file, bracket, part = wanted.partition("[")
        if file not in text.SPLITS:
            files[split] = file
            split_names[wanted] = f"{split}{bracket}{part}"
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
    if config.dataset == "files":
        own = text.FilesConfig(name=name.split("/")[1], files={}, fields=config.fields())
        make = partial(text.TextPairs, config=own)
        with damage_explained(f"{name} under {data_dir or 'the default of TFDS'}"):
            there = is_prepared(make(data_dir=data_dir))
        if there:
            names = files_of_splits(config)[1]
            return PreparedDataset(prepare(make, name, data_dir), text.COLUMNS, names)
    try:
        return open_dataset(config, data_dir)
    except UserError as error:
        if config.dataset != "files":
            raise
        raise UserError(
            f"{error}; or name the --data_dir that has {name}, or a file of pairs by --data=FILE"
        ) from error


def open_test_files(config: DataConfig, files: str, data_dir: str | None) -> PreparedDataset:
    """A file of pairs, or two, as the split `test`; `config` names the texts of JSON."""
    if not any(text.kind(path) in text.JSON for path in text.paths(files)):
        config = replace(config, source=text.COLUMNS[0], target=text.COLUMNS[1])
    return PreparedDataset(prepare_files({"test": files}, config, data_dir), text.COLUMNS)


def from_tfds(config: DataConfig, data_dir: str | None) -> PreparedDataset:
    """A dataset that is registered with TFDS, such as `wmt14_translate/de-en`.

    Raises:
      UserError: there is none of that name.
    """
    for module in BUILDER_MODULES:
        importlib.import_module(module)
    name = config.dataset

    def make(data_dir: str | None) -> Any:
        try:
            return tfds.builder(name, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            raise UserError(f"data.dataset={name}: {why_unknown(name, error)}") from error

    return PreparedDataset(prepare(make, name, data_dir), config.fields())


def why_unknown(name: str, error: Exception) -> str:
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


def prepare(make: Callable[..., Any], name: str, data_dir: str | None) -> Any:
    """The builder that `make(data_dir=…)` returns, with its dataset `name` prepared on disk.

    Raises:
      UserError: it cannot be prepared, or is damaged.
    """

    def find() -> Any:
        with damage_explained(f"{name} under {data_dir or 'the default of TFDS'}"), quiet():
            return make(data_dir=data_dir)

    builder = find()
    if not is_prepared(builder):
        print(f"preparing {builder.info.full_name} under {builder.data_dir}")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()), quiet():  # TFDS prints notes
                builder.download_and_prepare(file_format="array_record")
        except UserError:
            raise
        except Exception as error:  # TFDS and array_record raise their own types
            builder = find()
            if not is_prepared(builder):  # nor by another process meanwhile
                raise UserError(why_unprepared(builder, error)) from error
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        if not builder.info.splits:  # TFDS accepts any folder of that name
            raise ValueError("it has no splits")
        formats = builder.info.available_file_formats()
    if not formats & tfds.core.FileFormat.with_random_access():
        raise UserError(
            f"the dataset {builder.info.full_name} under {builder.data_dir} is stored as "
            f"{', '.join(each.value for each in formats)}, which only TensorFlow reads; choose "
            "another --data_dir to prepare it again, or convert it with tfds build "
            "--file_format=array_record"
        )
    return builder


def is_prepared(builder: Any) -> bool:
    """Whether a dataset is on disk."""
    with quiet():
        return builder.is_prepared()


def why_unprepared(builder: Any, error: Exception) -> str:
    """Says why a dataset cannot be prepared, and what to do."""
    name, folder = builder.info.full_name, builder.data_dir
    request = getattr(error, "request", None)  # an error of `requests`, which downloads
    if request is not None:
        return (
            f"cannot prepare {name}: {request.url} cannot be reached; check the network, or copy "
            f"the dataset to {folder} from a machine that has one"
        )
    if isinstance(error, ImportError):  # TFDS unpacks archives with TensorFlow
        return (
            f"cannot prepare {name} without the package {error.name}; install it, or run tfds "
            f"build {name.rpartition('/')[0]} --file_format=array_record where it is installed, "
            f"and copy the dataset to {folder}"
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return (
        f"cannot prepare {name} under {folder}: {reason}; choose another --data_dir, or, if it is "
        "downloaded, check that its source can be reached"
    )


@contextlib.contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Turns the errors of TFDS and array_record about unreadable files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a disk error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the dataset {what} is damaged: {reason}; delete its folder to prepare it again"
        ) from error
