"""From a dataset's name to arrays of tokens."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer import hosts
from transformer.data import text, toy
from transformer.data.batches import Dataset
from transformer.data.data_config import DataConfig
from transformer.data.datasets import Opened, damage_explained, open_dataset
from transformer.data.ragged import Ragged
from transformer.data.tokenizer import TOKENIZERS, SymbolTokenizer, Tokenizer
from transformer.errors import UserError, choose, nearest


class Pairs(NamedTuple):
    """Sources, and their targets in the same order, as tokens with EOS at each end."""

    source: Ragged
    target: Ragged

    def sizes(self) -> Int[np.ndarray, "pairs 2"]:
        """Tokens of each source and its target."""
        return np.stack([self.source.lengths(), self.target.lengths()], axis=1)

    def dataset(self, batch_size: int) -> Dataset:
        """All of them, a pair a row."""
        widths = self.sizes().max(0, initial=1).tolist()
        source, target = (side.padded(width) for side, width in zip(self, widths, strict=True))
        return Dataset(source, target, batch_size)


class Tokenizers(NamedTuple):
    """Of the sources and of the targets; the same object twice, where they share a vocabulary."""

    source: Tokenizer
    target: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Of the larger of two vocabularies."""
        return max(self.source.vocab_size, self.target.vocab_size)

    def encode(self, sources: Sequence[str], targets: Sequence[str]) -> Pairs:
        """Texts as tokens."""
        return Pairs(
            Ragged.of(self.source.encode_all(sources)), Ragged.of(self.target.encode_all(targets))
        )

    def digests(self) -> dict[str, str]:
        """Hashes of their pieces, for the record of a run."""
        return {f"{side}_tokenizer": each.digest() for side, each in self._asdict().items()}

    def save(self, folder: Path) -> None:
        """Writes them where `saved_tokenizers` finds those of a run."""
        sides = {"shared": self.source} if self.source is self.target else self._asdict()
        for name, tokenizer in sides.items():
            write_whole(folder / name, tokenizer.to_bytes())


@dataclass(frozen=True)
class Corpus:
    """A dataset that is there, and its tokenizers."""

    opened: Opened
    tokenizers: Tokenizers

    @property
    def name(self) -> str:
        """The dataset's, with its config and version."""
        return self.opened.builder.info.full_name

    def split(self, name: str) -> str:
        """What the dataset calls a split of the config."""
        return self.opened.named.get(name, name)

    def identity(self) -> dict[str, str]:
        """Which dataset and which tokens these are, for the record of a run."""
        return {"dataset": self.name} | self.tokenizers.digests()

    def left_out(self) -> str:
        """Which lines of a person's own files hold no pair, if any: `train: 1 empty (line 3)`."""
        if not isinstance(self.opened.builder, text.TextPairs):
            return ""
        tallies = self.opened.builder.tallies()
        return "; ".join(f"{split}: {tally}" for split, tally in tallies if tally.left_out)

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """The sources and the targets of `split` (TFDS notation: `train`, `train[:10%]`).

        Raises:
          UserError: there is no such split, it is empty, or its files are damaged.
        """
        return read(self.opened, self.split(split))

    def references(self, split: str) -> list[list[str]]:
        """What counts as right for each source of a split: its targets, the first of them first."""
        builder = self.opened.builder
        if "references" not in builder.info.features:
            return [[target] for target in self.texts(split)[1]]
        (several,) = columns(builder, self.split(split), ["references"])
        return [[text.decode() for text in own] for own in several]

    def tokens(self, split: str) -> Pairs:
        """The whole of a split in memory; arguments and errors as of `texts`."""
        return self.tokenizers.encode(*self.texts(split))

    def load(self, split: str, batch_size: int) -> Dataset:
        """`tokens`, a pair a row, in batches of so many."""
        return self.tokens(split).dataset(batch_size)


def learnable(pairs: Pairs, longest: int) -> tuple[Pairs, dict[str, int]]:
    """The pairs that one can learn from, and how many are left out for which reason.

    Args:
      pairs: all there are.
      longest: tokens that a text may have, its end included; 0: as many as it likes.

    Raises:
      UserError: none is left.
    """
    sizes = pairs.sizes()
    empty = sizes.min(1) <= 1
    long = (sizes.max(1) > longest) & ~empty if longest else np.zeros_like(empty)
    counts = {"with an empty text": empty, f"with a text of more than {longest} tokens": long}
    counts = {reason: int(mask.sum()) for reason, mask in counts.items() if mask.any()}
    if not counts:
        return pairs, {}
    (kept,) = np.nonzero(~(empty | long))
    if not kept.size:
        raise UserError(
            f"data.longest={longest}: no example is left, {said(counts)} being left out; raise it, "
            "or set it to 0"
        )
    return Pairs(*(side.take(kept) for side in pairs)), counts


