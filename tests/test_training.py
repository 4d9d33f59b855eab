from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.helpers import logits_of, small_model, strings
from transformer.data.batches import Dataset
from transformer.loss import cross_entropy
from transformer.optimizer import OptimizerConfig, make_optimizer
from transformer.training import (
    PURPOSES,
    init_state,
    make_train_step,
    make_train_steps,
    stream,
    zero_sums,
)

TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst", "u")
BATCH = strings(*((text, text[::-1]) for text in TEXTS))
DATA = Dataset(BATCH.source, BATCH.target_out, 3)


def pieces(**changes):
    model = small_model(**changes)
    optimizer = small_optimizer(warmup_steps=2, learning_rate=1e-2)
    return model, optimizer, jax.jit(partial(init_state, model, optimizer))


def small_optimizer(**changes):
    knobs = base.get_config().optimizer
    knobs.update(changes)
    return make_optimizer(OptimizerConfig(**knobs), 100)


def equal(one, other):
    """Whether two pytrees are the same bit for bit."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.fixture(scope="module")
def train_steps():
    model, optimizer, init = pieces(dropout=0.2)
    return init, jax.jit(make_train_steps(make_train_step(model, optimizer, 0.1)))


@pytest.mark.parametrize("division", [[1] * 12, [12], [5, 7], [4, 1, 7]])
def test_the_division_of_steps_among_calls_changes_no_bit(division, train_steps):
    init, steps = train_steps
    whole = steps(init(jnp.uint32(0)), zero_sums(), DATA, jnp.int32(12))
    divided = (init(jnp.uint32(0)), zero_sums())
    for n in division:
        divided = steps(*divided, DATA, jnp.int32(n))
    assert equal(whole, divided)
    assert int(whole[0].step) == 12
    assert float(whole[1]["steps"]) == 12


def test_no_steps_change_nothing(train_steps):
    init, steps = train_steps
    state = init(jnp.uint32(0))
    assert equal(steps(state, zero_sums(), DATA, jnp.int32(0)), (state, zero_sums()))


def test_a_seed_decides_everything(train_steps):
    init, steps = train_steps
    one, same, other = (
        steps(init(jnp.uint32(seed)), zero_sums(), DATA, jnp.int32(3)) for seed in (7, 7, 8)
    )
    assert equal(one, same)
    assert not equal(one[0].params, other[0].params)


def test_dropout_differs_from_step_to_step():
    model, optimizer, init = pieces(dropout=0.5)
    step = jax.jit(make_train_step(model, optimizer, 0.0))
    state = init(jnp.uint32(0))
    losses = {  # of the same parameters and batch
        float(step(state._replace(step=jnp.int32(number)), BATCH)[1]["loss"]) for number in range(5)
    }
    assert len(losses) == 5


def test_the_gradient_is_of_the_mean_over_real_tokens():
    """Plain gradient descent by hand, and padding that changes nothing."""
    model = small_model()
    optimizer = small_optimizer(clip_norm=0.0)
    state = jax.jit(partial(init_state, model, optimizer))(jnp.uint32(0))

    def loss(params):
        nll = cross_entropy(logits_of(model, params, BATCH), BATCH.target_out, 0.1)
        return (nll * BATCH.weights).sum() / BATCH.weights.sum()

    expected = jax.grad(loss)(state.params)
    step = jax.jit(make_train_step(model, optimizer, 0.1))
    after, sums = step(state, BATCH)
    first_moment = after.moments[0].mu
    for name, gradient in expected.items():
        np.testing.assert_allclose(first_moment[name] / 0.1, gradient, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], loss(state.params), rtol=1e-5)
    assert sums["tokens"] == sum(len(text) + 1 for text in TEXTS)

    padded = strings(*((t, t[::-1]) for t in TEXTS), source_length=12, target_length=11)
    wider, _ = step(state, padded)
    for name, value in wider.moments[0].mu.items():
        np.testing.assert_allclose(value, first_moment[name], rtol=1e-3, atol=1e-6)


def test_a_few_strings_are_learnt_by_heart():
    model, optimizer, init = pieces()
    steps = jax.jit(make_train_steps(make_train_step(model, optimizer, 0.0)))
    state, first = steps(init(jnp.uint32(0)), zero_sums(), DATA, jnp.int32(1))
    state, _ = steps(state, zero_sums(), DATA, jnp.int32(95))
    _, last = steps(state, zero_sums(), DATA, jnp.int32(3))
    assert first["loss"] / first["tokens"] > 3.0
    assert last["loss"] / last["tokens"] < 0.5


def test_the_streams_of_a_seed_share_no_key():
    keys = [stream(jnp.uint32(0), purpose) for purpose in PURPOSES]
    keys += [jax.random.fold_in(key, 0) for key in keys] + [jax.random.key(0)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
