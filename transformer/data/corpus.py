"""A dataset with its tokenizers: texts and tokens of each split."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformer.console import progress, status
from transformer.data.batches import Dataset
from transformer.data.datasets import CHUNK, DataConfig, PreparedDataset, open_dataset
from transformer.data.packing import RaggedArray, TokenPairs, cached_pairs, unpacked_rows
from transformer.data.tokenizer import TOKENIZERS, GivenTokenizer, SymbolTokenizer, Tokenizer
from transformer.data.toy import TASKS
from transformer.errors import UserError, explained
from transformer.files import write_atomically
from transformer.parallel import hosts

ENOUGH = 1_000_000  # at most so many texts to learn a tokenizer from
VERSION = 3  # incremented when pieces, tokens or their files change, which invalidates caches
Kind = str | Path  # of a tokenizer: an entry of TOKENIZERS, or the file of a SentencePiece model


class Tokenizers(NamedTuple):
    """The tokenizers of both sides; of a shared vocabulary the same, or two sides of one."""

    source: Tokenizer
    target: Tokenizer

    def encode(self, sources: Sequence[str], targets: Sequence[str]) -> TokenPairs:
        tokens = self.source.encode_all(sources), self.target.encode_all(targets)
        return TokenPairs(*map(RaggedArray.from_lists, tokens))

    def prefixed(self, source: str | None, target: str | None) -> "Tokenizers":
        """Tokenizers with other prefixes; None: as they are. See `ImportedTokenizer.prefixed`."""
        if self.shared():
            return Tokenizers(*self.source.prefixed(source, target).sides())
        sides = self.source.prefixed(source), self.target.prefixed(None, target)
        return Tokenizers(sides[0].sides()[0], sides[1].sides()[1])

    def shared(self) -> bool:
        """Whether both are one tokenizer, or the two sides of one."""
        return self.source.sides() == self.target.sides()

    def digests(self) -> dict[str, str]:
        """Hashes of their pieces, for the record of a run."""
        return {f"{side}_tokenizer": each.digest() for side, each in self._asdict().items()}

    def save(self, folder: Path) -> None:
        """Writes them for `saved_tokenizers`."""
        sides = {"shared": self.source} if self.shared() else self._asdict()
        for name, tokenizer in sides.items():
            write_atomically(folder / name, tokenizer.to_bytes())


@dataclass(frozen=True)
class Corpus:
    """A dataset on disk with its tokenizers; splits are in TFDS notation: `train[:10%]`."""

    dataset: PreparedDataset
    tokenizers: Tokenizers
    opened: dict[str, TokenPairs] = field(default_factory=dict)  # split → its tokens, once loaded

    def identity(self) -> dict[str, str]:
        """The dataset's name and the digests of the tokenizers, for the record of a run."""
        return {"dataset": self.dataset.name} | self.tokenizers.digests()

    def left_out(self) -> str:
        """Says which examples the dataset skipped: `train: 1 empty (line 3)`; empty if unknown."""
        return getattr(self.dataset.builder, "left_out", str)()

    def texts(self, split: str, *fields: str) -> tuple[list[Any], ...]:
        """The sources and the targets of `split`, or other fields."""
        columns = zip(*self.dataset.texts(split, fields=fields), strict=True)
        return tuple(list(itertools.chain.from_iterable(column)) for column in columns)

    def references(self, split: str) -> list[list[str]]:
        """The references of each source, the primary one first."""
        if "references" in self.dataset.builder.info.features:
            return self.texts(split, "references")[0]
        return [[target] for target in self.texts(split)[1]]

    def tokens(self, split: str) -> TokenPairs:
        """All tokens of a split, cached in files next to the dataset."""
        name, dataset = self.dataset.split(split), self.dataset
        if name in self.opened:
            return self.opened[name]
        chunks = -(-dataset.num_examples(name) // CHUNK)

        def tokenize() -> Iterator[TokenPairs]:
            for texts in progress(dataset.texts(name), chunks, f"tokens of {name}"):
                yield self.tokenizers.encode(*texts)

        key = _cache_key(f"{name} {dataset.fields} {self.tokenizers.digests()} {VERSION}")
        folder = Path(dataset.builder.data_dir) / "tokens" / key
        return self.opened.setdefault(name, cached_pairs(folder, tokenize))

    def unknown(self, *splits: str) -> str:
        """Describes the unknown tokens of some splits; empty if there are none.

        `validation: source 3 of 1,200 tokens (0.25%), target 1 of 1,300 tokens (0.08%)`
        """
        found = []
        for split in splits:
            sides = []
            for side, rows in self.tokens(split)._asdict().items():
                total = len(rows.values) - len(rows)  # without EOS
                if count := getattr(self.tokenizers, side).count_unknown(rows.values):
                    sides.append(f"{side} {count:,} of {total:,} tokens ({count / total:.2%})")
            found += [f"{self.dataset.split(split)}: {', '.join(sides)}"] if sides else []
        return "; ".join(found)

    def load(self, split: str, batch_size: int) -> Dataset:
        """The tokens of a split as unpacked rows in memory."""
        return Dataset.from_rows(unpacked_rows(self.tokens(split)), batch_size)


def open_corpus(config: DataConfig, data_dir: str | None, saved: Path | None = None) -> Corpus:
    """The dataset of `config`, which is prepared if necessary, and its tokenizers.

    Hosts may share `data_dir` or have one each: process 0 prepares the dataset before the others.
    Tokenizers are read from the folder `saved` of a run, or from files that the config names, or
    learned from the training split.
    """

    def find() -> Corpus:
        dataset = open_dataset(config, data_dir)
        if saved is None:
            return Corpus(dataset, _new_tokenizers(config, dataset))
        found = saved_tokenizers(config, saved)
        files = config.tokenizer_model, config.target_tokenizer_model
        for file, kept in zip(files, found, strict=True):  # a run does not need its files
            if file and Path(file).is_file() and Path(file).read_bytes() != kept.to_bytes():
                remedy = "bring that file back, or train another run with this one"
                raise UserError(f"{file} is not the tokenizer of {saved.parent}; {remedy}")
        return Corpus(dataset, found)

    return hosts.in_turn(find)


def _for_sides(config: DataConfig, make: Callable[[str, Kind], Tokenizer]) -> Tokenizers:
    """The tokenizers `make(side, kind)`; the side is `shared` if both have the same one."""
    source: Kind = Path(config.tokenizer_model) if config.tokenizer_model else config.tokenizer
    file = config.target_tokenizer_model
    target: Kind | None = Path(file) if file else config.target_tokenizer
    if target is None:
        return Tokenizers(*make("shared", source).sides())
    sides = make("source", source).sides(), make("target", target).sides()
    return Tokenizers(sides[0][0], sides[1][1])


def _read(kind: Kind, path: Path, fault: str) -> Tokenizer:
    read = TOKENIZERS[kind].read if isinstance(kind, str) else GivenTokenizer
    with explained(f"{path} {fault}"):
        return read(path.read_bytes())


def saved_tokenizers(config: DataConfig, folder: Path) -> Tokenizers:
    """The tokenizers that a run stored in `folder`."""
    fault = "is damaged ({reason}); train again"
    return _for_sides(config, lambda side, kind: _read(kind, folder / side, fault))


def _new_tokenizers(config: DataConfig, dataset: PreparedDataset) -> Tokenizers:
    """Given tokenizers, and others learned from the training split, cached next to the dataset."""
    split = dataset.split(config.train)

    def find(side: str, kind: Kind) -> Tokenizer:
        if isinstance(kind, Path):
            knob = f"data.{'target_' * (side == 'target')}tokenizer_model"
            if not kind.is_file():
                raise UserError(f"{knob}={kind}: there is no such file; name a SentencePiece model")
            return _read(kind, kind, f"is no SentencePiece model ({{reason}}); change {knob}")
        made_of = f"{kind} {side} {split} {dataset.fields} {config.vocab_size} {VERSION}"
        cache = Path(dataset.builder.data_dir) / "tokenizers" / f"{kind}_{_cache_key(made_of)}"
        if cache.exists():
            return _read(kind, cache, "is damaged ({reason}); delete it")
        if config.dataset == "toy_strings" and kind == "characters":
            task = TASKS[config.task]  # all characters, even of a small split
            return SymbolTokenizer(task.alphabet + task.target_only)
        # Learned from at most `ENOUGH` evenly spaced texts of one side, or of both.
        sides = {"shared": (0, 1), "source": (0,), "target": (1,)}[side]
        count = dataset.num_examples(split) * len(sides)
        stride = -(-count // ENOUGH)
        chunks = dataset.texts(split, stride)
        texts = (text for chunk in chunks for which in sides for text in chunk[which])
        with status(f"learning {kind} from {-(-count // stride):,} texts", "learned"):
            tokenizer = TOKENIZERS[kind].learn(texts, config.vocab_size)
        with contextlib.suppress(OSError):  # the folder may be read-only
            write_atomically(cache, tokenizer.to_bytes())
        return tokenizer

    return _for_sides(config, find)


def _cache_key(made_of: str) -> str:
    """The name of a cached file: a hash of what determines its content."""
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
