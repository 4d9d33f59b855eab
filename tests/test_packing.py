"""Token sequences: several in a row, of which nothing reaches another, and kept in files."""

import os
import pickle
import shutil
from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.helpers import TOKENIZER, logits_of, random_params, refused, small_model, training
from transformer.data.batches import make_batch
from transformer.data.corpus import open_corpus
from transformer.data.packing import RaggedArray, TokenPairs, cached_pairs, pack_rows, unpacked_rows
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.loss import cross_entropy


def row(*pairs, source_length=16, target_length=14):
    sides = []
    for texts, length in zip(zip(*pairs, strict=True), (source_length, target_length), strict=True):
        tokens = [token for text in texts for token in TOKENIZER.encode(text)]
        sides.append(jnp.asarray([tokens + [PAD] * (length - len(tokens))], jnp.int32))
    return make_batch(*sides, packed=True)


PAIRS = (("ab", "bac"), ("cdefg", "gf"), ("h", "hhhh"))


def dataset(rng, rows, longest=16):
    """Random strings and targets of other lengths."""
    sides = rng.integers(1, longest + 1, (2, rows))
    drawn = ([[*rng.integers(3, 29, size - 1).tolist(), EOS] for size in side] for side in sides)
    return unpacked_rows(TokenPairs(*map(RaggedArray.from_lists, drawn)))


def examples(data):
    """The pairs of packed or unpacked rows, as tuples of tokens."""
    sides = []
    for rows in data.take(np.arange(len(data))):
        split = (np.split(row, np.flatnonzero(row == EOS) + 1)[:-1] for row in rows)
        sides.append([[tuple(part.tolist()) for part in parts] for parts in split])
    return [pair for row in zip(*sides, strict=True) for pair in zip(*row, strict=True)]


def test_segments_positions_and_shifted_targets_start_anew_in_each_example():
    batch = row(("ab", "c"), ("c", "ba"), source_length=7, target_length=6)
    a, b, c = TOKENIZER.encode("abc")[:3]
    rows = {name: np.asarray(value)[0].tolist() for name, value in batch._asdict().items()}
    assert rows == {
        "source": [a, b, EOS, c, EOS, PAD, PAD],
        "source_segments": [1, 1, 1, 2, 2, 0, 0],
        "source_positions": [0, 1, 2, 0, 1, 0, 0],
        "target_in": [BOS, c, BOS, b, a, PAD],
        "target_out": [c, EOS, b, a, EOS, PAD],
        "target_segments": [1, 1, 2, 2, 2, 0],
        "target_positions": [0, 1, 0, 1, 2, 0],
        "weights": [1, 1, 1, 1, 1, 0],
    }


def test_every_example_is_packed_once_and_one_that_is_too_long_is_named(rng):
    data = dataset(rng, 500)
    packed, again = pack_rows(data, 40), pack_rows(data, 40)
    assert packed.packed
    assert packed.widths == (40, 40)
    assert sorted(examples(packed)) == sorted(examples(data))  # each with its target
    assert examples(packed) == examples(again)
    refused("data.pack_length=12: the longest example has 16 tokens", pack_rows, data, 12)


@pytest.mark.parametrize(("longest", "length"), [(5, 5), (16, 40), (15, 63), (40, 64), (90, 256)])
def test_an_example_is_in_the_first_of_the_newest_64_rows_with_room(longest, length, rng):
    """Saved runs resume with the rows they began with."""
    data = dataset(rng, 1_500, longest)
    lengths, room, rows = data.pairs.lengths(), np.full((1_500, 2), length), defaultdict(list)
    for pair in np.random.default_rng(1_500).permutation(1_500):
        fits = (row for row in range(len(rows))[-64:] if (room[row] >= lengths[pair]).all())
        row = next(fits, len(rows))
        room[row] -= lengths[pair]
        rows[row].append(pair)
    assert lists([pack_rows(data, length).members]) == [list(rows.values())]


BACKENDS = {"einsum": "relative", "xla": "rotary", "chunked": "sinusoidal", "splash": "rotary"}


