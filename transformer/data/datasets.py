"""Datasets by name: `DATASETS`, and all that TFDS knows. Each is prepared when it is first used."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.registered import DatasetNotFoundError

from transformer.data import (
    pronunciations,  # noqa: F401  which registers them with TFDS
    text,
    toy,
)
from transformer.data.data_config import DataConfig
from transformer.errors import UserError, nearest


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


def files(config: DataConfig, data_dir: str | None) -> Opened:
    """Files of one's own: `text`. A split is a file, or `validation` or `test`, cut from train."""
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
    fields = config.fields()
    own = text.FilesConfig(name=text.digest(given, fields), files=given, fields=fields)
    builder = prepared(partial(text.TextPairs, config=own), f"text_pairs/{own.name}", data_dir)
    for split in text.CUT.values():
        if getattr(config, split) == split and split not in builder.info.splits:
            raise UserError(
                f"data.{split}={split}: {config.train} is so small that of one source in a "
                f"hundred none is cut; name a file, or a part, --config.data.{split}=train[:10]"
            )
    return Opened(builder, text.COLUMNS, named)


DATASETS = {"toy_strings": toy_strings, "files": files}


def from_tfds(config: DataConfig, data_dir: str | None) -> Opened:
    """A dataset that TFDS knows, such as `wmt14_translate/de-en`, or `pronunciations/plain`.

    Raises:
      UserError: it knows none of that name.
    """
    import tensorflow_datasets.translate  # noqa: F401  without TensorFlow TFDS does not find them

    name = config.dataset

    def make(data_dir: str | None) -> Any:
        try:
            return tfds.builder(name, data_dir=data_dir)
        except (DatasetNotFoundError, ValueError) as error:
            known = [*DATASETS, *tfds.list_builders(with_community_datasets=False)]
            if name.split("/")[0] in known:  # but not that config of it
                reason = " ".join(str(error).split())[:200]
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
    if not builder.is_prepared():
        print(f"preparing {builder.info.full_name} under {builder.data_dir}")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()), quiet():  # TFDS speaks of downloads
                builder.download_and_prepare(file_format="array_record")
        except UserError:
            raise
        except Exception as error:  # TFDS and array_record each have their own
            builder = find()
            if not builder.is_prepared():  # nor by another process meanwhile
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                raise UserError(
                    f"cannot prepare {builder.info.full_name} under {builder.data_dir}: "
                    f"{reason}; choose another --data_dir, or, if it is downloaded, see that its "
                    "source can be reached"
                ) from error
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        if not builder.info.splits:  # TFDS takes any folder of that name for a dataset
            raise ValueError("it has no splits")
    return builder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what TFDS logs of what is as it should be."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
