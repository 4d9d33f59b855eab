from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import normal, refused, small_model
from transformer.modules import dot_product_attention as backends
from transformer.modules import masking
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, FLEXIBLE_BACKENDS
from transformer.modules.dropout import dropout
from transformer.modules.normalization import RMSNorm

B, T, S, N, H = 2, 4, 5, 4, 6

MASKS = {
    "none": None,
    "padding": masking.padding(jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)),
    "causal": masking.causal(T, S),
    "nothing": jnp.zeros((B, 1, T, S), bool).at[0, 0, 1].set(True),
    "heads": jnp.arange(B * N * T * S).reshape(B, N, T, S) % 3 > 0,
}

# cuDNN needs a GPU. The kernels leave an array to the reference; SHORT_MASKS has what they take.
HERE = [name for name in ATTENTION_BACKENDS if name not in backends.BFLOAT16_BACKENDS]
each_backend = pytest.mark.parametrize("backend", HERE)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_sharing = pytest.mark.parametrize("kv_heads", [N, 2, 1])
einsum, chunked = ATTENTION_BACKENDS["einsum"], ATTENTION_BACKENDS["chunked"]


def make_qkv(rng, kv_heads=N, lengths=(T, S), value_width=H):
    keys = [normal(rng, B, kv_heads, lengths[1], width) for width in (H, value_width)]
    return normal(rng, B, N, lengths[0], H), *keys


def gradients(attend, inputs):
    """Output and gradients of the sum of its sine."""

    def loss(*inputs):
        out = attend(*inputs)
        return jnp.sin(out + 1.0).sum(), out

    numbers = tuple(range(len(inputs)))
    return jax.tree.leaves(jax.jit(jax.grad(loss, numbers, has_aux=True))(*inputs))


