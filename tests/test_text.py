"""Files of your own text: which lines are pairs, and their splits."""

import gzip
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests.helpers import data_config, refused
from tests.test_config import resolved
from tests.test_tokenizer import model_of
from transformer.config import differences
from transformer.data import text
from transformer.data.corpus import open_corpus
from transformer.data.packing import filter_by_length

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


def as_tsv(folder, name="train.tsv"):
    return write(folder / name, tsv(GOOD))


def as_json_lines(folder, source="source", target="target"):
    lines = [json.dumps({target: pair[1], source: pair[0], "k": 1}) for pair in GOOD]
    return write(folder / "train.jsonl", lines)


def as_two_files(folder):
    sources, targets = zip(*GOOD, strict=True)
    return f"{write(folder / 'train.de', sources)},{write(folder / 'train.en.gz', targets)}"


def as_windows_writes_it(folder):
    # Two files were joined, so that there is a byte order mark between them.
    first, *others = (f" {line}\u3000\r" for line in tsv(GOOD))
    return write(folder / "train.tsv", ["\ufeff" + first, "\ufeff \ufeff" + others[0], *others[1:]])


AS_GZIP = partial(as_tsv, name="train.tsv.gz")
FORMS = [as_tsv, AS_GZIP, as_two_files, as_json_lines, as_windows_writes_it]


@pytest.mark.parametrize("form", FORMS)
def test_each_format_gives_the_same_pairs(form, tmp_path):
    corpus = opened(tmp_path, form(tmp_path))
    assert sorted(everything(corpus)) == sorted(GOOD)
    assert corpus.left_out() == ""
    assert corpus.tokenizers.source is corpus.tokenizers.target


def test_the_fields_of_json_and_the_direction_are_the_configs(tmp_path):
    for file, names in (
        (as_json_lines(tmp_path, "de", "en"), {"source": "en", "target": "de"}),
        (as_tsv(tmp_path), {"source": "target", "target": "source"}),
    ):
        found = everything(opened(tmp_path, file, **names))
        assert sorted(found) == sorted((b, a) for a, b in GOOD)
    message = r"data\.source.*=de: choose one of source, target"
    refused(message, opened, tmp_path, file, source="de", target="en")


def test_no_source_is_in_two_of_the_splits_that_are_cut(tmp_path):
    many = [(f"s{k % 3_000}", f"t{k}") for k in range(6_000)]
    corpus = opened(tmp_path, write(tmp_path / "train.tsv", tsv(many)))
    sources = {split: {source for source, _ in pairs(corpus, split)} for split in text.SPLITS}
    assert sum(map(len, sources.values())) == len(set().union(*sources.values())) == 3_000
    assert all(10 < len(sources[split]) < 60 for split in ("validation", "test"))  # 30 of 3,000
    assert len(everything(corpus)) == 6_000


def test_pairs_of_a_given_test_are_in_no_other_split(tmp_path):
    given = {"train": GOOD[:100], "validation": GOOD[90:110], "test": GOOD[105:120] + GOOD[:3]}
    files = {split: write(tmp_path / f"{split}.tsv", tsv(each)) for split, each in given.items()}
    corpus = opened(tmp_path, **files)
    found = {split: pairs(corpus, file) for split, file in files.items()}
    assert found == given | {"validation": GOOD[90:105], "train": GOOD[3:90]}
    assert corpus.left_out() == (
        "train: 3 also in test (lines 1, 2, 3); 10 also in validation (lines 91, 92, 93, …); "
        "validation: 5 also in test (lines 16, 17, 18, …)"
    )
    few = write(tmp_path / "few.tsv", tsv(GOOD[:3]))
    message = r"no pair is left for train: 3 also in test \(lines 1"
    refused(message, opened, tmp_path, few, test=files["test"])
    assert pairs(corpus, "test[:2]") == GOOD[105:107]


