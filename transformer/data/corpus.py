"""A dataset with its tokenizers: texts and tokens of each split."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformer.console import progress, status
from transformer.data.batches import Dataset
from transformer.data.config import DataConfig
from transformer.data.datasets import CHUNK, PreparedDataset, damage_explained, open_dataset
from transformer.data.packing import unpacked_rows
from transformer.data.ragged import RaggedArray, TokenPairs, cached_pairs, chunk_ranges
from transformer.data.text import cleaned
from transformer.data.tokenizer import TOKENIZERS, SymbolTokenizer, Tokenizer
from transformer.data.toy import TASKS
from transformer.errors import UserError
from transformer.files import write_atomically
from transformer.parallel import hosts

ENOUGH = 1_000_000  # at most so many texts to learn a tokenizer from
VERSION = 2  # incremented when the pieces or tokens of a text change, which invalidates caches


class Tokenizers(NamedTuple):
    """The tokenizers of both sides; the same object twice if they share a vocabulary."""

    source: Tokenizer
    target: Tokenizer

    def encode(self, sources: Sequence[str], targets: Sequence[str]) -> TokenPairs:
        """The tokens of pairs of texts."""
        tokens = self.source.encode_all(sources), self.target.encode_all(targets)
        return TokenPairs(*map(RaggedArray.from_lists, tokens))

    def unknown(self, pairs: TokenPairs) -> dict[str, tuple[int, int]]:
        """Side → the number of unknown tokens, and of all tokens except EOS."""
        counts = {}
        for name, tokenizer, side in zip(TokenPairs._fields, self, pairs, strict=True):
            count = len(side.values)
            chunks = (side.values[part.start : part.stop] for part in chunk_ranges(count, 1 << 24))
            counts[name] = (sum(map(tokenizer.count_unknown, chunks)), count - len(side))
        return counts

    def digests(self) -> dict[str, str]:
        """Hashes of their pieces, for the record of a run."""
        return {f"{side}_tokenizer": each.digest() for side, each in self._asdict().items()}

    def save(self, folder: Path) -> None:
        """Writes them for `saved_tokenizers`."""
        sides = {"shared": self.source} if self.source is self.target else self._asdict()
        for name, tokenizer in sides.items():
            write_atomically(folder / name, tokenizer.to_bytes())


@dataclass(frozen=True)
class Corpus:
    """A dataset on disk with its tokenizers; splits are in TFDS notation: `train[:10%]`.

    opened: split → its tokens, if already loaded.
    """

    dataset: PreparedDataset
    tokenizers: Tokenizers
    opened: dict[str, TokenPairs] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dataset's name, with its config and version."""
        return self.dataset.name

    def split(self, name: str) -> str:
        """The dataset's name of a split of the config."""
        return self.dataset.split(name)

    def identity(self) -> dict[str, str]:
        """The dataset's name and the digests of the tokenizers, for the record of a run."""
        return {"dataset": self.name} | self.tokenizers.digests()

    def left_out(self) -> str:
        """Says which examples the dataset skipped: `train: 1 empty (line 3)`; empty if unknown."""
        summary = getattr(self.dataset.builder, "left_out", None)
        return summary() if summary else ""

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """The sources and the targets of `split`.

        Raises:
          UserError: there is no such split, it is empty, or its files are damaged.
        """
        sides = zip(*self.dataset.texts(self.split(split)), strict=True)
        sources, targets = (list(itertools.chain.from_iterable(side)) for side in sides)
        return sources, targets

    def references(self, split: str) -> list[list[str]]:
        """The references of each source, the primary one first."""
        dataset = self.dataset
        if "references" not in dataset.builder.info.features:
            return [[target] for target in self.texts(split)[1]]
        chunks = dataset.columns(self.split(split), ["references"])
        return [[cleaned(text.decode()) for text in own] for (chunk,) in chunks for own in chunk]

    def tokens(self, split: str) -> TokenPairs:
        """All tokens of a split, cached in files next to the dataset; raises as `texts` does."""
        name, dataset = self.split(split), self.dataset
        if name in self.opened:
            return self.opened[name]
        chunks = -(-dataset.num_examples(name) // CHUNK)

        def tokenize() -> Iterator[TokenPairs]:
            for sources, targets in progress(dataset.texts(name), chunks, f"tokens of {name}"):
                yield self.tokenizers.encode(sources, targets)

        key = cache_key(f"{name} {dataset.fields} {self.tokenizers.digests()} {VERSION}")
        with dataset.damage_explained():
            found = cached_pairs(Path(dataset.builder.data_dir) / "tokens" / key, tokenize)
        return self.opened.setdefault(name, found)

    def unknown(self, *splits: str) -> str:
        """Describes the unknown tokens of some splits; empty if there are none.

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
        """The tokens of a split as unpacked rows in memory."""
        return Dataset.from_rows(unpacked_rows(self.tokens(split)), batch_size)


def cache_key(made_of: str) -> str:
    """The name of a cached file: a hash of what determines its content."""
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def open_corpus(config: DataConfig, data_dir: str | None, saved: Path | None = None) -> Corpus:
    """The dataset of `config`, which is prepared if necessary, and its tokenizers.

    Hosts may share `data_dir` or have one each: process 0 prepares the dataset before the others.

    Args:
      config: the data section of a config.
      data_dir: where TFDS stores datasets; None: its default.
      saved: where a run stores its tokenizers; None: learn them from the training split.
    """

    def find() -> Corpus:
        dataset = open_dataset(config, data_dir)
        if saved is not None:
            return Corpus(dataset, saved_tokenizers(config, saved))
        return Corpus(dataset, learned_tokenizers(config, dataset))

    return hosts.in_turn(find)


def tokenizer_kinds(config: DataConfig) -> dict[str, str]:
    """`source` and `target`, or `shared` → the kind of the tokenizer."""
    if config.target_tokenizer is None:
        return {"shared": config.tokenizer}
    return {"source": config.tokenizer, "target": config.target_tokenizer}


def saved_tokenizers(config: DataConfig, folder: Path) -> Tokenizers:
    """The tokenizers that a run stored in `folder`.

    Raises:
      UserError: they are missing or damaged.
    """
    made = []
    for side, kind in tokenizer_kinds(config).items():
        try:
            made.append(TOKENIZERS[kind].read((folder / side).read_bytes()))
        except Exception as error:  # SentencePiece raises its own types
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / side} is damaged ({reason}); train again") from error
    return Tokenizers(made[0], made[-1])


def learned_tokenizers(config: DataConfig, dataset: PreparedDataset) -> Tokenizers:
    """Tokenizers learned from the training split, and cached next to the dataset."""
    split = dataset.split(config.train)
    made = []
    for side, kind in tokenizer_kinds(config).items():
        made_of = f"{kind} {side} {split} {dataset.fields} {config.vocab_size} {VERSION}"
        cache = Path(dataset.builder.data_dir) / "tokenizers" / f"{kind}_{cache_key(made_of)}"
        if cache.exists():
            with damage_explained(f"whose tokenizer is {cache}"):
                made.append(TOKENIZERS[kind].read(cache.read_bytes()))
        elif config.dataset == "toy_strings" and kind == "characters":
            task = TASKS[config.task]  # all characters, even of a small split
            made.append(SymbolTokenizer(task.alphabet + task.target_only))
        else:
            made.append(learn(kind, side, config.vocab_size, dataset, split))
            with contextlib.suppress(OSError):  # the folder may be read-only
                write_atomically(cache, made[-1].to_bytes())
    return Tokenizers(made[0], made[-1])


def learn(kind: str, side: str, vocab_size: int, dataset: PreparedDataset, split: str) -> Tokenizer:
    """Learns a tokenizer from at most `ENOUGH` evenly spaced texts of one side, or of both."""
    sides = {"shared": (0, 1), "source": (0,), "target": (1,)}[side]
    count = dataset.num_examples(split) * len(sides)
    stride = -(-count // ENOUGH)
    some = f"{-(-count // stride):,} of " if stride > 1 else ""
    chunks = dataset.texts(split, stride)
    texts = (text for chunk in chunks for which in sides for text in chunk[which])
    with status(f"learning {kind} from {some}{count:,} texts", "learned"):
        return TOKENIZERS[kind].learn(texts, vocab_size)
