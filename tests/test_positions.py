import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model
from transformer.positions import POSITIONS, ALiBi, Learned, RelativeBias, Rotary, Sinusoidal


def make(kind, width=8, heads=2, causal=False, max_length=64):
    return kind(width, heads, causal=causal, max_length=max_length, rngs=nnx.Rngs(0))


def at(*positions):
    return jnp.array([positions])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_hooks_depend_on_the_positions_that_are_given(name, causal, rng):
    """What a token is told is the same whether it comes alone, as in decoding, or with others."""
    position = make(POSITIONS[name], causal=causal)
    embedded = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    heads = jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32)
    everywhere = at(3, 4, 7, 20, 40)
    whole = position.embed(embedded, everywhere), position.rotate(heads, everywhere)
    bias = position.bias(everywhere, everywhere)
    for t, here in enumerate((3, 4, 7, 20, 40)):
        one = position.embed(embedded[:, t : t + 1], at(here))
        np.testing.assert_allclose(one[:, 0], whole[0][:, t], rtol=1e-6)
        one = position.rotate(heads[:, t : t + 1], at(here))
        np.testing.assert_allclose(one[:, 0], whole[1][:, t], rtol=1e-5, atol=1e-6)
        if bias is not None:
            one = position.bias(at(here), everywhere)
            np.testing.assert_array_equal(one[:, :, 0], bias[:, :, t])


@pytest.mark.parametrize("name", POSITIONS)
def test_the_encoder_knows_the_order_of_tokens_unless_positions_are_none(name):
    """Without them the memory of permuted tokens is the memory of the tokens, permuted."""
    model = small_model(position=name)
    params = random_params(model, 0)
    source, order = at(3, 4, 5, 6, 7, 8), np.array([2, 0, 5, 1, 4, 3])

    @jax.jit
    def encode(source):
        return model.bind(params).encode(source, jnp.ones_like(source))[0]

    difference = jnp.abs(encode(source[:, order]) - encode(source)[order]).max()
    assert difference < 1e-5 if name == "none" else difference > 1e-2


def test_sinusoidal_positions_are_the_papers():
    x = jnp.zeros((1, 50, 6))
    out = make(Sinusoidal, 6).embed(x, jnp.arange(50)[None])
    for position in (0, 1, 17, 49):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(out[0, position, 2 * i], np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(out[0, position, 2 * i + 1], np.cos(angle), atol=1e-5)


def test_learned_positions_end_in_nan():
    out = make(Learned, 4, max_length=3).embed(jnp.zeros((1, 4, 4)), jnp.arange(4)[None])
    assert jnp.isnan(out[0, 3]).all()
    assert jnp.isfinite(out[0, :3]).all()


def test_learned_positions_are_trained():
    def loss(position):
        return position.embed(jnp.zeros((1, 2, 4)), jnp.arange(2)[None]).sum()

    gradient = nnx.grad(loss)(make(Learned, 4, max_length=3)).table[...]
    np.testing.assert_array_equal(gradient, jnp.ones((3, 4)).at[2].set(0.0))


@pytest.mark.parametrize("name", POSITIONS)
def test_what_is_trained_is_learned_or_relative(name):
    leaves = jax.tree.leaves(nnx.state(make(POSITIONS[name])))
    shapes = {"learned": [(64, 8)], "relative": [(32, 2)]}
    assert [leaf.shape for leaf in leaves] == shapes.get(name, [])


def test_rotary_turns_pairs_as_complex_numbers(rng):
    """x_i + j x_{i + H/2}, times e^(j p / 10000^(2i/H)), in float64."""
    x = rng.normal(size=(1, 4, 2, 6))
    positions = np.array([0, 1, 17, 300])
    rate = 10000.0 ** (-2 * np.arange(3) / 6)
    turn = np.exp(1j * positions[:, None, None] * rate)
    pairs = (x[..., :3] + 1j * x[..., 3:]) * turn
    expected = np.concatenate([pairs.real, pairs.imag], -1)
    out = make(Rotary).rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions)[None])
    np.testing.assert_allclose(out, expected, atol=2e-4)


def test_rotary_scores_depend_on_the_distance_alone(rng):
    position = make(Rotary)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(p, q):
        return float((position.rotate(query, at(p)) * position.rotate(key, at(q))).sum())

    for near in (0, 1, 5):
        expected = score(near, 0)
        for shift in (1, 10, 200):
            np.testing.assert_allclose(score(near + shift, shift), expected, atol=2e-4)
    scores = {round(score(near, 0), 2) for near in (-5, -1, 0, 1, 5)}
    assert len(scores) == 5