@pytest.mark.parametrize(("backend", "position"), BACKENDS.items())
def test_another_neighbour_changes_no_bit(backend, position):
    """Neither of the outputs of the other examples, nor of the gradients of their loss."""
    model = small_model(num_layers=1, attention_backend=backend, position_encoding=position)
    params = random_params(model, 0)

    @jax.jit
    def others(params, batch):
        def loss(params):
            logits = logits_of(model, params, batch)
            mine = (batch.target_segments > 0) & (batch.target_segments != 2)
            losses = cross_entropy(logits, batch.target_out).nll
            return jnp.where(mine, losses, 0.0).sum(), (logits, mine)

        (value, (logits, mine)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jnp.where(mine[..., None], logits, 0.0), gradients

    changed = (PAIRS[0], ("xyzxy", "zz"), PAIRS[2])
    one, other = (others(params, row(*pairs)) for pairs in (PAIRS, changed))
    assert float(one[0]) > 1.0
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_random_positions_are_those_of_examples_and_not_of_rows(rng):
    model = small_model(random_positions=64, max_length=16, position_encoding="sinusoidal")
    positions, index = model.bind(random_params(model, 0)).positions, row(*PAIRS).source_positions
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = np.stack([positions(index, **training(key))[0] for key in keys])
    assert (drawn[:, 1] > drawn[:, 0]).all()
    np.testing.assert_array_equal(drawn[:, 3], drawn[:, 0])  # the second example's first token
    # The second of 16 sorted draws from 0 … 63 is at 2 · 65 / 17 - 1 on average.
    assert drawn[:, 1].mean() == pytest.approx(2 * 65 / 17 - 1, abs=0.8)
    # A packed row may be longer than there are positions to draw.
    long = positions(jnp.arange(90)[None] % 16, **training(keys[0]))
    assert long.shape == (1, 90)
    assert long.max() < 64


ROWS = [[[5, 2], [2]], [[6, 7, 2], [8, 2]]], [[[9, 9, 9, 2]], [[2]]]
PARTS = [TokenPairs(*map(RaggedArray.from_lists, part)) for part in ROWS]
WHOLE = [[[5, 2], [2], [9, 9, 9, 2]], [[6, 7, 2], [8, 2], [2]]]
never = partial(pytest.fail, "made again")


def lists(pairs):
    return [[side.take(np.array([k])).values.tolist() for k in range(len(side))] for side in pairs]


def test_tokens_in_parts_come_back_as_a_whole_and_are_made_once(tmp_path):
    assert lists(cached_pairs(tmp_path / "a", lambda: PARTS)) == WHOLE
    again = cached_pairs(tmp_path / "a", never)
    assert lists(again) == WHOLE
    assert isinstance(again.source.values, np.memmap)
    sent = pickle.dumps(again)
    assert b"a/source" in sent  # files go to another process by name
    assert lists(pickle.loads(sent)) == WHOLE
    assert lists(pickle.loads(pickle.dumps(PARTS[0]))) == list(ROWS[0])
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "file").touch()  # no folder: the pairs are kept in memory
    pairs = cached_pairs(tmp_path / "file" / "a", lambda: PARTS)
    assert lists(pairs) == WHOLE
    assert not isinstance(pairs.source.values, np.memmap)


def test_any_damage_to_tokens_in_files_is_found_and_mended(tmp_path, capsys):
    folder = tmp_path / "a"
    cached_pairs(folder, lambda: PARTS)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        flipped = [bytearray(content) for _ in content]
        for place, each in enumerate(flipped):
            each[place] ^= 1 << place % 8
        for damage in (None, b"", content[:-1], content + b"0", *flipped):
            path.unlink() if damage is None else path.write_bytes(damage)
            assert lists(cached_pairs(folder, lambda: PARTS)) == WHOLE
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
    assert lists(cached_pairs(tmp_path / "a", late)) == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_corpus_keeps_the_tokens_of_each_split_and_tokenizer(data_dir):
    for changes in ({}, {"tokenizer": "bytes"}):
        corpus = open_corpus(helpers.data_config(**changes), data_dir)
        encode, texts = corpus.tokenizers.source.encode, corpus.texts("test")
        assert lists(corpus.tokens("test")) == [list(map(encode, side)) for side in texts]
        assert len(corpus.tokens("test[:7]").source) == 7
