import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, vaswani_base
from tests.helpers import small_model
from transformer.optimizer import (
    DECAYING,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)

# A constant rate of 0.1 and nothing else.
PLAIN = {"schedule": "constant", "learning_rate": 0.1, "warmup_steps": 0, "clip_norm": 0.0}


def make(steps: int = 10, **changes: Any) -> optax.GradientTransformation:
    """The optimizer of the default config with changes."""
    knobs: Any = base.get_config().optimizer
    knobs.update(changes)
    names = ("learning_rate", "warmup_steps", "weight_decay")
    numbers = {name: knobs[name] for name in names}
    return make_optimizer(OptimizerConfig(**knobs), steps, **numbers)


def test_inverse_sqrt_is_equation_3_of_the_paper():
    width, warmup = 512, 4_000
    knobs = vaswani_base.get_config().optimizer
    schedule = make_schedule(knobs.schedule, 100_000, knobs.learning_rate, knobs.warmup_steps)
    for step in (1, 2, 1_000, 3_999, 4_000, 4_001, 50_000, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(step - 1), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_climb_to_their_peak_at_the_end_of_the_warm_up(name):
    schedule = make_schedule(name, 100, 2.0, 10)
    rates = [float(schedule(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10), rtol=1e-5)
    assert max(rates) == rates[9]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))
    np.testing.assert_allclose(make_schedule(name, 100, 2.0, 0)(0), 2.0)  # without a warm-up


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 0.022222), ("cosine", 6.1e-4), ("constant", 2)]
)
def test_where_schedules_end(name, last):
    np.testing.assert_allclose(make_schedule(name, 100, 2.0, 10)(98), last, rtol=1e-2)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_linear_ends_at_0_with_the_last_update(warmup):
    schedule = make_schedule("linear", 100, 4e-3, warmup)
    assert schedule(98) > 0
    np.testing.assert_allclose(schedule(99), 0.0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_a_schedule_of_traced_numbers_is_that_of_python_numbers(name, warmup):
    @jax.jit
    def traced(rate, warmup):
        return jax.vmap(make_schedule(name, 100, rate, warmup))(jnp.arange(101))

    plain = jax.vmap(make_schedule(name, 100, 2e-3, warmup))(jnp.arange(101))
    np.testing.assert_allclose(
        traced(np.float32(2e-3), np.float32(warmup)), plain, rtol=1e-6, atol=1e-10
    )


def test_adam_has_the_papers_betas_and_epsilon():
    knobs = vaswani_base.get_config().optimizer
    assert (knobs.beta1, knobs.beta2, knobs.epsilon) == (0.9, 0.98, 1e-9)


def apply(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adam_by_hand(gradients, decay=0.0):
    w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-9)
        w = w - 0.1 * (update + decay * w)
    return w


def lion_by_hand(gradients):
    w, m = np.ones(3), np.zeros(3)
    for g in gradients:
        w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.5 * w)
        m = 0.98 * m + 0.02 * g
    return w


def sgd_by_hand(gradients):
    w, m = np.ones(3), np.zeros(3)
    for g in gradients:
        m = 0.7 * m + g
        w = w - 0.1 * m
    return w


@pytest.mark.parametrize(
    ("by_hand", "changes", "rtol"),
    [
        (adam_by_hand, {"name": "adam"}, 1e-4),
        (partial(adam_by_hand, decay=0.5), {"name": "adamw", "weight_decay": 0.5}, 1e-4),
        (lion_by_hand, {"name": "lion", "weight_decay": 0.5}, 1e-5),
        (sgd_by_hand, {"name": "sgd", "beta1": 0.7}, 1e-5),
    ],
)
def test_an_optimizer_follows_its_definition(by_hand, changes, rtol, rng):
    gradients = rng.normal(size=(5, 3)).astype(np.float32)
    optimizer = make(**PLAIN, **changes)
    ours = apply(optimizer, {"w": jnp.ones(3)}, [{"w": jnp.asarray(g)} for g in gradients])
    np.testing.assert_allclose(ours["w"], by_hand(gradients), rtol=rtol)


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    """And of a first gradient uses the outer product of both, by its definition."""
    optimizer = make(**PLAIN, name="adafactor")
    params = {"large": jnp.full((128, 256), 0.5), "small": jnp.full((127, 256), 0.5)}
    state = optimizer.init(params)
    sizes = {
        name: sum(each[name].size for each in (state[0].v_row, state[0].v_col, state[0].v))
        for name in params
    }
    assert sizes["large"] < 128 + 256 + 2  # optax keeps an empty place of 1 in each
    assert sizes["small"] >= 127 * 256

    gradient = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    ours = apply(optimizer, {"w": params["large"]}, [{"w": jnp.asarray(gradient)}])
    rows, columns = (np.square(gradient).mean(axis) for axis in (1, 0))
    scaled = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
    scaled /= max(1.0, np.sqrt(np.square(scaled).mean()))
    np.testing.assert_allclose(ours["w"], 0.5 - 0.1 * 0.5 * scaled, rtol=1e-4, atol=1e-6)