def test_rotary_keeps_lengths_and_dtypes_and_position_0_as_it_is(rng):
    position = make(Rotary)
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.float32)
    out = position.rotate(x, at(0, 7, 100))
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    length, expected = (jnp.square(each).sum(-1) for each in (out, x))
    np.testing.assert_allclose(length, expected, rtol=1e-5)
    assert (out[:, 1:] != x[:, 1:]).all()
    assert position.rotate(x.astype(jnp.bfloat16), at(0, 7, 100)).dtype == jnp.bfloat16


def published_bucket(distance, causal):
    """T5's rule in whole numbers: bucket k of the far ones begins at exact · (128 / exact)^(k / n).

    distance: key position - query position.
    """
    buckets, first = 32, 0
    if not causal:
        buckets, first = 16, 16 if distance > 0 else 0
    distance = abs(distance)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far, rooms = 0, buckets - exact
    while far < rooms - 1 and (distance**rooms) * exact ** (far + 1) >= (
        exact**rooms * 128 ** (far + 1)
    ):
        far += 1
    return first + exact + far


@pytest.mark.parametrize("causal", [False, True])
def test_relative_buckets_are_the_published_ones(causal):
    distances = np.arange(-300, 1 if causal else 301)  # no key of the decoder is later
    ours = make(RelativeBias, causal=causal).bucket(jnp.asarray(distances))
    expected = [published_bucket(int(distance), causal) for distance in distances]
    np.testing.assert_array_equal(ours, expected)
    assert set(expected) == set(range(32)) - (set() if causal else {16})


def test_relative_bias_is_the_heads_entry_for_the_distance():
    position = make(RelativeBias, heads=3)
    queries, keys = (4, 0), (0, 4, 9, 200)
    bias = position.bias(at(*queries), at(*keys))
    assert bias.shape == (1, 3, 2, 4)
    for t, s in np.ndindex(2, 4):
        expected = position.table[...][published_bucket(keys[s] - queries[t], False)]
        np.testing.assert_array_equal(bias[0, :, t, s], expected)


def test_the_encoder_tells_sides_apart_and_the_decoder_twice_as_many_distances():
    module = small_model(position="relative").build(jax.random.key(0))
    encoder, decoder = (
        each.bias(at(20), at(9, 10, 30))[0, 0, 0]
        for each in (module.source_position, module.target_position)
    )
    assert encoder[0] == encoder[1]  # 10 and 11 back share a bucket
    assert encoder[1] != encoder[2]  # 10 back and 10 ahead do not
    assert decoder[0] != decoder[1]


@pytest.mark.parametrize("layers", [1, 3])
def test_all_layers_of_a_stack_share_its_relative_bias(layers):
    """One table a stack; if it allows distance 0 alone, every layer attends to itself."""
    model = small_model(position="relative", layers=layers)
    tables = [name for name in model.shapes if "position" in name]
    assert sorted(tables) == ["source_position/table", "target_position/table"]
    params = random_params(model, 0)
    params |= {name: jnp.full((32, 2), -1e4).at[0].set(0.0) for name in tables}
    maps = {"encoder": [], "decoder": [], "cross": []}
    tokens = at(3, 4, 5, 6)
    ones = jnp.ones_like(tokens)
    model.bind(params)(tokens, ones, tokens, ones, maps=maps)
    itself = np.broadcast_to(np.eye(4), (1, 2, 4, 4))
    for weights in maps["encoder"] + maps["decoder"]:
        np.testing.assert_array_equal(weights, itself)
    assert [len(each) for each in maps.values()] == [layers] * 3
    assert (maps["cross"][0] > 0).all()


def test_alibi_slopes_are_the_papers():
    """1/2, 1/4 … 1/256 for 8 heads, times the distance to either side."""
    bias = make(ALiBi, heads=8).bias(at(5), at(5, 4, 6, 0))[0, :, 0]
    slopes = 0.5 ** np.arange(1, 9)
    np.testing.assert_allclose(bias, -slopes[:, None] * np.array([0, 1, 1, 5]), rtol=1e-6)


def test_alibi_by_hand():
    bias = make(ALiBi, heads=2).bias(at(0, 1, 2), at(0, 1, 2))
    distance = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_allclose(bias[0], [-distance / 16, -distance / 256], rtol=1e-6)
