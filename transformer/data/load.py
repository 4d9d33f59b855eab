"""From a dataset's name to arrays of tokens."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from transformer import hosts
from transformer.data import toy
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD, CharTokenizer
from transformer.errors import UserError, choose, nearest


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
        if self.pack < 0:
            raise UserError(f"data.pack={self.pack}: it must be at least 0")
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
          UserError: there is no such split.
        """
        try:
            source = self.builder.as_data_source(split=split)
            empty = len(source) == 0
        except (KeyError, ValueError, AssertionError) as error:
            sizes = {name: info.num_examples for name, info in self.builder.info.splits.items()}
            held = ", ".join(f"{name} ({size})" for name, size in sizes.items())
            raise UserError(
                f"split {split!r} is not one, or not a slice of one, of "
                f"{self.builder.info.full_name}: {held}{nearest(split, sizes)}"
            ) from error
        if empty:
            raise UserError(f"split {split!r} of {self.builder.info.full_name} is empty")
        examples = source.__getitems__(range(len(source)))
        return Dataset(
            source=self.tokenize([example["source"] for example in examples]),
            target=self.tokenize([example["target"] for example in examples]),
            batch_size=batch_size,
        )

    def tokenize(self, texts: Sequence[bytes]) -> np.ndarray:
        """[len(texts), longest] int32, padded at the end."""
        rows = [self.tokenizer.encode(text.decode()) for text in texts]
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
    builder = toy.ToyStrings(config=f"{config.task}_{config.size}", data_dir=data_dir)
    if not builder.is_prepared():
        print(f"preparing {builder.info.full_name} under {builder.data_dir}")
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads
                builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # TFDS and array_record each have their own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot prepare {builder.info.full_name} under {builder.data_dir}: "
                f"{reason}; choose another --data_dir"
            ) from error
    return builder
