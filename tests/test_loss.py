"""The loss against its formula: values, gradients, memory, replicas and meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import loss
from transformer.loss import cross_entropy, linear_cross_entropy
from transformer.metrics import token_sums
from transformer.parallel.mesh import MeshConfig, make_mesh

B, T, D, V = 4, 6, 16, 40


def inputs(rng, dtype=jnp.float32):
    """hidden, table, targets and weights, of which some are 0."""
    hidden, table = (jnp.asarray(rng.normal(size=size)) for size in ((B, T, D), (V, D)))
    targets = jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)
    return hidden.astype(dtype), table, targets, jnp.asarray(rng.integers(2, size=(B, T)), float)


def plain(hidden, table, targets, weights, smoothing, *, measure, bias=None):
    """`linear_cross_entropy` with all logits at once."""
    product = partial(jnp.einsum, "BTD,VD->BTV", preferred_element_type=jnp.float32)
    logits = product(hidden, table.astype(hidden.dtype))
    logits = logits if bias is None else logits + bias
    found = cross_entropy(logits, targets, smoothing)
    return (found.objective * weights).sum(), measure(found)


def value_and_gradients(function, hidden, table, *labels, bias=None):
    """The loss, what is measured, and the gradients of three times the loss."""

    def scaled(hidden, table, bias):
        value, measured = function(hidden, table, *labels, measure=token_sums, bias=bias)
        return 3.0 * value, measured

    numbers = (0, 1) if bias is None else (0, 1, 2)
    return jax.jit(jax.value_and_grad(scaled, numbers, has_aux=True))(hidden, table, bias)


def assert_close(found, expected, dtype=jnp.float32):
    rtol = 1e-5 if dtype == jnp.float32 else 2e-2  # of bfloat16 products
    wide = partial(jax.tree.map, lambda x: np.asarray(x, np.float32))

    def close(one, other):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())

    jax.tree.map(close, wide(found), wide(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, jnp.float32(0.5)], ids=str)
def test_cross_entropy_against_the_smoothed_distribution(smoothing, rng):
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(7, size=(2, 3)))
    smoothed = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    expected = -(smoothed * np.log(jax.nn.softmax(logits))).sum(-1)
    found = jax.jit(cross_entropy)(logits, targets, smoothing)
    np.testing.assert_allclose(found.objective, expected, rtol=1e-5)


def test_cross_entropy_is_stable_in_float32_for_bfloat16_logits_and_nan_outside_the_vocabulary():
    nll = cross_entropy(jnp.array([[[3e4, 0.0]]], jnp.bfloat16), jnp.array([[1]])).nll
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, [[3e4]], rtol=1e-2)
    assert jnp.isnan(cross_entropy(jnp.zeros((1, 1, 4)), jnp.array([[4]])).nll).all()


@pytest.mark.parametrize(
    ("smoothing", "dtype"),
    [(0.0, jnp.float32), (0.1, jnp.bfloat16), (jnp.float32(0.1), jnp.float32)],
)
@pytest.mark.parametrize("chunk", [1, 7, 24, 256])
def test_chunks_give_the_values_and_gradients_of_the_formula(
    chunk, smoothing, dtype, rng, monkeypatch
):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    values = *inputs(rng, dtype), smoothing
    found = value_and_gradients(linear_cross_entropy, *values)
    assert_close(found, value_and_gradients(plain, *values), dtype)
    assert [each.dtype for each in found[1]] == [dtype, jnp.float32]
    without_gradient = linear_cross_entropy(*values, measure=token_sums)
    assert_close(without_gradient, (found[0][0] / 3.0, found[0][1]), dtype)

    # Its gradient is summed in float32, before the products round it.
    options = {"bias": jnp.asarray(rng.normal(size=V), jnp.float32)}
    biased = value_and_gradients(linear_cross_entropy, *values, **options)
    expected = value_and_gradients(plain, *values, **options)
    assert_close(biased, expected, dtype)
    assert_close(biased[1][2], expected[1][2])
    found = linear_cross_entropy(*values, measure=token_sums, **options)
    assert_close(found, (biased[0][0] / 3.0, biased[0][1]), dtype)


def test_replicas_have_their_own_smoothing(rng, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    values, smoothing = inputs(rng), jnp.array([0.0, 0.1, 0.3])
    one = partial(value_and_gradients, linear_cross_entropy)
    found = jax.vmap(one, (None,) * 4 + (0,))(*values, smoothing)
    for k in range(3):
        assert_close(jax.tree.map(lambda x, k=k: x[k], found), one(*values, smoothing[k]))


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1, 1), (1, 2, 2, 1), (1, 3, 1, 2), (2, 1, 1, 4), (1, 1, 4, 1)], ids=str
)
def test_a_mesh_gives_the_values_and_gradients_of_one_device(sizes, rng, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 5)
    values, bias = (*inputs(rng), 0.1), jnp.asarray(rng.normal(size=V), jnp.float32)
    expected = value_and_gradients(linear_cross_entropy, *values, bias=bias)
    axes = dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        function = jax.jit(partial(value_and_gradients, linear_cross_entropy))
        found = function.lower(*values, bias=bias).compile()
    assert_close(found(*values, bias=bias), expected)
    in_loop = re.search(r"all-reduce.*while/body", found.as_text())
    assert bool(in_loop) == (axes["tensor"] > 1)  # each chunk needs the logits of all devices


def test_gradients_are_exact_where_the_target_is_very_unlikely(rng):
    hidden, *values = *inputs(rng), 0.1
    found, expected = (
        value_and_gradients(each, 1e3 * hidden, *values) for each in (linear_cross_entropy, plain)
    )
    assert_close(found, expected)


def test_there_never_are_logits_of_all_tokens():
    hidden, table = jnp.zeros((8, 512, 32)), jnp.zeros((4_000, 32))
    labels = jnp.zeros((8, 512), int), jnp.ones((8, 512)), 0.1
    logits = 4 * 8 * 512 * 4_000  # bytes
    for function, least, most in ((plain, 1.0, 9.0), (linear_cross_entropy, 0.0, 0.4)):
        lowered = jax.jit(partial(value_and_gradients, function)).lower(hidden, table, *labels)
        used = lowered.compile().memory_analysis().temp_size_in_bytes / logits
        assert least < used < most, function
