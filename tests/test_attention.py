from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import small_model
from transformer.errors import UserError
from transformer.modules import masking
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dot_product_attention import (
    ATTENTION_BACKENDS,
    BFLOAT16_BACKENDS,
    FLEXIBLE_BACKENDS,
    SHORT_MASK_BACKENDS,
    chunked_attention,
    einsum_attention,
    masked_softmax,
    pick,
)
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

# Those that run here; cuDNN wants its GPU. What they take as an array the kernels leave to the
# reference: see MASKS_IN_SHORT for what they take themselves.
HERE = [name for name in ATTENTION_BACKENDS if name not in BFLOAT16_BACKENDS]
each_backend = pytest.mark.parametrize("backend", HERE)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_sharing = pytest.mark.parametrize("kv_heads", [N, 2, 1])  # heads of the keys and values


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_qkv(rng, kv_heads=N, value_width=H):
    keys, values = normal(rng, B, kv_heads, S, H), normal(rng, B, kv_heads, S, value_width)
    return normal(rng, B, N, T, H), keys, values


def by_hand(query, key, value, mask, bias=None):
    """Equation 1, one query at a time, over the keys it may attend to, in float64.

    The first N/K heads read the first of the K heads of keys and values, and so on.
    """
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
def test_backends_follow_the_equation(backend, mask, kv_heads, with_bias, rng):
    qkv, mask = make_qkv(rng, kv_heads), MASKS[mask]
    bias = normal(rng, 1, N, T, S) if with_bias else None
    out = ATTENTION_BACKENDS[backend](*qkv, mask, bias)
    np.testing.assert_allclose(out, by_hand(*qkv, mask, bias), rtol=2e-5, atol=2e-6)


@each_sharing
@pytest.mark.parametrize("backend", FLEXIBLE_BACKENDS)
def test_values_may_have_a_width_of_their_own(backend, kv_heads, rng):
    inputs = *make_qkv(rng, kv_heads, value_width=3), MASKS["padding"]
    out = ATTENTION_BACKENDS[backend](*inputs)
    np.testing.assert_allclose(out, by_hand(*inputs), rtol=2e-5, atol=2e-6)


@each_sharing
@each_mask
@pytest.mark.parametrize("backend", [name for name in HERE if name != "einsum"])
def test_gradients_agree_with_the_reference_and_are_finite(backend, mask, kv_heads, rng):
    inputs = *make_qkv(rng, kv_heads), normal(rng, 1, N, T, S)

    def gradients(name):
        def loss(*inputs):
            return jnp.sin(ATTENTION_BACKENDS[name](*inputs[:3], MASKS[mask], inputs[3])).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*inputs)

    for mine, theirs in zip(gradients(backend), gradients("einsum"), strict=True):
        assert jnp.isfinite(mine).all()
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@each_backend
def test_masked_keys_have_no_influence_and_without_keys_there_are_zeros(backend, rng):
    attend, (query, *others) = ATTENTION_BACKENDS[backend], make_qkv(rng)
    out = attend(query, *others, MASKS["nothing"])
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(out[0, :, [0, 2, 3]], 0.0)
    assert (out[0, :, 1] != 0).all()

    def loss(*others):
        return jnp.sin(attend(query, *others, MASKS["padding"])).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(*others):
        np.testing.assert_array_equal(gradient[0, :, 3:], 0.0)
        assert (jnp.abs(gradient[0, :, :3]).sum((0, 2)) > 0).all()


@each_backend
def test_scores_and_softmax_are_float32_under_bfloat16(backend):
    # Scores near 1000 that differ by less than bfloat16 can tell apart there (4).
    key = jnp.zeros((1, 1, 2, 2)).at[0, 0, :, 0].set(32.0).at[0, 0, 1, 1].set(1.0)
    query = jnp.zeros((1, 1, 1, 2)).at[..., 0].set(44.0).at[..., 1].set(1.0)
    value = jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1) * jnp.ones((1, 1, 2, 2))
    query, key, value = (each.astype(jnp.bfloat16) for each in (query, key, value))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own function relies on it
        out = ATTENTION_BACKENDS[backend](query, key, value)
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + np.exp(-1 / np.sqrt(2)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2)


def test_softmax_survives_large_scores():
    scores = jnp.array([[[[1e4, 1e4 - 1.0, -1e4]]]])
    weights = masked_softmax(scores, jnp.ones(scores.shape, bool))
    np.testing.assert_allclose(weights, jax.nn.softmax(scores), rtol=1e-6)