def test_broken_lines_are_left_out_counted_and_shown(tmp_path):
    lines, path = dict(enumerate((line.encode() for line in tsv(GOOD)), 1)), tmp_path / "train.tsv"
    broken = {3: b"no pair", 9: b"", 10: b"only a source\t", 20: b"caf\xe9\tcoffee"}
    broken |= {30: b"a\tb\tc", 31: b" \t ", 32: b"\t", 33: b"  "}
    path.write_bytes(b"\n".join((lines | broken).values()))
    corpus = opened(tmp_path, path)
    kept = [pair for k, pair in enumerate(GOOD, 1) if k not in broken]
    assert sorted(everything(corpus)) == sorted(kept)
    said = (
        "train: 1 with 0 tabs instead of 1 (line 3); 4 empty (lines 9, 31, 32, …); 1 with an empty "
        "text (line 10); 1 not UTF-8 (line 20); 1 with 2 tabs instead of 1 (line 30)"
    )
    assert corpus.left_out() == opened(tmp_path, path).left_out() == said  # at each start
    lines = [json.dumps({"source": source, "target": target}) for source, target in GOOD]
    lines[4:8] = "{", "[1]", '{"source": "a"}', '{"source": 1, "target": 2}'
    lines[8:10] = "[" * 100_000, r'{"source": "\ud800", "target": "a"}'
    corpus = opened(tmp_path, write(tmp_path / "train.jsonl", lines))
    assert corpus.left_out() == (
        "train: 2 not JSON (lines 5, 9); 1 not a JSON object (line 6); 1 without a text 'target' "
        "(line 7); 1 without a text 'source' (line 8); 1 with a lone surrogate (line 10)"
    )
    assert len(everything(corpus)) == len(GOOD) - 6


