import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import vaswani_base
from tests.helpers import small_model
from transformer.training import optimizer
from transformer.training.optimizer import DECAYING, OPTIMIZERS, SCHEDULES, make_schedule

# A constant rate of 0.1 and nothing else.
PLAIN = {"schedule": "constant", "learning_rate": 0.1, "warmup_steps": 0, "clip_norm": 0.0}
BLOCK = {"kernel": jnp.ones((4, 3)), "embedding": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def make(hparams=None, **changes):
    return optimizer.make_optimizer(optimizer.OptimizerConfig(**changes), 10, hparams)


def apply(rule, params, gradients):
    state = rule.init(params)
    for gradient in gradients:
        updates, state = rule.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def gradients_of(params):
    """Three random gradients whose matrices are far from orthogonal."""

    def draw(rng, shape):
        return jnp.asarray(rng.normal(size=shape) * np.linspace(0.05, 1.0, shape[-1]), jnp.float32)

    rngs = [np.random.default_rng(seed) for seed in range(3)]
    return [{name: draw(rng, leaf.shape) for name, leaf in params.items()} for rng in rngs]


def test_vaswani_base_has_the_papers_schedule_betas_and_epsilon():
    width, warmup, knobs = 512, 4_000, vaswani_base.get_config().optimizer
    schedule = make_schedule(knobs.schedule, 100_000, knobs)
    for step in (1, 2, 3_999, 4_000, 4_001, 100_000):  # equation 3
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(step - 1), expected, rtol=1e-5)
    assert (knobs.beta1, knobs.beta2, knobs.epsilon) == (0.9, 0.98, 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_climb_to_their_peak_at_the_end_of_the_warm_up(name):
    def rates_of(rate, warmup):
        hparams = SimpleNamespace(learning_rate=rate, warmup_steps=warmup)
        return jax.vmap(make_schedule(name, 100, hparams))(jnp.arange(101))

    for warmup in (0, 1, 10):
        rates = rates_of(2e-3, warmup)
        traced = jax.jit(rates_of)(np.float32(2e-3), np.float32(warmup))
        np.testing.assert_allclose(traced, rates, rtol=1e-6, atol=1e-10)
        assert rates[max(warmup - 1, 0)] == max(rates) == np.float32(2e-3)
        assert name != "linear" or abs(rates[99]) < 1e-9 < rates[98]  # 0 with the last update
    np.testing.assert_allclose(rates[:10], np.linspace(2e-4, 2e-3, 10), rtol=1e-5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:].tolist()))
    last = {"linear": 2.2222e-5, "cosine": 6.1e-7, "constant": 2e-3}
    np.testing.assert_allclose(rates[98], last.get(name, 2e-3 * (10 / 99) ** 0.5), rtol=1e-2)


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd"])
def test_an_optimizer_follows_its_definition(name, rng):
    decay, gradients = 0.5 * (name in DECAYING), rng.normal(size=(5, 3)).astype(np.float32)
    w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for step, g in enumerate(gradients, 1):
        if name == "sgd":
            update = m = 0.9 * m + g
        elif name == "lion":
            update, m = np.sign(0.9 * m + 0.1 * g), 0.98 * m + 0.02 * g
        else:
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-9)
        w = w - 0.1 * (update + decay * w)
    named = [{"w": jnp.asarray(g)} for g in gradients]
    ours = apply(make(**PLAIN, name=name, weight_decay=decay), {"w": jnp.ones(3)}, named)
    np.testing.assert_allclose(ours["w"], w, rtol=1e-4 if "adam" in name else 1e-5)


def test_adafactor_uses_the_outer_product_of_rows_and_columns_of_large_matrices(rng):
    gradient = rng.normal(size=(128, 256)).astype(np.float32)
    params = {"w": jnp.full(gradient.shape, 0.5)}
    ours = apply(make(**PLAIN, name="adafactor"), params, [{"w": jnp.asarray(gradient)}])
    rows, columns = (np.square(gradient).mean(axis) for axis in (1, 0))
    scaled = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
    scaled /= max(1.0, np.sqrt(np.square(scaled).mean()))
    np.testing.assert_allclose(ours["w"], 0.5 - 0.1 * 0.5 * scaled, rtol=1e-4, atol=1e-6)


def test_muon_makes_matrices_orthogonal_and_leaves_embeddings_and_vectors_to_adam():
    """The third update, of queries, keys and values as [D, N H], of the output as [N H, D]."""
    model = small_model(attention_bias=True, num_heads=2, d_k=4, position_encoding="learned")
    params = {name: jnp.ones(leaf.shape) for name, leaf in model.shapes.items()}
    gradients, rule = gradients_of(params), make(**PLAIN, name="muon", beta1=0.8)
    state, update = rule.init(params), jax.jit(rule.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    kernels = {name for name in params if name.endswith("kernel")}
    assert len(kernels) == 3 * 4 + 2 * 2
    for name in kernels:
        rows = 8 if name.endswith("out/kernel") else params[name].shape[0]
        matrix = updates[name].reshape(rows, -1)
        spectrum = np.linalg.svd(matrix, compute_uv=False) / max(matrix.shape) ** 0.5
        spectrum /= 0.1 * 0.2  # an RMS of 0.2 · rate
        # Five steps of Newton-Schulz end between 0.7 and 1.2 or so, and not at 1.
        assert 0.6 < spectrum.min() <= spectrum.max() < 1.3, (name, spectrum)
    others = params.keys() - kernels
    assert {name.split("/")[-1] for name in others} == {"embedding", "bias", "scale"}
    adam = optax.nadam(0.1, 0.8, 0.98, 1e-8)
    state = adam.init(params)
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            expected, state = adam.update(gradient, state, params)
    for name in others:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_leaves_out_biases_and_scales(name):
    """And under Muon the embeddings, which are Adam's."""
    shapes = small_model(attention_bias=True, normalize_qk=True, position_encoding="learned").shapes
    params = {each: jnp.ones(leaf.shape) for each, leaf in shapes.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    kinds = "kernel" if name == "muon" else ("kernel", "embedding")
    for each, value in apply(make(**PLAIN, name=name, weight_decay=0.5), params, [zero]).items():
        np.testing.assert_allclose(value, 0.95 if each.endswith(kinds) else 1.0, err_msg=each)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_numbers_give_the_updates_of_python_numbers(name):
    numbers = {"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.5 * (name in DECAYING)}

    def after(numbers):
        rule = make(SimpleNamespace(**numbers), name=name, clip_norm=0.0)
        return apply(rule, BLOCK, gradients_of(BLOCK))

    traced = jax.jit(after)({name: np.float32(value) for name, value in numbers.items()})
    for each, value in jax.jit(lambda: after(numbers))().items():
        np.testing.assert_allclose(traced[each], value, rtol=1e-5, err_msg=each)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_bounds_the_norm_over_all_gradients(name):
    """After a gradient that is clipped comes one that is not: it shows what was remembered."""
    pairs = ((1.0, 1.0), (-0.5, -0.5), (30.0, 40.0), (0.6, 0.8))
    vectors = ({"a": jnp.array([a]), "b": jnp.array([b])} for a, b in pairs)
    params, small, large, clipped = vectors
    plain, clipping = make(**PLAIN, name=name), make(**PLAIN | {"clip_norm": 1.0}, name=name)
    ours = apply(clipping, params, [large, small])["a"]
    np.testing.assert_allclose(ours, apply(plain, params, [clipped, small])["a"], rtol=1e-5)
    assert abs(ours - apply(plain, params, [large, small])["a"]) > 1e-3