def said(counts: dict[str, int]) -> str:
    """`3 with an empty text, 1 with a text of more than 128 tokens`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def read(opened: Opened, split: str) -> tuple[list[str], list[str]]:
    """`Corpus.texts`, of a split as the dataset calls it."""
    for knob, field in zip(("data.source", "data.target"), opened.fields, strict=True):
        choose(dict(opened.builder.info.features.items()), field, knob)
    sources, targets = columns(opened.builder, split, opened.fields)
    with damage_explained(f"{opened.builder.info.full_name} under {opened.builder.data_dir}"):
        return [text.decode() for text in sources], [text.decode() for text in targets]


def columns(builder: Any, split: str, fields: Sequence[str]) -> list[list[Any]]:
    """Some features of all examples of a split; errors as of `Corpus.texts`."""
    held = builder.info.splits
    try:
        count = held[split].num_examples
        if count < 0:  # its end is before its beginning
            raise ValueError(split)
    except (KeyError, ValueError, AssertionError) as error:
        sizes = {name: info.num_examples for name, info in held.items()}
        named = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise UserError(
            f"split {split!r} is not one, or not a slice of one, of "
            f"{builder.info.full_name}: {named}{nearest(split, sizes)}"
        ) from error
    if count == 0:
        raise UserError(f"split {split!r} of {builder.info.full_name} is empty")
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        source = builder.as_data_source(split=split)
        if len(source) != count:
            raise ValueError(f"{len(source)} examples in {split} instead of {count}")
        examples = source.__getitems__(range(count))
        return [[each[field] for each in examples] for field in fields]


def open_corpus(config: DataConfig, data_dir: str | None, saved: Path | None = None) -> Corpus:
    """The dataset of `config`, prepared now if it never was, and its tokenizers.

    Several hosts may share `data_dir`, or have one each: the first prepares before the others look.

    Args:
      config: which dataset.
      data_dir: where TFDS keeps datasets; None is its own default.
      saved: where a run keeps its tokenizers; None: they are learned from the training split.

    Raises:
      UserError: `data_dir` cannot be written to, or a file is missing, damaged, or no text.
    """

    def find() -> Corpus:
        opened = open_dataset(config, data_dir)
        if saved is not None:
            return Corpus(opened, saved_tokenizers(config, saved))
        return Corpus(opened, learned_tokenizers(config, opened))

    return hosts.in_turn(find)


def sides(config: DataConfig) -> dict[str, str]:
    """The sides that have a tokenizer of their own, or `shared` → its kind."""
    if config.target_tokenizer is None:
        return {"shared": config.tokenizer}
    return {"source": config.tokenizer, "target": config.target_tokenizer}


def saved_tokenizers(config: DataConfig, folder: Path) -> Tokenizers:
    """Those of a run, which keeps them in `folder`.

    Raises:
      UserError: they are not there, or damaged.
    """
    made = []
    for side, kind in sides(config).items():
        try:
            made.append(TOKENIZERS[kind].read((folder / side).read_bytes()))
        except Exception as error:  # SentencePiece has its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / side} is damaged ({reason}); train anew") from error
    return Tokenizers(made[0], made[-1])


def learned_tokenizers(config: DataConfig, opened: Opened) -> Tokenizers:
    """Those of a dataset: learned from its training split, and kept beside it."""
    split = opened.named.get(config.train, config.train)
    made = []
    for side, kind in sides(config).items():
        learned_from = f"{kind} {side} {split} {opened.fields} {config.vocab_size}"
        own = hashlib.sha256(learned_from.encode()).hexdigest()[:16]
        kept = Path(opened.builder.data_dir) / "tokenizers" / f"{kind}_{own}"
        if kept.exists():
            with damage_explained(f"whose tokenizer is {kept}"):
                made.append(TOKENIZERS[kind].read(kept.read_bytes()))
        elif config.dataset == "toy_strings" and kind == "characters":
            made.append(SymbolTokenizer(toy.ALPHABET))  # all of it, however small the split is
        else:
            sources, targets = read(opened, split)
            texts = {"shared": [*sources, *targets], "source": sources, "target": targets}[side]
            print(f"learning {kind} from {len(texts):,} texts")
            made.append(TOKENIZERS[kind].learn(texts, config.vocab_size))
            with contextlib.suppress(OSError):  # others' datasets may only be read
                write_whole(kept, made[-1].to_bytes())
    return Tokenizers(made[0], made[-1])


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_bytes(content)
    fresh.replace(path)