@pytest.mark.parametrize("backend", FLEXIBLE_BACKENDS)
def test_dropped_weights_are_zero_and_the_others_are_scaled_up(backend, rng):
    """With the identity for values, what comes out is the weights."""
    size, rate = 64, 0.3
    query, key = normal(rng, 2, 2, size, 4), normal(rng, 2, 2, size, 4)
    value = jnp.broadcast_to(jnp.eye(size), (2, 2, size, size))
    attend = partial(ATTENTION_BACKENDS[backend], query, key, value, masking.causal(size))
    whole = attend()
    dropped = attend(drop=partial(dropout, rate=rate, stream=nnx.Rngs(dropout=0).dropout))
    allowed = whole > 0
    gone = allowed & (dropped == 0)
    np.testing.assert_allclose(gone.sum() / allowed.sum(), rate, atol=0.03)
    np.testing.assert_allclose(dropped[~gone], whole[~gone] / (1 - rate), rtol=1e-5)


def make_attention(heads=2, value_width=3, **options):
    sizes = {"qkv_features": 3 * heads, "value_features": value_width * heads, "use_bias": False}
    return MultiHeadAttention(heads, 8, rngs=nnx.Rngs(0), **sizes | options)


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


@pytest.mark.parametrize("value_width", [3, 5])
def test_multi_head_attention_is_its_definition(value_width, rng):
    attention = make_attention(use_bias=True, value_width=value_width)
    x, y = normal(rng, B, T, 8), normal(rng, B, S, 8)

    def head(i):
        query, key, value = (
            inputs @ linear.kernel[...][:, i] + linear.bias[...][i]
            for linear, inputs in ((attention.query, x), (attention.key, y), (attention.value, y))
        )
        return jax.nn.softmax(query @ key.swapaxes(1, 2) / jnp.sqrt(3.0)) @ value

    concatenated = jnp.concatenate([head(0), head(1)], axis=-1)
    matrix = attention.out.kernel[...].reshape(2 * value_width, 8)
    expected = concatenated @ matrix + attention.out.bias[...]
    np.testing.assert_allclose(attention(x, y), expected, rtol=1e-4, atol=1e-5)
    projected = attention.attend(attention.project_query(x), attention.project_kv(y))
    np.testing.assert_array_equal(projected, attention(x, y))


