"""Files of text pairs as the TFDS dataset `text_pairs`; docs/data.md describes their formats.

`validation` and `test` are files too, or are cut from the training file by the hash of a source. A
pair of a given file is removed from the splits before it. The dataset's name contains a hash of
the files' content, so a changed file is another dataset.
"""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

from transformer.errors import UserError, check_choice, explained

SPLITS = ("train", "validation", "test")
JSON = (".jsonl", ".json")
COLUMNS = ("source", "target")  # the names of the texts of all other files
CUT = {0: "validation", 1: "test"}  # hash of a source, modulo 100 → its split; others: train
BLANK = "\ufeff" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # all white space
SHOWN = 3  # line numbers shown for each reason
MOST = 0.1  # the largest fraction of lines that may be skipped


def cleaned(text: object) -> str:
    """`text` without white space and byte order marks around it, as all of the library sees it.

    Raises a TypeError if it is not a str, a UnicodeEncodeError if it has a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    text.encode()
    return text.strip(BLANK)


class Tally(dict[str, dict[str, Any]]):
    """Reason → the `count` of lines that were skipped for it, and the first of their numbers."""

    def add(self, reason: str, line: int) -> None:
        entry = self.setdefault(reason, {"count": 0, "lines": []})
        entry["count"] += 1
        entry["lines"] = [*entry["lines"], line][:SHOWN]

    def __str__(self) -> str:
        return "; ".join(
            f"{each['count']:,} {reason} ({numbered('line', each['lines'], each['count'])})"
            for reason, each in self.items()
        )


def numbered(what: str, numbers: Iterable[int], count: int) -> str:
    """`line 3`, or `lines 3, 5, 8, …`, of `count` in all."""
    first = ", ".join(map(str, itertools.islice(numbers, SHOWN)))
    return f"{what}{'s' * (count > 1)} {first}{', …' * (count > SHOWN)}"


def paths(files: str) -> list[Path]:
    """The files of a split."""
    found = [Path(name.strip()).expanduser() for name in files.split(",")]
    remedy = "name one file with pairs (.tsv, .jsonl), or two: sources,targets"
    if len(found) > 2:
        raise UserError(f"{files}: {remedy}")
    for path in found:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; {remedy}")
    return found


def kind(path: Path) -> str:
    """The suffix of a file's name, without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def digest(files: Mapping[str, str], fields: tuple[str, str]) -> str:
    """A hash of everything that determines the dataset's content."""
    whole = hashlib.sha256(json.dumps([sorted(files), fields]).encode())
    for split in sorted(files):
        for path in (found := paths(files[split])):
            whole.update(f"{len(found)} {kind(path)}".encode())
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends."""
    damaged = f"{path} is damaged: {{reason}}; fetch it or make it again"
    with (
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
        explained(damaged, EOFError, zlib.error, gzip.BadGzipFile),
    ):
        for number, line in enumerate(file):
            # JSON may not begin with a byte order mark.
            yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")


def _parse(line: tuple[bytes, ...], fields: tuple[str, str], is_json: bool) -> list[str] | str:
    """The texts of a line, or of a line of each of two files; or the reason why there are none."""
    try:
        columns = [each.decode() for each in line]
        if not "".join(columns).strip(BLANK):
            return "empty"
        if is_json:
            record: Any = json.loads(columns[0])
        else:
            columns = columns if len(line) == 2 else columns[0].split("\t")
            if len(columns) != 2:
                return f"with {len(columns) - 1} tabs instead of 1"
            record = dict(zip(COLUMNS, columns, strict=True))
        if not isinstance(record, dict):
            return "not a JSON object"
        for name in fields:
            if not isinstance(record.get(name), str):
                return f"without a text {name!r}"
        texts = [cleaned(record[name]) for name in fields]
    except UnicodeDecodeError:
        return "not UTF-8"
    except UnicodeEncodeError:  # JSON can spell one: "\\ud800"
        return "with a lone surrogate"
    except (ValueError, RecursionError):  # RecursionError: 100,000 brackets
        return "not JSON"
    return texts if all(texts) else "with an empty text" if any(texts) else "empty"


def split_of(source: str, modulus: int = 100, cut: Mapping[int, str] = CUT) -> str:
    """The split of a pair whose split is not given, by the hash of its source."""
    number = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4])
    return cut.get(number % modulus, "train")


def _fingerprint(source: str, target: str) -> bytes:
    return hashlib.sha256(f"{source}\t{target}".encode()).digest()[:8]


@dataclass(kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    """The files of each split, and the names of a pair's texts."""

    files: dict[str, str]
    fields: tuple[str, str]

    def read(self, split: str, tally: Tally) -> Iterator[tuple[int, str, str]]:
        """Line numbers, sources and targets of a split; `tally` counts the other lines."""
        files, found, number, skipped = self.files[split], paths(self.files[split]), 0, 0
        is_json = len(found) == 1 and kind(found[0]) in JSON
        for name in () if is_json else self.fields:
            knobs = f"the names of the texts of {found[0]}, data.source, data.target"
            check_choice(COLUMNS, name, knobs)
        for number, line in enumerate(itertools.zip_longest(*map(_lines, found)), 1):
            if None in line:
                counts = [str(sum(1 for _ in _lines(path))) for path in found]
                raise UserError(f"{files}: they have {' and '.join(counts)} lines; make them agree")
            texts = _parse(line, self.fields, is_json)
            if isinstance(texts, str):
                skipped += 1
                tally.add(texts, number)
            else:
                yield number, texts[0], texts[1]
        if skipped > MOST * number or skipped == number:
            raise UserError(
                f"{files}: {skipped:,} of {number:,} lines have no pair: "
                f"{str(tally) or 'it is empty'}; correct the file (one pair per line; for .jsonl "
                "data.source and data.target name the texts)"
            )


