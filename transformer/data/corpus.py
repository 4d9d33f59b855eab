"""From a dataset's name to arrays of tokens."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformer.console import progress, status
from transformer.data import toy
from transformer.data.batches import Dataset
from transformer.data.config import DataConfig
from transformer.data.datasets import Opened, damage_explained, open_dataset
from transformer.data.packing import unpacked_rows
from transformer.data.pronunciations import Pronunciations
from transformer.data.ragged import RaggedArray, TokenPairs, cached_pairs, chunk_ranges
from transformer.data.text import TextPairs, cleaned
from transformer.data.tokenizer import TOKENIZERS, SymbolTokenizer, Tokenizer
from transformer.errors import UserError, choose, nearest
from transformer.files import write_whole
from transformer.parallel import hosts

AT_ONCE = 20_000  # examples that are text in memory
ENOUGH = 1_000_000  # texts to learn a tokenizer from
VERSION = 2  # raise it when the same texts give other pieces or tokens: those kept are made again


class Tokenizers(NamedTuple):
    """Of the sources and of the targets; the same object twice, where they share a vocabulary."""

    source: Tokenizer
    target: Tokenizer

    def encode(self, sources: Sequence[str], targets: Sequence[str]) -> TokenPairs:
        """Texts as tokens."""
        tokens = self.source.encode_all(sources), self.target.encode_all(targets)
        return TokenPairs(*map(RaggedArray.from_lists, tokens))

    def unknown(self, pairs: TokenPairs) -> dict[str, tuple[int, int]]:
        """Of each side: its tokens that stand for unknown symbols, and all its tokens, no ends."""
        counts = {}
        for name, tokenizer, side in zip(TokenPairs._fields, self, pairs, strict=True):
            count = len(side.values)
            parts = (side.values[part.start : part.stop] for part in chunk_ranges(count, 1 << 24))
            counts[name] = (sum(map(tokenizer.count_unknown, parts)), count - len(side))
        return counts

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
    """A dataset that is there, and its tokenizers.

    kept: of each split whose tokens were asked for, those.
    """

    opened: Opened
    tokenizers: Tokenizers
    kept: dict[str, TokenPairs] = field(default_factory=dict)

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
        """What the dataset's source holds and it does not, if anything: `train: 1 empty (line 3)`.

        Of what others have prepared nobody knows.
        """
        builder = self.opened.builder
        return builder.left_out() if isinstance(builder, TextPairs | Pronunciations) else ""

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """The sources and the targets of `split` (TFDS notation: `train`, `train[:10%]`).

        Raises:
          UserError: there is no such split, it is empty, or its files are damaged.
        """
        parts = list(texts_in_parts(self.opened, self.split(split)))
        return [each for part in parts for each in part[0]], [
            each for part in parts for each in part[1]
        ]

    def references(self, split: str) -> list[list[str]]:
        """What counts as right for each source of a split: its targets, the first of them first."""
        builder = self.opened.builder
        if "references" not in builder.info.features:
            return [[target] for target in self.texts(split)[1]]
        parts = columns(builder, self.split(split), ["references"])
        return [[cleaned(text.decode()) for text in own] for (part,) in parts for own in part]

    def tokens(self, split: str) -> TokenPairs:
        """The whole of a split, in files beside the dataset; arguments and errors as of `texts`."""
        name = self.split(split)
        if name in self.kept:
            return self.kept[name]
        parts = -(-examples(self.opened.builder, name) // AT_ONCE)

        def make() -> Iterator[TokenPairs]:
            texts = texts_in_parts(self.opened, name)
            for sources, targets in progress(texts, parts, f"tokens of {name}"):
                yield self.tokenizers.encode(sources, targets)

        made_of = f"{name} {self.opened.fields} {self.tokenizers.digests()} {VERSION}"
        own = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        with damage_explained(f"{self.name} under {self.opened.builder.data_dir}"):
            found = cached_pairs(Path(self.opened.builder.data_dir) / "tokens" / own, make)
        return self.kept.setdefault(name, found)

    def unknown(self, *splits: str) -> str:
        """The tokens of some splits that stand for unknown symbols; empty if there are none.

        `validation: source 3 of 1,200 tokens (0.25%), target 1 of 1,300 tokens (0.08%)`
        """
        found = []
        for split in splits:
            sides = [
                f"{side} {count:,} of {tokens:,} tokens ({count / tokens:.2%})"
                for side, (count, tokens) in self.tokenizers.unknown(self.tokens(split)).items()
                if count
            ]
            found += [f"{self.split(split)}: {', '.join(sides)}"] if sides else []
        return "; ".join(found)

    def load(self, split: str, batch_size: int) -> Dataset:
        """`tokens`, a pair a row, in batches of so many."""
        return Dataset.from_rows(unpacked_rows(self.tokens(split)), batch_size)


def texts_in_parts(
    opened: Opened, split: str, stride: int = 1
) -> Iterator[tuple[list[str], list[str]]]:
    """Sources and targets, so many at a time, of a split as the dataset calls it.

    Args:
      opened: the dataset.
      split: which.
      stride: 1, or n for each n-th example.

    Raises:
      UserError: as of `Corpus.texts`.
    """
    for knob, name in zip(("data.source", "data.target"), opened.fields, strict=True):
        choose(dict(opened.builder.info.features.items()), name, knob)
    for part in columns(opened.builder, split, opened.fields, stride):
        with damage_explained(f"{opened.builder.info.full_name} under {opened.builder.data_dir}"):
            sources, targets = ([cleaned(text.decode()) for text in column] for column in part)
        yield sources, targets


def examples(builder: Any, split: str) -> int:
    """How many a split has; errors as of `Corpus.texts`."""
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
    return count


def columns(
    builder: Any, split: str, fields: Sequence[str], stride: int = 1
) -> Iterator[list[list[Any]]]:
    """Some features of a split's examples, so many at a time; errors as of `Corpus.texts`."""
    count = examples(builder, split)
    with damage_explained(f"{builder.info.full_name} under {builder.data_dir}"):
        source = builder.as_data_source(split=split)
        if len(source) != count:
            raise ValueError(f"{len(source)} examples in {split} instead of {count}")
        every = range(0, count, stride)
        for part in chunk_ranges(len(every), AT_ONCE):
            found = source.__getitems__(every[part.start : part.stop])
            yield [[each[field] for each in found] for field in fields]


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
        learned_from = f"{kind} {side} {split} {opened.fields} {config.vocab_size} {VERSION}"
        own = hashlib.sha256(learned_from.encode()).hexdigest()[:16]
        kept = Path(opened.builder.data_dir) / "tokenizers" / f"{kind}_{own}"
        if kept.exists():
            with damage_explained(f"whose tokenizer is {kept}"):
                made.append(TOKENIZERS[kind].read(kept.read_bytes()))
        elif config.dataset == "toy_strings" and kind == "characters":
            made.append(SymbolTokenizer(toy.ALPHABET))  # all of it, however small the split is
        else:
            made.append(learned(kind, side, config.vocab_size, opened, split))
            with contextlib.suppress(OSError):  # others' datasets may only be read
                write_whole(kept, made[-1].to_bytes())
    return Tokenizers(made[0], made[-1])


def learned(kind: str, side: str, vocab_size: int, opened: Opened, split: str) -> Tokenizer:
    """A tokenizer of a split's texts; of more than `ENOUGH` texts, of so many, evenly spread.

    Args:
      kind: one of `TOKENIZERS`.
      side: source, target, or shared, which is both.
      vocab_size: pieces to learn, at most.
      opened: the dataset.
      split: as the dataset calls it.
    """
    taken = {"shared": (0, 1), "source": (0,), "target": (1,)}[side]
    count = examples(opened.builder, split) * len(taken)
    stride = -(-count // ENOUGH)
    some = f"{-(-count // stride):,} of " if stride > 1 else ""
    parts = texts_in_parts(opened, split, stride)
    texts = (text for part in parts for which in taken for text in part[which])
    with status(f"learning {kind} from {some}{count:,} texts", "learned"):
        return TOKENIZERS[kind].learn(texts, vocab_size)