@pytest.mark.parametrize(("kv_heads", "normalize_qk"), [(1, True), (2, True), (2, False)])
def test_sharing_keys_and_values_is_having_them_twice(kv_heads, normalize_qk, rng):
    """Grouped-query attention is multi-head attention whose neighbouring heads are alike."""
    shared = make_attention(4, num_kv_heads=kv_heads, use_bias=True, normalize_qk=normalize_qk)
    shared.key.bias[...] = normal(rng, kv_heads, 3)
    whole = make_attention(4, use_bias=True, normalize_qk=normalize_qk)
    whole.query, whole.out = shared.query, shared.out
    for name in ("key", "value"):
        few, many = getattr(shared, name), getattr(whole, name)
        many.kernel[...] = jnp.repeat(few.kernel[...], 4 // kv_heads, axis=1)
        many.bias[...] = jnp.repeat(few.bias[...], 4 // kv_heads, axis=0)
    x, mask = normal(rng, B, T, 8), masking.causal(T)
    one, other = (each(x, mask=mask) for each in (shared, whole))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_qk_norm_has_scales_of_its_own_and_comes_before_positions(rng):
    """Keys and queries by hand: x W, divided by its root mean square, times g, turned."""
    x = normal(rng, B, T, 8)
    attention = make_attention(normalize_qk=True, qk_norm=partial(RMSNorm, epsilon=1e-6))
    # Three coordinates cannot be turned in pairs: a rotation of the first two will do.
    turn = jnp.array([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    scales = {"query": jnp.array([1.0, 2.0, 3.0]), "key": jnp.array([3.0, 0.5, 1.0])}
    attention.query_ln.scale[...], attention.key_ln.scale[...] = scales.values()

    def by_hand(name):
        y = jnp.einsum("btd,dnh->bnth", x, getattr(attention, name).kernel[...])
        return y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True)) * scales[name] @ turn

    query = attention.project_query(x, lambda y: y @ turn)
    key, _ = attention.project_kv(x, rotate=lambda y: y @ turn)
    np.testing.assert_allclose(query, by_hand("query"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(key, by_hand("key"), rtol=1e-4, atol=1e-5)


def packed(length):
    """Two rows: three examples and padding; one example, then nothing."""
    eighths = np.arange(length) * 8 // length
    first = np.array([1, 1, 1, 1, 2, 2, 3, 0])[eighths]
    second = (np.arange(length) < length // 3).astype(int)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


# T and S: several chunks once a chunk is 32 queries, and no multiple of anything.
LONG, SHORT = packed(70), packed(45)
FIRST_ALONE = (SHORT == 1).astype(jnp.int32).at[1].set(0)

MASKS_IN_SHORT = {
    "segments": masking.Mask(LONG, SHORT),
    "padding": masking.Mask(jnp.ones((B, 70), jnp.int32), FIRST_ALONE),
    "causal": masking.Mask(LONG, LONG, causal=True),
    "window": masking.Mask(LONG, LONG, window=5),
    "causal window": masking.Mask(LONG, LONG, causal=True, window=5),
    "no source": masking.Mask(LONG, SHORT.at[0].set(0)),
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("transformer.modules.dot_product_attention.CHUNK", 32)


def long_qkv(rng, mask, kv_heads=N):
    t, s = mask.queries.shape[1], mask.keys.shape[1]
    return [normal(rng, B, *each, H) for each in ((N, t), (kv_heads, s), (kv_heads, s))]


@pytest.mark.parametrize("kv_heads", [N, 2])
@pytest.mark.parametrize("mask", MASKS_IN_SHORT.values(), ids=MASKS_IN_SHORT.keys())
@pytest.mark.parametrize("backend", SHORT_MASK_BACKENDS)
def test_masks_in_short_give_outputs_and_gradients_of_the_reference(
    backend, mask, kv_heads, rng, small_chunks
):
    """Kernels are interpreted here; fully masked rows are zero and have finite gradients."""
    inputs = long_qkv(rng, mask, kv_heads)

    def both(name, mask):
        def loss(*inputs):
            out = ATTENTION_BACKENDS[name](*inputs, mask)
            return jnp.sin(out + 1.0).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return (out, *gradients)

    mine, theirs = both(backend, mask), both("einsum", mask.array())
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    nothing = ~np.asarray(mask.array().any(-1))[:, 0]
    assert nothing.any()
    np.testing.assert_array_equal(mine[0].swapaxes(1, 2)[nothing], 0.0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", [None, "keys", "rows"])
def test_chunks_take_arrays_too(mask, with_bias, rng, small_chunks):
    segments = MASKS_IN_SHORT["segments"]
    inputs = long_qkv(rng, segments)
    mask = {None: None, "keys": masking.padding(SHORT == 1), "rows": segments.array()}[mask]
    bias = normal(rng, 1, N, 70, 45) if with_bias else None

    def gradients(attend):
        return jax.grad(lambda *args: jnp.sin(attend(*args, mask, bias)).sum(), (0, 1, 2))(*inputs)

    for one, other in zip(gradients(chunked_attention), gradients(einsum_attention), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_memory_of_chunks_grows_with_the_length_and_that_of_the_reference_with_its_square():
    def temporaries(attend, length):
        mask = masking.Mask(*(jnp.ones((1, length), jnp.int32),) * 2, causal=True)
        x = jnp.zeros((1, 1, length, 8))
        compiled = jax.jit(jax.grad(lambda x: attend(x, x, x, mask).sum())).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked_attention, 4096) / temporaries(chunked_attention, 2048) < 2.3
    assert temporaries(einsum_attention, 4096) / temporaries(einsum_attention, 2048) > 3.5


def test_the_kernel_is_what_runs_where_it_can(rng):
    mask = MASKS_IN_SHORT["causal"]
    query, *others = long_qkv(rng, mask)

    def has_kernel(*args):
        return "pallas_call" in str(jax.make_jaxpr(ATTENTION_BACKENDS["splash"])(*args))

    assert has_kernel(query, *others, mask)
    assert not has_kernel(query, *others, mask.array())
    assert not has_kernel(query[:, :, :1], *others, replace(mask, queries=mask.queries[:, :1]))


FAR = {"lengths": (512, 512)}
HALF = {"dtype": jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("expected", "platform", "changes"),
    [
        ("einsum", "cpu", {}),
        ("chunked", "cpu", {"lengths": (4096, 4096)}),
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
    usual = {"dtype": jnp.dtype("float32"), "head_width": 64, "lengths": (64, 64)}
    assert pick(platform, **usual | {"biased": False, "flexible": False} | changes) == expected


def test_a_config_says_what_auto_comes_to():
    def found(**changes):
        return small_model(**{"attention_backend": "auto"} | changes).config.backend_at(4096)

    assert found() == "chunked"
    assert found(attention_dropout_rate=0.1) == "einsum"
    assert found(attention_backend="xla") == "xla"


def test_without_its_gpu_cudnn_is_one_line(rng):
    query, *rest = (each.astype(jnp.bfloat16) for each in long_qkv(rng, MASKS_IN_SHORT["causal"]))
    with pytest.raises(UserError, match=r"attention_backend=cudnn.*choose another"):
        ATTENTION_BACKENDS["cudnn"](query, *rest)
    ATTENTION_BACKENDS["cudnn"](query[:, :, :4], *rest)  # a step of decoding is einsum's
