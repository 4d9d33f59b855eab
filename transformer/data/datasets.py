"""Datasets by name: `DATASETS`, and all that TFDS knows. Each is prepared when it is first used."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader, extractor
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.registered import DatasetNotFoundError

from transformer.console import quiet
from transformer.data import (
    pronunciations,  # noqa: F401  which registers them with TFDS
    text,
    toy,
)
from transformer.data.config import DataConfig
from transformer.errors import UserError, nearest

RETRIES = 7  # of a download, which take 25 s; those of TFDS take 205


class Opened(NamedTuple):
    """A dataset that is there.

    builder: TFDS's.
    fields: what it calls a pair's texts.
    named: what the config calls some of its splits → their names.
    """

    builder: Any
    fields: tuple[str, str]
    named: Mapping[str, str]


def toy_strings(config: DataConfig, data_dir: str | None) -> Opened:
    """Strings of letters that a seed draws: `toy`."""
    name = f"{config.task}_{config.size}"
    builder = prepared(partial(toy.ToyStrings, config=name), f"toy_strings/{name}", data_dir)
    return Opened(builder, config.fields(), {})


def named_files(config: DataConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Of a config that names files: split → its file, and what `Opened.named` is to hold."""
    named, given = {}, {}
    for split in text.SPLITS:
        wanted = getattr(config, split)
        file, bracket, part = wanted.partition("[")
        if file not in text.SPLITS:
            given[split] = file
            named[wanted] = f"{split}{bracket}{part}"
        elif split == "train":
            raise UserError(
                f"data.train={wanted}: data.dataset=files reads a file; name one with pairs "
                "(.tsv, .jsonl), or two: sources,targets"
            )
    return given, named


def files(config: DataConfig, data_dir: str | None) -> Opened:
    """Files of one's own: `text`. A split is a file, or `validation` or `test`, cut from train."""
    given, named = named_files(config)
    builder = text_pairs(given, config, data_dir)
    for split in text.CUT.values():
        if getattr(config, split) == split and split not in builder.info.splits:
            raise UserError(
                f"data.{split}={split}: {config.train} is so small that of one source in a "
                f"hundred none is cut; name a file, or a part, --config.data.{split}=train[:10]"
            )
    return Opened(builder, text.COLUMNS, named)


def text_pairs(given: Mapping[str, str], config: DataConfig, data_dir: str | None) -> Any:
    """The builder of a dataset of the files `given` for some splits."""
    fields = config.fields()
    own = text.FilesConfig(name=text.digest(given, fields), files=dict(given), fields=fields)
    return prepared(partial(text.TextPairs, config=own), f"text_pairs/{own.name}", data_dir)


def reopened(config: DataConfig, name: str, data_dir: str | None) -> Opened:
    """The dataset that a run recorded as `name`; its files may have moved, or changed, since."""
    if config.dataset == "files":
        own = text.FilesConfig(name=name.split("/")[1], files={}, fields=config.fields())
        make = partial(text.TextPairs, config=own)
        with damage_explained(f"{name} under {data_dir or 'the default of TFDS'}"):
            there = is_prepared(make(data_dir=data_dir))
        if there:
            return Opened(prepared(make, name, data_dir), text.COLUMNS, named_files(config)[1])
    try:
        return open_dataset(config, data_dir)
    except UserError as error:
        if config.dataset != "files":
            raise
        raise UserError(
            f"{error}; or name the --data_dir that has {name}, or a file of pairs by --data=FILE"
        ) from error


def evaluated_file(config: DataConfig, name: str, data_dir: str | None) -> Opened:
    """A file of pairs, or two, as the split `test` of a dataset.

    The texts of JSON are called as `config` says; those of columns have no names of their own.
    """
    if not any(text.kind(path) in text.JSON for path in text.paths(name)):
        config = replace(config, source=text.COLUMNS[0], target=text.COLUMNS[1])
    return Opened(text_pairs({"test": name}, config, data_dir), text.COLUMNS, {})


DATASETS = {"toy_strings": toy_strings, "files": files}


