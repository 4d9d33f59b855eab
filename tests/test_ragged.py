"""Token sequences in files: what is read back, and what is written again."""

import os
import pickle
from functools import partial

import numpy as np
import pytest

from tests.helpers import data_config
from transformer.data.corpus import open_corpus
from transformer.data.ragged import RaggedArray, TokenPairs, cached_pairs, write_pairs

PARTS = [
    TokenPairs(RaggedArray.from_lists([[5, 2], [2]]), RaggedArray.from_lists([[6, 7, 2], [8, 2]])),
    TokenPairs(RaggedArray.from_lists([[9, 9, 9, 2]]), RaggedArray.from_lists([[2]])),
]
WHOLE = [[[5, 2], [2], [9, 9, 9, 2]], [[6, 7, 2], [8, 2], [2]]]


def rows(pairs):
    return [[side.take(np.array([k])).values.tolist() for k in range(len(side))] for side in pairs]


never = partial(pytest.fail, "made again")


def test_parts_come_back_as_a_whole_and_are_made_once(tmp_path):
    assert rows(cached_pairs(tmp_path / "a", lambda: PARTS)) == WHOLE
    again = cached_pairs(tmp_path / "a", never)
    assert rows(again) == WHOLE
    assert isinstance(again.source.values, np.memmap)
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "file").touch()  # where nothing can be kept it is in memory
    pairs = cached_pairs(tmp_path / "file" / "a", lambda: PARTS)
    assert rows(pairs) == WHOLE
    assert not isinstance(pairs.source.values, np.memmap)
    # Files go to another process by name.
    long = PARTS[0]._replace(source=RaggedArray.from_lists([[3] * 10**5]))
    pairs = cached_pairs(tmp_path / "b", lambda: [long])
    sent = pickle.dumps(pairs)
    assert len(sent) < 1_000
    np.testing.assert_array_equal(pickle.loads(sent).source.values, pairs.source.values)
    assert rows(pickle.loads(pickle.dumps(PARTS[0]))) == rows(PARTS[0])  # which is in memory


def test_any_damage_is_found_and_mended(tmp_path, capsys):
    folder = tmp_path / "a"
    cached_pairs(folder, lambda: PARTS)
    for name in sorted(path.name for path in folder.iterdir()):
        content = (folder / name).read_bytes()
        flipped = [bytearray(content) for _ in content]
        for place, each in enumerate(flipped):
            each[place] ^= 1 << place % 8
        for damage in (None, b"", content[:-1], content + b"0", *flipped):
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            assert rows(cached_pairs(folder, lambda: PARTS)) == WHOLE
            assert "is damaged and is written again" in capsys.readouterr().out
            cached_pairs(folder, never)


def test_one_that_was_cut_off_is_not_seen_and_a_sooner_process_has_made_it(tmp_path):
    def cut_off():
        yield PARTS[0]
        raise KeyboardInterrupt

    def late():
        write_pairs(tmp_path / "a", PARTS)
        yield from PARTS

    with pytest.raises(KeyboardInterrupt):
        cached_pairs(tmp_path / "a", cut_off)
    assert not list(tmp_path.iterdir())
    assert rows(cached_pairs(tmp_path / "a", late)) == WHOLE
    assert os.listdir(tmp_path) == ["a"]


def test_a_corpus_keeps_the_tokens_of_each_split_and_tokenizer(tmp_path, data_dir):
    first = open_corpus(data_config(), data_dir)
    for corpus in (first, open_corpus(data_config(tokenizer="bytes"), data_dir)):
        encode, texts = corpus.tokenizers.source.encode, first.texts("test")
        assert rows(corpus.tokens("test")) == [list(map(encode, side)) for side in texts]
    assert len(first.tokens("test[:7]").source) == 7