def gradients_of(params, seed):
    """Random gradients whose matrices are far from orthogonal."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        steep = np.linspace(0.05, 1.0, shape[-1])
        return jnp.asarray(rng.normal(size=shape) * steep, jnp.float32)

    return {name: draw(leaf.shape) for name, leaf in params.items()}


@pytest.fixture(scope="module")
def muon():
    """Parameters, three gradients, and the third update."""
    model = small_model(attention_bias=True, heads=2, head_width=4, position="learned")
    params = {name: jnp.ones(leaf.shape) for name, leaf in model.shapes.items()}
    gradients = [gradients_of(params, seed) for seed in range(3)]
    optimizer = make(**PLAIN, name="muon", beta1=0.8)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return params, gradients, updates


def test_muon_makes_the_updates_of_matrices_orthogonal(muon):
    """Queries, keys and values as [D, N H], the output as [N H, D], with an RMS of 0.2 · rate."""
    params, _, updates = muon
    kernels = [name for name in params if name.endswith("kernel")]
    assert len(kernels) == 3 * 4 + 2 * 2
    for name in kernels:
        rows = 8 if name.endswith("out/kernel") else params[name].shape[0]
        matrix = np.asarray(updates[name]).reshape(rows, -1)
        spectrum = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
        # Five steps of Newton-Schulz end between 0.7 and 1.2 or so, and not at 1.
        assert spectrum.min() > 0.6, (name, spectrum)
        assert spectrum.max() < 1.3, (name, spectrum)


def test_muon_leaves_embeddings_and_vectors_to_adam(muon):
    """With Nesterov's momentum, as the matrices have it (Dozat 2016)."""
    params, gradients, updates = muon
    rest = [name for name in params if not name.endswith("kernel")]
    assert {name.split("/")[-1] for name in rest} == {"table", "bias", "gain"}
    m, v = ({name: np.zeros(params[name].shape) for name in rest} for _ in range(2))
    for gradient in gradients:
        for name in rest:
            g = np.asarray(gradient[name])
            m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.98 * v[name] + 0.02 * g * g
    for name in rest:
        ahead = 0.8 * m[name] / (1 - 0.8**4) + 0.2 * np.asarray(gradients[-1][name]) / (1 - 0.8**3)
        expected = -0.1 * ahead / (np.sqrt(v[name] / (1 - 0.98**3)) + 1e-8)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_leaves_out_biases_and_gains(name):
    """And under Muon the embeddings, which are Adam's."""
    optimizer = make(**PLAIN, name=name, weight_decay=0.5)
    shapes = small_model(attention_bias=True, qk_norm=True, position="learned").shapes
    params = {name: jnp.ones(leaf.shape) for name, leaf in shapes.items()}
    zero = {name: jnp.zeros(leaf.shape) for name, leaf in shapes.items()}
    kinds = "kernel" if name == "muon" else ("kernel", "table")
    for each, value in apply(optimizer, params, [zero]).items():
        expected = 0.95 if each.endswith(kinds) else 1.0
        np.testing.assert_allclose(value, expected, err_msg=each)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_numbers_give_the_updates_of_python_numbers(name):
    numbers = {"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.5}
    numbers["weight_decay"] *= name in DECAYING
    knobs: Any = base.get_config().optimizer
    knobs.update({"name": name, "clip_norm": 0.0} | numbers)
    knobs = OptimizerConfig(**knobs)
    params = {"kernel": jnp.ones((4, 3)), "table": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    gradients = [gradients_of(params, seed) for seed in range(3)]

    @jax.jit
    def after(numbers):
        return apply(make_optimizer(knobs, 10, **numbers), params, gradients)

    plain = apply(make_optimizer(knobs, 10, **numbers), params, gradients)
    traced = after({name: np.float32(value) for name, value in numbers.items()})
    for each, value in plain.items():
        np.testing.assert_allclose(traced[each], value, rtol=1e-5, err_msg=each)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_bounds_the_norm_over_all_gradients(name):
    """After a gradient that is clipped comes one that is not: it shows what was remembered."""
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    small = {"a": jnp.array([-0.5]), "b": jnp.array([-0.5])}
    large = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    clipped = {"a": jnp.array([0.6]), "b": jnp.array([0.8])}
    plain = make(**PLAIN, name=name)
    ours = apply(make(**PLAIN | {"clip_norm": 1.0}, name=name), params, [large, small])
    by_hand = apply(plain, params, [clipped, small])
    np.testing.assert_allclose(ours["a"], by_hand["a"], rtol=1e-5)
    unclipped = apply(plain, params, [large, small])
    assert abs(ours["a"] - unclipped["a"]) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss(name, rng):
    """Of linear regression, by default but for the rate; all knobs of `make` are in use."""
    inputs, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((32, 4), (4, 3)))

    @jax.value_and_grad
    def loss_of(params):
        return jnp.square(inputs @ (params["kernel"] - kernel) + params["bias"]).mean()

    rates = {"adafactor": 0.5, "lion": 0.1, "sgd": 0.2}
    optimizer = make(30, name=name, learning_rate=rates.get(name, 0.3), warmup_steps=2)
    params: Any = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}

    def step(carry, _):
        params, state = carry
        loss, gradients = loss_of(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    losses = jax.lax.scan(step, (params, optimizer.init(params)), length=30)[1]
    assert losses[-1] < 0.5 * losses[0]
