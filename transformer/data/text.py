"""A corpus of one's own as a TFDS dataset: `text_pairs`, made of files of pairs, a pair a line.

    corpus/train.tsv                  a source, a tab, its target
    corpus/train.de,corpus/train.en   two files: the sources, and their targets in the same order
    corpus/train.jsonl                an object with the two texts, by the names of `fields`

each also compressed, as .gz. The dataset's name has a hash of what is in the files: one that has
changed is another dataset.

Lines. They end with a line feed. White space around a text is not part of it, nor is a byte order
mark (`cleaned`). A line is left out, and counted, if it is no UTF-8, has no pair, or has an empty
text. Files of which more than one line in ten would be left out are refused, and so are two of
unequal length, whose pairs nobody knows.

Splits. `validation` and `test` are files too, or they are cut from the training file: the hash of
a source decides, one source in a hundred goes to each, so that no source is in two of them. A pair
of a given `test` or `validation` is left out of every other split.
"""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import tensorflow_datasets as tfds

from transformer.errors import UserError, choose

SPLITS = ("train", "validation", "test")
JSON = (".jsonl", ".json")
COLUMNS = ("source", "target")  # what the texts of a line of columns are called
CUT = {0: "validation", 1: "test"}  # of a hundred parts of the training file
BLANK = "\ufeff" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # all white space there is
SHOWN = 3  # numbers of lines, of each kind that was left out
MOST = 0.1  # of all lines may be left out


def cleaned(text: object) -> str:
    """`text` without the white space and byte order marks around it.

    Training, evaluation and prediction see each text in this form.

    Raises:
      TypeError: it is no str.
      UnicodeEncodeError: it holds a lone surrogate, which is half a character.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    text.encode()
    return text.strip(BLANK)


class Pair(NamedTuple):
    """A line's number, from 1, and its texts."""

    line: int
    source: str
    target: str


class BrokenLineError(Exception):
    """A line without a pair; says why in a few words."""


@dataclass
class Tally:
    """What was left out of a split's files.

    lines: all that were read.
    left_out: reason → how many, and the numbers of the first.
    """

    lines: int = 0
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leave_out(self, line: int, reason: str) -> None:
        """Counts a line."""
        entry = self.left_out.setdefault(reason, {"count": 0, "lines": []})
        entry["count"] += 1
        if len(entry["lines"]) < SHOWN:
            entry["lines"].append(line)

    def __str__(self) -> str:
        kinds = [
            f"{each['count']:,} {reason} ({numbered('line', each['lines'], each['count'])})"
            for reason, each in self.left_out.items()
        ]
        return "; ".join(kinds)


def numbered(what: str, numbers: Iterable[int], count: int) -> str:
    """`line 3`, or `lines 3, 5, 8, …`, of `count` in all."""
    first = ", ".join(map(str, itertools.islice(numbers, SHOWN)))
    return f"{what}{'s' * (count > 1)} {first}{', …' * (count > SHOWN)}"


def paths(files: str) -> list[Path]:
    """The files of a split.

    Raises:
      UserError: there are more than two, or one is not there.
    """
    found = [Path(name.strip()).expanduser() for name in files.split(",")]
    if len(found) > 2:
        raise UserError(f"{files}: one file with pairs, or two: sources,targets")
    for path in found:
        if not path.is_file():
            raise UserError(
                f"{path}: there is no such file; name one with pairs (.tsv, .jsonl), or two, "
                "sources,targets"
            )
    return found