def from_tfds(config: DataConfig, data_dir: str | None) -> Opened:
    """A dataset that TFDS knows, such as `wmt14_translate/de-en`, or `pronunciations/plain`.

    Raises:
      UserError: it knows none of that name.
    """
    # Without TensorFlow TFDS does not find these families of datasets by itself.
    import tensorflow_datasets.summarization
    import tensorflow_datasets.text
    import tensorflow_datasets.text_simplification
    import tensorflow_datasets.translate  # noqa: F401

    name = config.dataset

    def make(data_dir: str | None) -> Any:
        try:
            return tfds.builder(name, data_dir=data_dir)
        except (DatasetNotFoundError, ValueError, AssertionError) as error:
            known = [*DATASETS, *tfds.list_builders(with_community_datasets=False)]
            family, _, wanted = name.partition("/")
            if family in known:
                configs = tfds.builder_cls(family).builder_configs
                if wanted and wanted.partition(":")[0] not in configs:
                    names = [f"{family}/{config}" for config in configs] or [family]
                    reason = f"choose one of {', '.join(names)}{nearest(name, names)}"
                else:  # such as a version
                    reason = " ".join(str(error).split()).rpartition('}": ')[2][:200]
                raise UserError(f"data.dataset={name}: {reason}") from error
            raise UserError(
                f"data.dataset={name}: choose one of {', '.join(DATASETS)}, or a name that TFDS "
                f"knows, such as wmt14_translate/de-en{nearest(name, known)}"
            ) from error

    return Opened(prepared(make, name, data_dir), config.fields(), {})


def open_dataset(config: DataConfig, data_dir: str | None) -> Opened:
    """The dataset of `config`, prepared now if it never was.

    Raises:
      UserError: there is none of that name, it cannot be prepared, or it is damaged.
    """
    return DATASETS.get(config.dataset, from_tfds)(config, data_dir)


def prepared(make: Callable, name: str, data_dir: str | None) -> Any:
    """The builder that `make` makes, once its dataset, called `name`, is there.

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
        mend_downloads()
        try:
            with contextlib.redirect_stdout(io.StringIO()), quiet():  # TFDS speaks of downloads
                builder.download_and_prepare(file_format="array_record")
        except UserError:
            raise
        except Exception as error:  # TFDS and array_record each have their own
            builder = find()
            if not is_prepared(builder):  # nor by another process meanwhile
                raise UserError(unprepared(builder, error)) from error
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        if not builder.info.splits:  # TFDS takes any folder of that name for a dataset
            raise ValueError("it has no splits")
        formats = builder.info.available_file_formats()
    if not formats & FileFormat.with_random_access():
        raise UserError(
            f"the dataset {builder.info.full_name} under {builder.data_dir} is kept as "
            f"{', '.join(each.value for each in formats)}, which only TensorFlow reads; choose "
            "another --data_dir, where it is prepared anew, or do that yourself with "
            "file_format=array_record: tfds build --file_format=array_record"
        )
    return builder


def is_prepared(builder: Any) -> bool:
    """Whether a dataset is there."""
    with quiet():
        return builder.is_prepared()


def unprepared(builder: Any, error: Exception) -> str:
    """A line on a dataset that cannot be prepared."""
    request = getattr(error, "request", None)  # of the package requests, which downloads
    if request is not None:
        return (
            f"cannot prepare {builder.info.full_name}: {request.url} cannot be reached; mend the "
            f"network, or copy the dataset to {builder.data_dir} from a machine that has one"
        )
    if isinstance(error, ImportError):  # some read their files with TensorFlow or Beam
        return (
            f"cannot prepare {builder.info.full_name} without the package {error.name}; do that "
            f"where it is installed, tfds build {builder.info.full_name.rpartition('/')[0]} "
            f"--file_format=array_record, and copy it to {builder.data_dir}"
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return (
        f"cannot prepare {builder.info.full_name} under {builder.data_dir}: {reason}; choose "
        "another --data_dir, or, if it is downloaded, see that its source can be reached"
    )


def mend_downloads() -> None:
    """Lets TFDS unpack what it downloads without TensorFlow, and soon see that it has no network.

    It has nothing to do with tensors there: it opens files.
    """
    downloader.MAX_RETRIES = RETRIES
    if importlib.util.find_spec("tensorflow") is None:
        files = SimpleNamespace(gfile=SimpleNamespace(GFile=open))
        extractor.tf = SimpleNamespace(io=files, compat=SimpleNamespace(as_text=str))


@contextlib.contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Turns what TFDS and array_record raise over files that they cannot read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the disk's, and no damage
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the dataset {what} is damaged: {reason}; delete its folder, and it is prepared anew"
        ) from error
