import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, vaswani_base
from tests.helpers import small_model
from transformer.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)


@pytest.fixture(autouse=True)
def _promotion():
    """A schedule by itself multiplies integer counts with floats; in training it is inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def config(**changes: Any) -> OptimizerConfig:
    knobs: Any = base.get_config().optimizer
    knobs.update(changes)
    return OptimizerConfig(**knobs)


def test_inverse_sqrt_is_equation_3_of_the_paper():
    width, warmup = 512, 4_000
    schedule = make_schedule(OptimizerConfig(**vaswani_base.get_config().optimizer), 100_000)
    for step in (1, 2, 1_000, 3_999, 4_000, 4_001, 50_000, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(step - 1), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_climb_to_their_peak_at_the_end_of_the_warm_up(name):
    schedule = make_schedule(config(schedule=name, learning_rate=2.0, warmup_steps=10), 100)
    rates = [float(schedule(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10), rtol=1e-5)
    assert max(rates) == rates[9]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 0.022222), ("cosine", 6.1e-4), ("constant", 2)]
)
def test_where_schedules_end(name, last):
    schedule = make_schedule(config(schedule=name, learning_rate=2.0, warmup_steps=10), 100)
    np.testing.assert_allclose(schedule(98), last, rtol=1e-2)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_linear_ends_at_0_with_the_last_update(warmup):
    schedule = make_schedule(config(schedule="linear", warmup_steps=warmup), 100)
    assert schedule(98) > 0
    np.testing.assert_allclose(schedule(99), 0.0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_training_begins_at_the_peak(name):
    schedule = make_schedule(config(schedule=name, learning_rate=2.0, warmup_steps=0), 100)
    np.testing.assert_allclose(schedule(0), 2.0)


def test_adam_has_the_papers_betas_and_epsilon():
    knobs = vaswani_base.get_config().optimizer
    assert (knobs.beta1, knobs.beta2, knobs.epsilon) == (0.9, 0.98, 1e-9)


def apply(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adam_follows_its_definition(rng):
    gradients = rng.normal(size=(5, 3)).astype(np.float32)
    optimizer = make_optimizer(
        config(schedule="constant", learning_rate=0.1, warmup_steps=0, clip_norm=0.0), 10
    )
    ours = apply(optimizer, {"w": jnp.zeros(3)}, [{"w": jnp.asarray(g)} for g in gradients])
    w, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w -= 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-9)
    np.testing.assert_allclose(ours["w"], w, rtol=1e-4)


def test_adamw_decays_neither_biases_nor_gains():
    knobs = config(
        name="adamw",
        weight_decay=0.5,
        schedule="constant",
        learning_rate=0.1,
        warmup_steps=0,
        clip_norm=0.0,
    )
    shapes = small_model(attention_bias=True).shapes
    params = {name: jnp.ones(leaf.shape) for name, leaf in shapes.items()}
    zero = {name: jnp.zeros(leaf.shape) for name, leaf in shapes.items()}
    for name, value in apply(make_optimizer(knobs, 10), params, [zero]).items():
        decayed = name.endswith(("kernel", "table"))
        np.testing.assert_allclose(value, 0.95 if decayed else 1.0, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_bounds_the_norm_over_all_gradients(name):
    knobs = {"name": name, "schedule": "constant", "warmup_steps": 0, "epsilon": 1.0}
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    large = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    clipped = {"a": jnp.array([0.6]), "b": jnp.array([0.8])}
    ours = apply(make_optimizer(config(clip_norm=1.0, **knobs), 10), params, [large])
    plain = apply(make_optimizer(config(clip_norm=0.0, **knobs), 10), params, [clipped])
    np.testing.assert_allclose(ours["a"], plain["a"], rtol=1e-5)
    unclipped = apply(make_optimizer(config(clip_norm=0.0, **knobs), 10), params, [large])
    assert ours["a"] != unclipped["a"]
