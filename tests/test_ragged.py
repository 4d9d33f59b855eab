"""Token sequences in files: written once, read back, and written again if damaged."""

import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest

from tests.helpers import data_config
from transformer.data.corpus import open_corpus
from transformer.data.packing import RaggedArray, TokenPairs, cached_pairs

ROWS = [[[5, 2], [2]], [[6, 7, 2], [8, 2]]], [[[9, 9, 9, 2]], [[2]]]
PARTS = [TokenPairs(*map(RaggedArray.from_lists, part)) for part in ROWS]
WHOLE = [[[5, 2], [2], [9, 9, 9, 2]], [[6, 7, 2], [8, 2], [2]]]


def rows(pairs):
    return [[side.take(np.array([k])).values.tolist() for k in range(len(side))] for side in pairs]


never = partial(pytest.fail, "made again")


def test_parts_come_back_as_a_whole_and_are_made_once(tmp_path):
    assert rows(cached_pairs(tmp_path / "a", lambda: PARTS)) == WHOLE
    again = cached_pairs(tmp_path / "a", never)
    assert rows(again) == WHOLE
    assert isinstance(again.source.values, np.memmap)
    sent = pickle.dumps(again)
    assert b"a/source" in sent  # files go to another process by name
    assert rows(pickle.loads(sent)) == WHOLE
    assert rows(pickle.loads(pickle.dumps(PARTS[0]))) == list(ROWS[0])
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "file").touch()  # no folder: the pairs are kept in memory
    pairs = cached_pairs(tmp_path / "file" / "a", lambda: PARTS)
    assert rows(pairs) == WHOLE
    assert not isinstance(pairs.source.values, np.memmap)


def test_any_damage_is_found_and_mended(tmp_path, capsys):
    folder = tmp_path / "a"
    cached_pairs(folder, lambda: PARTS)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        flipped = [bytearray(content) for _ in content]
        for place, each in enumerate(flipped):
            each[place] ^= 1 << place % 8
        for damage in (None, b"", content[:-1], content + b"0", *flipped):
            path.unlink() if damage is None else path.write_bytes(damage)
            assert rows(cached_pairs(folder, lambda: PARTS)) == WHOLE
            assert "is damaged and is written again" in capsys.readouterr().out
            cached_pairs(folder, never)


def test_an_interrupted_writer_leaves_nothing_and_of_two_the_first_wins(tmp_path):
    def interrupted():
        yield PARTS[0]
        raise KeyboardInterrupt

    def late():
        shutil.copytree(tmp_path / "b", tmp_path / "a")
        yield from PARTS

    with pytest.raises(KeyboardInterrupt):
        cached_pairs(tmp_path / "a", interrupted)
    assert not list(tmp_path.iterdir())
    cached_pairs(tmp_path / "b", lambda: PARTS)
    assert rows(cached_pairs(tmp_path / "a", late)) == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_corpus_keeps_the_tokens_of_each_split_and_tokenizer(data_dir):
    for changes in ({}, {"tokenizer": "bytes"}):
        corpus = open_corpus(data_config(**changes), data_dir)
        encode, texts = corpus.tokenizers.source.encode, corpus.texts("test")
        assert rows(corpus.tokens("test")) == [list(map(encode, side)) for side in texts]
        assert len(corpus.tokens("test[:7]").source) == 7
