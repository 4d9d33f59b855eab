"""Several examples in a row: nothing of one reaches another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER, logits_of, random_params, small_model, training_of
from transformer.data.batches import make_batch
from transformer.data.ragged import Ragged
from transformer.data.rows import Pairs, alone, pack
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.errors import UserError
from transformer.loss import cross_entropy


def tokens_of(*texts, length):
    """One row of several texts."""
    together = [token for text in texts for token in TOKENIZER.encode(text)]
    return jnp.asarray([together + [PAD] * (length - len(together))], jnp.int32)


def row(*pairs, source_length=16, target_length=14):
    sources, targets = zip(*pairs, strict=True)
    source = tokens_of(*sources, length=source_length)
    return make_batch(source, tokens_of(*targets, length=target_length), packed=True)


PAIRS = (("ab", "bac"), ("cdefg", "gf"), ("h", "hhhh"))


def dataset(rng, rows, longest=16):
    """Random strings and targets of other lengths."""
    tokens = [np.zeros((rows, longest), np.int32) for _ in range(2)]
    for each in tokens:
        for example, size in enumerate(rng.integers(1, longest + 1, rows)):
            each[example, : size - 1] = rng.integers(3, 29, size - 1)
            each[example, size - 1] = EOS
    return alone(Pairs(*map(Ragged.unpadded, tokens)))


def examples(data):
    """The pairs of packed or unpacked rows, as tuples of tokens."""
    pairs = []
    for source, target in zip(*data.take(np.arange(len(data))), strict=True):
        parts = []
        for side in (source, target):
            ends = np.flatnonzero(side == EOS) + 1
            parts.append([tuple(part.tolist()) for part in np.split(side, ends)[:-1]])
        pairs += list(zip(*parts, strict=True))
    return pairs


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


def test_every_example_is_packed_once_and_with_its_target(rng):
    data = dataset(rng, 500)
    packed = pack(data, 40)
    assert packed.packed
    assert packed.widths == (40, 40)
    assert sorted(examples(packed)) == sorted(examples(data))
    again = pack(data, 40)
    np.testing.assert_array_equal(packed.members.values, again.members.values)
    np.testing.assert_array_equal(packed.members.offsets, again.members.offsets)


@pytest.mark.parametrize("length", [16, 32, 64])
def test_rows_are_filled(rng, length):
    """The bound is where first fit stands; to open a row for each example gives half or less."""
    packed = pack(dataset(rng, 2_000), length)
    filled = max((side != PAD).mean() for side in packed.take(np.arange(len(packed))))
    assert filled > {16: 0.6, 32: 0.75, 64: 0.85}[length]


def test_an_example_that_no_row_can_hold_is_explained(rng):
    with pytest.raises(UserError, match=r"data.pack=12: the longest example has 16 tokens"):
        pack(dataset(rng, 50), 12)


@pytest.mark.parametrize(
    ("backend", "position"),
    [
        ("einsum", "relative"),
        ("xla", "rotary"),
        ("chunked", "sinusoidal"),
        ("splash", "rotary"),
    ],
)
def test_another_neighbour_changes_no_bit(backend, position):
    """Neither of the outputs of the other examples, nor of the gradients of their loss."""
    model = small_model(layers=2, attention_backend=backend, position=position)
    params = random_params(model, 0)

    @jax.jit
    def others(params, batch):
        def loss(params):
            logits = logits_of(model, params, batch)
            mine = (batch.target_segments > 0) & (batch.target_segments != 2)
            losses = cross_entropy(logits, batch.target_out)
            return jnp.where(mine, losses, 0.0).sum(), (logits, mine)

        (value, (logits, mine)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jnp.where(mine[..., None], logits, 0.0), gradients

    changed = (PAIRS[0], ("xyzxy", "zz"), PAIRS[2])
    one, other = (others(params, row(*pairs)) for pairs in (PAIRS, changed))
    assert float(one[0]) > 1.0
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_random_positions_are_those_of_examples_and_not_of_rows(rng):
    model = small_model(random_positions=64, max_length=16, position="sinusoidal")
    module = model.bind(random_params(model, 0))
    index = row(*PAIRS).source_positions
    drawn = np.stack(
        [
            module.positions(index, training_of(model, jax.random.key(seed)))[0]
            for seed in range(200)
        ]
    )
    assert (drawn[:, 1] > drawn[:, 0]).all()
    np.testing.assert_array_equal(drawn[:, 3], drawn[:, 0])  # the second example's first token
    # The second of 16 sorted draws from 0 … 63 is at 2 · 65 / 17 - 1 on average.
    assert drawn[:, 1].mean() == pytest.approx(2 * 65 / 17 - 1, abs=0.8)
