"""From a dataset's name to arrays of tokens."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from transformer import hosts
from transformer.data import toy
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD, CharTokenizer
from transformer.errors import UserError, choose, nearest, within


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, and which of its splits serve what; `configs/base.py` explains each knob."""

    task: str
    size: str
    train: str
    validation: str
    test: str
    pack: int

    def __post_init__(self):
        within("data.pack", self.pack, 0, 2**20)
        choose(toy.TASKS, self.task, "data.task")
        choose(toy.SIZES, self.size, "data.size")


@dataclass(frozen=True)
class Corpus:
    """A prepared dataset and its tokenizer."""

    builder: Any
    tokenizer: CharTokenizer

    def load(self, split: str, batch_size: int) -> Dataset:
        """The whole of `split` (TFDS notation, such as `train` or `train[:10%]`) in memory.

        Raises:
          UserError: there is no such split, or its files are damaged.
        """
        held = self.builder.info.splits
        try:
            count = held[split].num_examples
            if count < 0:  # its end is before its beginning
                raise ValueError(split)
        except (KeyError, ValueError, AssertionError) as error:
            sizes = {name: info.num_examples for name, info in held.items()}
            named = ", ".join(f"{name} ({size})" for name, size in sizes.items())
            raise UserError(
                f"split {split!r} is not one, or not a slice of one, of "
                f"{self.builder.info.full_name}: {named}{nearest(split, sizes)}"
            ) from error
        if count == 0:
            raise UserError(f"split {split!r} of {self.builder.info.full_name} is empty")
        with damage_explained(f"{self.builder.info.full_name} under {self.builder.data_dir}"):
            source = self.builder.as_data_source(split=split)
            if len(source) != count:
                raise ValueError(f"{len(source)} examples in {split} instead of {count}")
            examples = source.__getitems__(range(count))
            texts = [[each[side].decode() for each in examples] for side in ("source", "target")]
        return Dataset(
            source=self.tokenize(texts[0]),
            target=self.tokenize(texts[1]),
            batch_size=batch_size,
        )

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), longest] int32, padded at the end."""
        rows = [self.tokenizer.encode(text) for text in texts]
        tokens = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
        for row, encoded in zip(tokens, rows, strict=True):
            row[: len(encoded)] = encoded
        return tokens


def open_corpus(config: DataConfig, data_dir: str | None) -> Corpus:
    """The dataset of `config`, prepared now if it never was.

    Several hosts may share `data_dir`, or have one each: the first prepares before the others look.

    Args:
      config: which dataset.
      data_dir: where TFDS keeps datasets; None is its own default.

    Raises:
      UserError: `data_dir` cannot be written to.
    """
    return Corpus(hosts.in_turn(partial(prepared, config, data_dir)), CharTokenizer(toy.ALPHABET))


def prepared(config: DataConfig, data_dir: str | None) -> Any:
    """The dataset's builder, once the dataset is there; arguments and errors: `open_corpus`."""
    name = f"{config.task}_{config.size}"

    def find() -> Any:
        with damage_explained(f"toy_strings/{name} under {data_dir or 'the default of TFDS'}"):
            return toy.ToyStrings(config=name, data_dir=data_dir)

    builder = find()
    if not builder.is_prepared():
        print(f"preparing {builder.info.full_name} under {builder.data_dir}")
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads
                builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # TFDS and array_record each have their own
            builder = find()
            if not builder.is_prepared():  # nor by another process meanwhile
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                raise UserError(
                    f"cannot prepare {builder.info.full_name} under {builder.data_dir}: "
                    f"{reason}; choose another --data_dir"
                ) from error
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        if not builder.info.splits:  # TFDS takes any folder of that name for a dataset
            raise ValueError("it has no splits")
    return builder


@contextlib.contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Turns what TFDS and array_record raise over files that they cannot read into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the disk's, and no damage
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the dataset {what} is damaged: {reason}; delete its folder, and it is prepared anew"
        ) from error