def near(ours, theirs, rtol=1e-4, atol=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        assert jnp.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def by_hand(query, key, value, mask, bias=None):
    """Equation 1 in float64, one query at a time, over the keys that it may attend to."""
    query, key, value = (np.asarray(each, np.float64) for each in (query, key, value))
    mask = np.broadcast_to(True if mask is None else mask, (B, N, T, S))
    bias = np.broadcast_to(0.0 if bias is None else bias, (B, N, T, S))
    out = np.zeros((B, N, T, value.shape[-1]))
    for b, n, t in np.ndindex(B, N, T):
        keys, k = np.flatnonzero(mask[b, n, t]), n * key.shape[1] // N
        if len(keys):
            scores = key[b, k, keys] @ query[b, n, t] / np.sqrt(H) + bias[b, n, t, keys]
            weights = np.exp(scores - scores.max())
            out[b, n, t] = weights / weights.sum() @ value[b, k, keys]
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@each_sharing
@each_mask
@each_backend
def test_backends_follow_the_equation(backend, mask, kv_heads, with_bias, rng, monkeypatch):
    monkeypatch.setattr(backends, "CHUNK", 3)  # of four queries
    width = 3 if backend in FLEXIBLE_BACKENDS else H
    qkv, mask = make_qkv(rng, kv_heads, value_width=width), MASKS[mask]
    bias = normal(rng, 1, N, T, S) if with_bias else None
    out = ATTENTION_BACKENDS[backend](*qkv, mask, bias)
    np.testing.assert_allclose(out, by_hand(*qkv, mask, bias), rtol=2e-5, atol=2e-6)


@each_sharing
@each_mask
def test_gradients_agree_with_the_reference(mask, kv_heads, rng, monkeypatch):
    """The other backends call `einsum` for masks that are arrays."""
    monkeypatch.setattr(backends, "CHUNK", 3)  # of four queries
    inputs = *make_qkv(rng, kv_heads), normal(rng, 1, N, T, S)

    def found(attend):
        return gradients(lambda q, k, v, bias: attend(q, k, v, MASKS[mask], bias), inputs)

    expected = found(einsum)
    for name in ("xla", "chunked"):
        near(found(ATTENTION_BACKENDS[name]), expected)


@each_backend
def test_masked_keys_have_no_influence_and_without_keys_there_are_zeros(backend, rng):
    attend, (query, *others) = ATTENTION_BACKENDS[backend], make_qkv(rng)
    out = attend(query, *others, MASKS["nothing"])
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(out[0, :, [0, 2, 3]], 0.0)
    assert (out[0, :, 1] != 0).all()
    for gradient in gradients(lambda *kv: attend(query, *kv, MASKS["padding"]), others)[:2]:
        np.testing.assert_array_equal(gradient[0, :, 3:], 0.0)
        assert (jnp.abs(gradient[0, :, :3]).sum((0, 2)) > 0).all()


@each_backend
def test_scores_and_softmax_are_float32_under_bfloat16(backend):
    # Scores near 1000 that differ by less than bfloat16 resolves there (4).
    key = jnp.zeros((1, 1, 2, 2)).at[0, 0, :, 0].set(32.0).at[0, 0, 1, 1].set(1.0)
    query = jnp.array([44.0, 1.0]).reshape(1, 1, 1, 2)
    value = jnp.array([[0.0, 0.0], [1.0, 1.0]]).reshape(1, 1, 2, 2)
    inputs = (each.astype(jnp.bfloat16) for each in (query, key, value))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own function relies on it
        out = ATTENTION_BACKENDS[backend](*inputs)
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + np.exp(-1 / np.sqrt(2)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2)


@pytest.mark.parametrize("backend", FLEXIBLE_BACKENDS)
def test_dropped_weights_are_zero_and_the_others_are_scaled_up(backend, rng):
    """With the identity for values, the output is the weights."""
    size, rate = 64, 0.3
    query, key = normal(rng, 2, 2, size, 4), normal(rng, 2, 2, size, 4)
    value = jnp.broadcast_to(jnp.eye(size), (2, 2, size, size))
    attend = partial(ATTENTION_BACKENDS[backend], query, key, value, masking.causal(size))
    whole = attend()
    dropped = attend(drop=partial(dropout, rate=rate, stream=nnx.Rngs(dropout=0).dropout))
    gone = (whole > 0) & (dropped == 0)
    np.testing.assert_allclose(gone.sum() / (whole > 0).sum(), rate, atol=0.03)
    np.testing.assert_allclose(dropped[~gone], whole[~gone] / (1 - rate), rtol=1e-5)


def make_attention(**options):
    return MultiHeadAttention(2, 8, 6, rngs=nnx.Rngs(0), **{"use_bias": False} | options)


def products(function, x):
    jaxpr = jax.make_jaxpr(function)(x)
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def test_attention_drops_weights_in_training_alone_and_sows_them_whole_if_told_to(rng):
    attention, x = make_attention(dropout_rate=0.5, deterministic=False), normal(rng, B, T, 8)
    plain, rngs = attention(x, deterministic=True), nnx.Rngs(attention=0, dropout=1)
    assert (attention(x, rngs=rngs) != plain).any()
    assert [int(each.count[...]) for each in (rngs.attention, rngs.dropout)] == [1, 0]
    assert (attention(x) != attention(x)).any()  # each call draws from the stream that it keeps
    attention.eval()
    np.testing.assert_array_equal(attention(x), plain)

    def sown(x, **mode):
        sowing = nnx.clone(attention)
        sowing.sow_weights = True
        out, found = nnx.capture(sowing, nnx.Intermediate)(x, **mode)
        return out, found["attention_weights"][0]

    out, weights = sown(x, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(weights, sown(x)[1])
    np.testing.assert_allclose(weights.sum(-1), np.ones((B, 2, T)), rtol=1e-6)
    assert (out != plain).any()
    assert products(lambda x: attention(x, deterministic=True), x) < products(sown, x)


def test_qk_norm_has_scales_of_its_own_and_comes_before_positions(rng):
    """Keys and queries by hand: x W, divided by its root mean square, times g, turned."""
    x = normal(rng, B, T, 8)
    attention = make_attention(normalize_qk=True, qk_norm=partial(RMSNorm, epsilon=1e-6))
    turn = jnp.array([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    scales = {"query": jnp.array([1.0, 2.0, 3.0]), "key": jnp.array([3.0, 0.5, 1.0])}
    attention.query_ln.scale[...], attention.key_ln.scale[...] = scales.values()

    def by_hand(name):
        y = jnp.einsum("btd,dnh->bnth", x, getattr(attention, name).kernel[...])
        return y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True)) * scales[name] @ turn

    query = attention.project_query(x, lambda y: y @ turn)
    key, _ = attention.project_kv(x, rotate=lambda y: y @ turn)
    near([query, key], [by_hand("query"), by_hand("key")])


def packed(length):
    """Two rows: three examples and padding; one example, then nothing."""
    first = np.array([1, 1, 1, 1, 2, 2, 3, 0])[np.arange(length) * 8 // length]
    second = (np.arange(length) < length // 3).astype(int)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


# T and S: several chunks of 32 queries, and no multiples of anything.
LONG, SHORT = packed(70), packed(45)
FIRST_ALONE = (SHORT == 1).astype(jnp.int32).at[1].set(0)

SHORT_MASKS = {
    "segments": masking.Mask(LONG, SHORT),
    "padding": masking.Mask(jnp.ones((B, 70), jnp.int32), FIRST_ALONE),
    "causal": masking.Mask(LONG, LONG, causal=True),
    "window": masking.Mask(LONG, LONG, window=5),
    "causal window": masking.Mask(LONG, LONG, causal=True, window=5),
    "no source": masking.Mask(LONG, SHORT.at[0].set(0)),
}


def long_qkv(rng, mask, kv_heads=N):
    return make_qkv(rng, kv_heads, (mask.queries.shape[1], mask.keys.shape[1]))


@pytest.mark.parametrize("k", range(len(SHORT_MASKS)), ids=SHORT_MASKS.keys())
def test_short_masks_agree_with_the_reference(k, rng, monkeypatch):
    """Kernels are interpreted here; fully masked rows are zero and have finite gradients."""
    monkeypatch.setattr(backends, "CHUNK", 32)
    mask = [*SHORT_MASKS.values()][k]
    inputs = long_qkv(rng, mask, kv_heads=(N, 2)[k % 2])
    expected = gradients(lambda *qkv: einsum(*qkv, mask.array()), inputs)
    nothing = ~np.asarray(mask.array().any(-1))[:, 0]
    assert nothing.any()
    for name in backends.SHORT_MASK_BACKENDS:
        attend = ATTENTION_BACKENDS[name]
        *_, out = found = gradients(lambda *qkv, attend=attend: attend(*qkv, mask), inputs)
        near(found, expected, 2e-4, 2e-5)
        np.testing.assert_array_equal(out.swapaxes(1, 2)[nothing], 0.0)


def test_memory_of_chunks_grows_with_the_length_and_that_of_the_reference_with_its_square():
    def temporaries(attend, length):
        mask = masking.Mask(*(jnp.ones((1, length), jnp.int32),) * 2, causal=True)
        x = jnp.zeros((1, 1, length, 8))
        compiled = jax.jit(jax.grad(lambda x: attend(x, x, x, mask).sum())).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked, 4096) / temporaries(chunked, 2048) < 2.3
    assert temporaries(einsum, 4096) / temporaries(einsum, 2048) > 3.5


def test_the_kernel_is_what_runs_where_it_can(rng):
    mask = SHORT_MASKS["causal"]
    query, *others = long_qkv(rng, mask)

    def has_kernel(*args):
        return "pallas_call" in str(jax.make_jaxpr(ATTENTION_BACKENDS["splash"])(*args))

    assert has_kernel(query, *others, mask)
    assert not has_kernel(query, *others, mask.array())
    assert not has_kernel(query[:, :, :1], *others, replace(mask, queries=mask.queries[:, :1]))


FAR, HALF = {"length": 512}, {"dtype": jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("expected", "platform", "changes"),
    [
        ("einsum", "cpu", {}),
        ("chunked", "cpu", {"length": 4096}),
        ("splash", "tpu", FAR),
        ("einsum", "tpu", {}),
        ("einsum", "tpu", FAR | {"biased": True}),
        ("einsum", "tpu", FAR | {"flexible": True}),
        ("cudnn", "gpu", HALF),
        ("einsum", "gpu", {}),
        ("einsum", "gpu", HALF | {"head_width": 12}),
    ],
)
def test_auto_picks_by_platform_and_shapes(expected, platform, changes):
    usual = {"dtype": jnp.dtype("float32"), "head_width": 64, "length": 64, "biased": False}
    assert backends.pick(platform, **usual | {"flexible": False} | changes) == expected


def test_a_config_says_what_auto_comes_to():
    for expected, changes in (("chunked", {}), ("einsum", {"attention_dropout_rate": 0.1})):
        config = small_model(attention_backend="auto", **changes).config
        assert config.auto_backend(4096) == expected


def test_a_backend_that_is_unknown_or_lacks_its_gpu_is_one_line(rng):
    message = r"backend=einsums: choose one of .*did you mean einsum"
    refused(message, make_attention, backend="einsums")
    query, *rest = (each.astype(jnp.bfloat16) for each in long_qkv(rng, SHORT_MASKS["causal"]))
    refused("attention_backend=cudnn.*choose another", ATTENTION_BACKENDS["cudnn"], query, *rest)
    ATTENTION_BACKENDS["cudnn"](query[:, :, :4], *rest)  # a step of decoding is einsum's