def dataset_info(
    builder: tfds.core.DatasetBuilder, references: bool = False, **options: Any
) -> tfds.core.DatasetInfo:
    """The description of a dataset of sources and targets, and maybe lists of references."""
    text = tfds.features.Text()
    features: dict[str, Any] = {"source": text, "target": text}
    if references:
        features["references"] = tfds.features.Sequence(text)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.__doc__,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=COLUMNS,
        **options,
    )


class TextPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs of texts from files; the dataset's metadata records the skipped lines."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self, disable_shuffling=True, metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = cast(FilesConfig, self.builder_config)
        # Pairs of a given test file are in no other split; those of validation not in train.
        held_out = {
            split: {_fingerprint(*texts) for _, *texts in config.read(split, Tally())}
            for split in ("test", "validation")
            if split in config.files
        }
        splits = set(config.files)
        if "train" in splits and len(splits) < len(SPLITS):  # few pairs may not fill each
            splits |= {split_of(source) for _, source, _ in config.read("train", Tally())}
        return {k: self._generate_examples(k, held_out) for k in SPLITS if k in splits}

    def _generate_examples(self, split: str, held_out: dict[str, set[bytes]]) -> Iterator:
        config, tally, count = cast(FilesConfig, self.builder_config), Tally(), 0
        own = split if split in config.files else "train"
        others = {k: seen for k, seen in held_out.items() if own != "test" and k != own}
        for line, source, target in config.read(own, tally):
            mark = _fingerprint(source, target)
            if twice := [name for name, seen in others.items() if mark in seen]:
                tally.add(f"also in {twice[0]}", line)
                continue
            place = split_of(source) if own == "train" else own
            if split == (own if place in config.files else place):
                count += 1
                yield line, {"source": source, "target": target}
        if not count:
            raise UserError(f"{config.files[own]}: no pair is left for {split}: {tally}")
        if own == split:
            cast(dict, self.info.metadata)[split] = {"left_out": tally}

    def left_out(self) -> str:
        """Says which lines were skipped: `train: 1 empty (line 3); test: …`."""
        records = cast(dict, self.info.metadata).items()
        tallies = {split: str(Tally(record["left_out"])) for split, record in records}
        return "; ".join(f"{split}: {tally}" for split, tally in tallies.items() if tally)
