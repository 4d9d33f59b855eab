"""Files of one's own: which of their lines are pairs, and where they go."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from tests.helpers import data_config
from transformer.data import text
from transformer.data.load import open_corpus
from transformer.data.rows import learnable
from transformer.errors import UserError

GOOD = [(f"s{k}", f"t {k}") for k in range(400)]


def write(path, lines):
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def tsv(pairs):
    return ["\t".join(pair) for pair in pairs]


def opened(data_dir, train, **changes):
    config = data_config(dataset="files", train=str(train), **changes)
    return open_corpus(config, str(data_dir))


def pairs(corpus, split):
    return list(zip(*corpus.texts(split), strict=True))


def everything(corpus):
    return [pair for split in text.SPLITS for pair in pairs(corpus, split)]


def as_tsv(folder):
    return write(folder / "train.tsv", tsv(GOOD))


def as_gzip(folder):
    return write(folder / "train.tsv.gz", tsv(GOOD))


def as_two_files(folder):
    sources, targets = zip(*GOOD, strict=True)
    return f"{write(folder / 'train.de', sources)},{write(folder / 'train.en.gz', targets)}"


def as_json_lines(folder):
    lines = [json.dumps({"target": target, "source": source, "k": 1}) for source, target in GOOD]
    return write(folder / "train.jsonl", lines)


def as_windows_writes_it(folder):
    path = folder / "train.tsv"
    path.write_bytes("\ufeff".encode() + "".join(line + "\r\n" for line in tsv(GOOD)).encode())
    return str(path)


WAYS = [as_tsv, as_gzip, as_two_files, as_json_lines, as_windows_writes_it]


@pytest.mark.parametrize("write", WAYS)
def test_each_way_to_write_pairs_gives_the_same_ones(write, tmp_path):
    corpus = opened(tmp_path, write(tmp_path))
    assert sorted(everything(corpus)) == sorted(GOOD)
    assert corpus.left_out() == ""
    assert corpus.tokenizers.source is corpus.tokenizers.target


def test_the_fields_of_json_and_the_direction_are_the_configs(tmp_path):
    lines = [json.dumps({"de": source, "en": target}) for source, target in GOOD]
    file = write(tmp_path / "train.jsonl", lines)
    corpus = opened(tmp_path, file, source="en", target="de")
    assert sorted(everything(corpus)) == sorted((b, a) for a, b in GOOD)
    corpus = opened(tmp_path, as_tsv(tmp_path), source="target", target="source")
    assert sorted(everything(corpus)) == sorted((b, a) for a, b in GOOD)


def test_no_source_is_in_two_of_the_splits_that_are_cut(tmp_path):
    many = [(f"s{k % 3_000}", f"t{k}") for k in range(6_000)]
    corpus = opened(tmp_path, write(tmp_path / "train.tsv", tsv(many)))
    sources = {split: {source for source, _ in pairs(corpus, split)} for split in text.SPLITS}
    assert sum(map(len, sources.values())) == len(set().union(*sources.values())) == 3_000
    for split in ("validation", "test"):
        assert 10 < len(sources[split]) < 60  # 30 of 3,000
    assert len(everything(corpus)) == 6_000


def test_pairs_of_a_given_test_are_in_no_other_split(tmp_path):
    files = {
        split: write(tmp_path / f"{split}.tsv", tsv(each))
        for split, each in {
            "train": GOOD[:100],
            "validation": GOOD[90:110],
            "test": GOOD[105:120] + GOOD[:3],
        }.items()
    }
    corpus = opened(tmp_path, **files)
    found = {split: pairs(corpus, files[split]) for split in text.SPLITS}
    assert found["test"] == GOOD[105:120] + GOOD[:3]
    assert found["validation"] == GOOD[90:105]
    assert found["train"] == GOOD[3:90]
    assert corpus.left_out() == (
        "train: 3 also in test (lines 1, 2, 3); 10 also in validation (lines 91, 92, 93, …); "
        "validation: 5 also in test (lines 16, 17, 18, …)"
    )
    with pytest.raises(UserError, match=r"no pair is left for train: 3 also in test \(lines 1"):
        opened(tmp_path, write(tmp_path / "few.tsv", tsv(GOOD[:3])), test=files["test"])
    # A part of a file too.
    assert pairs(corpus, corpus.split(files["test"]) + "[:2]") == GOOD[105:107]


def test_broken_lines_are_left_out_counted_and_shown(tmp_path):
    lines = [line.encode() for line in tsv(GOOD)]
    broken = [
        (3, b"no pair"),
        (9, b""),
        (10, b"only a source\t"),
        (20, b"caf\xe9\tcoffee"),
        (30, b"a\tb\tc"),
        (31, b" \t "),
        (32, b"\t"),
        (33, b"  "),
    ]
    for number, line in broken:
        lines[number - 1] = line
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\n".join(lines))
    corpus = opened(tmp_path, path)
    kept = [pair for k, pair in enumerate(GOOD, 1) if k not in dict(broken)]
    assert sorted(everything(corpus)) == sorted(kept)
    said = corpus.left_out()
    for words in (
        "1 with 0 tabs instead of 1 (line 3)",
        "4 empty (lines 9, 31, 32, …)",
        "1 with an empty text (line 10)",
        "1 no UTF-8 (line 20)",
        "1 with 2 tabs instead of 1 (line 30)",
    ):
        assert words in said
    # What was left out is said at each start, not the first alone.
    assert opened(tmp_path, path).left_out() == said


def test_broken_json_is_left_out_too(tmp_path):
    lines = [json.dumps({"source": source, "target": target}) for source, target in GOOD]
    lines[4:8] = "{", "[1]", '{"source": "a"}', '{"source": 1, "target": 2}'
    corpus = opened(tmp_path, write(tmp_path / "train.jsonl", lines))
    said = corpus.left_out()
    for words in ("1 no JSON (line 5)", "1 no JSON object (line 6)", "without a text 'target'"):
        assert words in said
    assert len(everything(corpus)) == len(GOOD) - 4


REFUSED = {
    "a file that is not there": ("missing.tsv", None, "there is no such file; name one"),
    "an empty one": ("a.tsv", "", "0 of 0 lines hold no pair: it is empty; mend"),
    "nothing but broken lines": (
        "a.tsv",
        "no tab\n" * 20,
        r"20 of 20 lines .*\(lines 1, 2, 3, …\)",
    ),
    "JSON of other names": (
        "a.jsonl",
        '{"de": "a", "en": "b"}\n' * 9,
        r"data\.source and data\.tar",
    ),
    "a split of another kind of dataset": (
        "train",
        None,
        "data.train=train: .* name one with pairs",
    ),
    "a corpus of one line": ("a.tsv", "a\tb\n", r"data\.validation=train\[:10\]"),
    "what is no gzip": ("a.tsv.gz", "a\tb\n", "is damaged: Not a gzipped file.*fetch or make it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_corpus_is_refused_in_a_line(case, tmp_path, monkeypatch):
    name, content, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        opened(tmp_path, name)
    assert "\n" not in str(refused.value)


def test_files_of_unequal_length_are_refused(tmp_path):
    files = [write(tmp_path / "a.de", "abc"), write(tmp_path / "a.en", "ab")]
    with pytest.raises(UserError, match="they have 3 and 2 lines; make them agree"):
        opened(tmp_path, ",".join(files))
    with pytest.raises(UserError, match="one file with pairs, or two"):
        opened(tmp_path, ",".join([*files, files[0]]))


def test_columns_have_two_names_alone(tmp_path):
    with pytest.raises(UserError, match=r"data\.source.*=de: choose one of source, target"):
        opened(tmp_path, as_tsv(tmp_path), source="de", target="en")


def test_a_damaged_archive_is_refused(tmp_path):
    path = Path(as_gzip(tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is damaged: .*; fetch or make"):
        opened(tmp_path, path)


def test_a_file_that_changed_is_another_dataset(tmp_path):
    first = opened(tmp_path, as_tsv(tmp_path))
    assert opened(tmp_path, as_tsv(tmp_path)).name == first.name
    other = opened(tmp_path, write(tmp_path / "train.tsv", tsv(GOOD[:-1])))
    assert other.name != first.name
    assert len(everything(other)) == len(GOOD) - 1
    # Where the file lies does not matter.
    (tmp_path / "elsewhere").mkdir()
    assert opened(tmp_path, as_tsv(tmp_path / "elsewhere")).name == first.name


def test_any_bytes_are_pairs_or_are_counted(tmp_path):
    """Random files: what is kept and what is left out make up the whole."""
    rng = random.Random(0)
    for _ in range(20):
        path = tmp_path / "a.tsv"
        odd = [b"", b"\t", b"a\tb", b"\xff\t1", b"\x00\tb", b"a\tb\tc", "é\t東".encode()]
        lines = [b"s%d\tt" % k for k in range(60)] + [rng.choice(odd) for _ in range(5)]
        rng.shuffle(lines)
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n"]))
        tally = text.Tally()
        kept = list(text.read(str(path), text.COLUMNS, tally))
        lost = sum(each["count"] for each in tally.left_out.values())
        assert len(kept) + lost == tally.lines
        assert tally.lines in (65, 64)  # a last empty line without an end is none
        assert all(pair.source and pair.target for pair in kept)


def test_long_and_empty_examples_are_left_out_of_training_alone(tmp_path):
    corpus = opened(tmp_path, as_tsv(tmp_path))
    tokens = corpus.tokenizers.encode(["ab", "", "abcd", "a", "s"], ["t", "t", "s", "", "stst"])
    assert learnable(tokens, 3)[0].tolist() == [0]  # whose source has three tokens
    kept, counts = learnable(tokens, 4)
    assert kept.tolist() == [0]
    assert counts == {"with an empty text": 2, "with a text of more than 4 tokens": 2}
    kept, counts = learnable(tokens, 0)
    assert kept.tolist() == [0, 2, 4]
    with pytest.raises(UserError, match=r"data\.longest=1: no example is left, 2 with an empty"):
        learnable(tokens, 1)