def digest(files: Mapping[str, str], fields: tuple[str, str]) -> str:
    """A hash of all that decides what the dataset holds."""
    whole = hashlib.sha256(json.dumps([sorted(files), fields]).encode())
    for split in sorted(files):
        for path in paths(files[split]):
            whole.update(f"{len(paths(files[split]))} {kind(path)}".encode())
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def kind(path: Path) -> str:
    """The last part of a file's name, but for .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends.

    Raises:
      UserError: it is compressed, and damaged.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file):
                # `cleaned` comes too late for a line of JSON, which may not begin with one.
                yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged: {error}; fetch or make it anew") from error


def read(files: str, fields: tuple[str, str], tally: Tally) -> Iterator[Pair]:
    """The pairs of a split's files; what is left out goes to `tally`.

    Raises:
      UserError: two files have different numbers of lines, too much is left out, or nothing stays.
    """
    found, lost = paths(files), 0
    parse = parser(found, fields)
    for number, line in enumerate(itertools.zip_longest(*map(lines, found)), 1):
        if None in line:
            counts = [str(sum(1 for _ in lines(path))) for path in found]
            raise UserError(f"{files}: they have {' and '.join(counts)} lines; make them agree")
        tally.lines = number
        try:
            yield Pair(number, *parse(line))
        except BrokenLineError as broken:
            lost += 1
            tally.leave_out(number, str(broken))
    if lost > MOST * tally.lines or lost == tally.lines:
        raise UserError(
            f"{files}: {lost:,} of {tally.lines:,} lines hold no pair: "
            f"{str(tally) or 'it is empty'}; mend the file (a pair a line; of .jsonl data.source "
            "and data.target name the texts)"
        )


def parser(
    found: list[Path], fields: tuple[str, str]
) -> Callable[[tuple[bytes, ...]], tuple[str, str]]:
    """What makes the two texts of a line, or of a line of each of two files.

    It raises a BrokenLineError where there are none.

    Raises:
      UserError: the texts of columns are not called so.
    """
    if len(found) == 1 and kind(found[0]) in JSON:

        def record(decoded: list[str]) -> tuple[str, str]:
            return from_json(decoded[0], fields)

    else:
        for name in fields:
            known: dict[str, None] = dict.fromkeys(COLUMNS)
            choose(known, name, f"the names of the texts of {found[0]}, data.source, data.target")
        first, second = map(COLUMNS.index, fields)

        def record(decoded: list[str]) -> tuple[str, str]:
            both = columns(decoded)
            return both[first], both[second]

    def parse(line: tuple[bytes, ...]) -> tuple[str, str]:
        try:
            source, target = map(cleaned, record([each.decode() for each in line]))
        except UnicodeDecodeError as error:
            raise BrokenLineError("no UTF-8") from error
        except UnicodeEncodeError as error:  # JSON may spell one: "\\ud800"
            raise BrokenLineError("with a lone surrogate") from error
        if not source or not target:
            raise BrokenLineError("empty" if source == target else "with an empty text")
        return source, target

    return parse


def columns(decoded: list[str]) -> list[str]:
    """The two of source<TAB>target, or of two lines."""
    found = decoded if len(decoded) == 2 else decoded[0].split("\t")
    if len(found) != 2:
        blank = not decoded[0].strip()
        raise BrokenLineError("empty" if blank else f"with {len(found) - 1} tabs instead of 1")
    return found


def from_json(line: str, fields: tuple[str, str]) -> tuple[str, str]:
    """The two texts of an object that calls them by the names of `fields`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # such as of 100,000 brackets
        raise BrokenLineError("no JSON" if line.strip() else "empty") from error
    if not isinstance(record, dict):
        raise BrokenLineError("no JSON object")
    for name in fields:
        if not isinstance(record.get(name), str):
            raise BrokenLineError(f"without a text {name!r}")
    return record[fields[0]], record[fields[1]]


def split_of(source: str) -> str:
    """Where a pair of the training file goes, if the splits are cut from it."""
    return CUT.get(int.from_bytes(hashlib.sha256(source.encode()).digest()[:4]) % 100, "train")


def fingerprint(pair: Pair) -> bytes:
    """Eight bytes that tell a pair from all others."""
    return hashlib.sha256(f"{pair.source}\t{pair.target}".encode()).digest()[:8]


@dataclass(kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    """Files for each split, and the names of a pair's texts in JSON."""

    files: dict[str, str]
    fields: tuple[str, str]


class TextPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs of texts out of files; what was left out of them is in the dataset's metadata."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"source": tfds.features.Text(), "target": tfds.features.Text()}
            ),
            supervised_keys=("source", "target"),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = cast(FilesConfig, self.builder_config)
        # A pair of a given test is in no other split, one of a given validation not in train.
        held: dict[str, set[bytes]] = {
            split: {fingerprint(pair) for pair in read(config.files[split], config.fields, Tally())}
            for split in ("test", "validation")
            if split in config.files
        }
        return {
            split: self._generate_examples(split, held)
            for split in SPLITS
            if split in config.files or self._is_cut(split)
        }

    def _is_cut(self, split: str) -> bool:
        """Whether a pair of the training file goes into `split`; of few pairs perhaps none."""
        config = cast(FilesConfig, self.builder_config)
        if "train" not in config.files:
            return False
        pairs = read(config.files["train"], config.fields, Tally())
        return any(split_of(pair.source) == split for pair in pairs)

    def _generate_examples(self, split: str, held: dict[str, set[bytes]]) -> Iterator:
        config, tally = cast(FilesConfig, self.builder_config), Tally()
        own = split if split in config.files else "train"
        is_cut = [name for name in CUT.values() if name not in config.files]
        # Nothing is left out of a given test, and of a given validation what is in that.
        others = {} if own == "test" else {k: seen for k, seen in held.items() if k != own}
        count = 0
        for pair in read(config.files[own], config.fields, tally):
            mark = fingerprint(pair) if others else b""
            if twice := [name for name, seen in others.items() if mark in seen]:
                tally.leave_out(pair.line, f"also in {twice[0]}")
                continue
            place = split_of(pair.source) if own == "train" and is_cut else own
            if split == (place if place in is_cut else own):
                count += 1
                yield pair.line, {"source": pair.source, "target": pair.target}
        if not count:
            raise UserError(f"{config.files[own]}: no pair is left for {split}: {tally}")
        if own == split:
            cast(dict, self.info.metadata)[split] = {
                "lines": tally.lines,
                "left_out": tally.left_out,
            }

    def left_out(self) -> str:
        """What was left out of the files: `train: 1 empty (line 3); test: …`."""
        tallies = {
            split: Tally(**record) for split, record in cast(dict, self.info.metadata).items()
        }
        return "; ".join(f"{split}: {tally}" for split, tally in tallies.items() if tally.left_out)