def test_unknown_symbols_are_counted(tmp_path):
    """Of each split and side; those that `vocab_size` leaves no room for too."""
    splits = {"train": [("a b", "c")] * 5, "validation": [("a x é", "c")], "test": [("b", "<eos>")]}
    files = {split: write(tmp_path / split, tsv(each)) for split, each in splits.items()}
    said = "validation: source 2 of {} tokens ({}%); test: target {} of {} tokens (100.00%)".format
    wanted = {"words": said(3, "66.67", 1, 1), "characters": said(5, "40.00", 5, 5), "bytes": ""}
    for tokenizer, expected in wanted.items():
        corpus = opened(tmp_path, **files, tokenizer=tokenizer)
        assert corpus.unknown(*files.values()) == expected
    many = write(tmp_path / "many.tsv", [f"w{k}\tx x" for k in range(300)])
    corpus = opened(tmp_path, many, tokenizer="words", vocab_size=264, test="train[:9]")
    assert corpus.unknown(many).startswith("train: source ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.tsv", None, "there is no such file; name one"),
        ("a.tsv", "", "0 of 0 lines have no pair: it is empty; corr"),
        ("a.tsv", "no tab\n" * 20, r"20 of 20 lines .*\(lines 1, 2, 3, …\)"),
        ("a.jsonl", '{"de": "a", "en": "b"}\n' * 9, r"data\.source and data\.tar"),
        ("train", None, "data.train=train: .* name one with pairs"),
        ("a.tsv.gz", "a\tb\n", "is damaged: Not a gzipped file.*fetch it or make"),
        ("a.de,b.en", "3 lines", "they have 3 and 2 lines; make them agree"),
        ("a.de,b.en,a.de", "3 lines", "name one file with pairs .*, or two"),
        ("train.tsv.gz", "cut off", r"train\.tsv\.gz is damaged: .*; fetch it or make"),
    ],
)
def test_files_without_pairs_are_refused_in_a_line(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "3 lines":
        write(Path("a.de"), "abc")
        write(Path("b.en"), "ab")
    elif content == "cut off":
        Path(as_tsv(Path(), name)).write_bytes(Path(name).read_bytes()[:-20])
    elif content is not None:
        Path(name).write_text(content, encoding="utf-8")
    refused(message, opened, tmp_path, name)


def test_a_file_that_changed_is_another_dataset(tmp_path):
    first = opened(tmp_path, as_tsv(tmp_path)).dataset.name
    (tmp_path / "elsewhere").mkdir()  # the path of a file does not matter
    for folder in (tmp_path, tmp_path / "elsewhere"):
        assert opened(tmp_path, as_tsv(folder)).dataset.name == first
    other = opened(tmp_path, write(tmp_path / "train.tsv", tsv(GOOD[:-1])))
    assert other.dataset.name != first
    assert len(everything(other)) == len(GOOD) - 1
    (tmp_path / "one.tsv").write_text("a\tb\n")  # too few to cut a validation split
    one = opened(tmp_path, tmp_path / "one.tsv")
    refused(r"'validation' is not a split .*such as train\[:10\]", one.texts, "validation")


def test_long_and_empty_examples_are_left_out_of_training(tmp_path):
    corpus = opened(tmp_path, as_tsv(tmp_path))
    tokens = corpus.tokenizers.encode(["ab", "", "abcd", "a", "s"], ["t", "t", "s", "", "stst"])
    for longest, expected in {3: [0], 4: [0], 0: [0, 2, 4]}.items():  # the first has 3 tokens
        kept, left_out = filter_by_length(tokens, longest)
        assert kept.tolist() == expected
        long = f", 2 with a text of more than {longest} tokens" if longest else ""
        assert left_out == f"2 with an empty text{long}"
    refused(r"data\.max_length=1 leaves no .*\(2 with an empty", filter_by_length, tokens, 1)


def given_models(folder):
    """Two files of models, and what is in them."""
    contents = [model_of(name) for name in ("T5", "bpe")]
    for name, content in zip("ab", contents, strict=True):
        (folder / name).write_bytes(content)
    return str(folder / "a"), str(folder / "b"), contents


def test_a_given_model_is_used_instead_of_learning_and_kept_with_the_run(tmp_path):
    (file, other, contents), run = given_models(tmp_path), tmp_path / "run" / "tokenizers"
    options = {"dataset": "files", "train": as_tsv(tmp_path), "tokenizer": "words"}
    config = data_config(**options, tokenizer_model=file)
    corpus = open_corpus(config, str(tmp_path))
    source, target = corpus.tokenizers
    assert source is target
    assert source.to_bytes() == contents[0]
    corpus.tokenizers.save(run)
    tokens = corpus.tokens(options["train"])
    Path(other).replace(file)  # to which the cached tokens do not belong
    changed = open_corpus(config, str(tmp_path)).tokens(options["train"])
    assert changed.source.values.tolist() != tokens.source.values.tolist()
    again = partial(open_corpus, config, str(tmp_path), run)
    refused("a is not the tokenizer of .*run; bring that file back", again)
    Path(file).unlink()
    assert again().identity() == corpus.identity()
    one, other = (resolved({"data.tokenizer_model": each}) for each in (file, f"moved/{file}"))
    one, other, none = (ConfigDict(asdict(each)) for each in (one, other, resolved({})))
    assert differences(one, other) == []
    assert [each.partition(":")[0] for each in differences(one, none)] == ["data.tokenizer_model"]


def test_each_side_may_have_a_model_of_its_own(tmp_path):
    train, (a, b, contents) = as_tsv(tmp_path), given_models(tmp_path)
    for knobs, expected in (
        ({"tokenizer_model": a, "target_tokenizer_model": b}, contents),
        ({"tokenizer_model": a, "target_tokenizer": "bytes"}, [contents[0], b""]),
        ({"tokenizer": "bytes", "target_tokenizer_model": b}, [b"", contents[1]]),
    ):
        assert [each.to_bytes() for each in opened(tmp_path, train, **knobs).tokenizers] == expected


@pytest.mark.parametrize("content", [None, b"", b"not a model", "cut off"])
def test_what_is_no_model_is_refused_in_a_line(content, tmp_path):
    train, (file, _, contents) = as_tsv(tmp_path), given_models(tmp_path)
    content = contents[0][:-9] if content == "cut off" else content
    Path(file).unlink() if content is None else Path(file).write_bytes(content)
    for knob in ("tokenizer_model", "target_tokenizer_model"):
        message = rf"a is no SentencePiece model .*; change data\.{knob}$"
        if content is None:
            message = rf"^data\.{knob}=.*a: there is no such file; name a SentencePiece model$"
        refused(message, opened, tmp_path, train, **{knob: file})
