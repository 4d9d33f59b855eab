import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import maps_of, normal, random_params, refused, small_model
from transformer.data.batches import Dataset
from transformer.modules.attention import KeyValueCache, MultiHeadAttention
from transformer.modules.positions import POSITIONS, RATES, SINUSOID_LAYOUTS
from transformer.testing import permutation_differences

FEW = {"buckets": 12, "distance": 50}


def make(name, width=8, heads=2, **options):
    return POSITIONS[name](width, num_heads=heads, **options, rngs=nnx.Rngs(0))


def at(*positions):
    return jnp.array([positions])


@pytest.mark.parametrize("name", POSITIONS)
def test_the_encoder_knows_the_order_of_tokens_unless_positions_are_none(name):
    model = small_model(position_encoding=name)
    params = random_params(model, 0)

    @jax.jit
    def encode(source):
        return model.bind(params).encode(source, jnp.ones_like(source))

    found = permutation_differences(encode, at(3, 4, 5, 6, 7, 8))
    assert (not found) if name == "none" else max(each.magnitude for each in found) > 1e-2


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("layout", SINUSOID_LAYOUTS)
@pytest.mark.parametrize(("rates", "last"), [("paper", 4 / 6), ("tensor2tensor", 1)])
def test_sinusoidal_positions_are_those_of_the_paper_or_of_tensor2tensor(
    rates, last, layout, offset
):
    position = make("sinusoidal", 6, rates=rates, layout=layout, offset=offset)
    out = position(jnp.zeros((1, 50, 6)))[0]
    angles = offset + np.arange(50)[:, None]
    angles = angles / 10000 ** (last * np.arange(3) / 2)
    sines = np.s_[:, 0::2] if layout == "neighbours" else np.s_[:, :3]
    cosines = np.s_[:, 1::2] if layout == "neighbours" else np.s_[:, 3:]
    np.testing.assert_allclose(out[sines], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(out[cosines], np.cos(angles), atol=1e-5)


def test_the_least_sinusoidal_width_has_one_rate():
    out = [make("sinusoidal", 2, rates=rates)(jnp.zeros((1, 3, 2))) for rates in RATES]
    np.testing.assert_array_equal(*out)
    refused("sinusoid_layout=half: .*halves", make, "sinusoidal", layout="half")
    refused("sinusoid_rates=papers: .*paper", make, "sinusoidal", rates="papers")


def test_learned_positions_begin_at_the_row_of_their_offset():
    learned = make("learned", 4, max_length=3, offset=2)
    out = learned(jnp.zeros((1, 4, 4)))[0]
    np.testing.assert_array_equal(out[:3], learned.embedding[...][2:])
    assert jnp.isnan(out[3]).all()
    shapes = small_model(position_encoding="learned", position_offset=2).shapes
    assert shapes["source_position/embedding"].shape == (32 + 2, 16)


def test_learned_positions_are_trained_and_end_in_nan():
    def loss(position):
        return position(jnp.zeros((1, 2, 4))).sum()

    learned = make("learned", 4, max_length=3)
    gradient = nnx.grad(loss)(learned).embedding[...]
    np.testing.assert_array_equal(gradient, jnp.ones((3, 4)).at[2].set(0.0))
    finite = jnp.isfinite(learned(jnp.zeros((1, 4, 4)))[0])
    assert finite[:3].all()
    assert not finite[3].any()


@pytest.mark.parametrize(("own", "base"), [({}, 10_000.0), ({"base": 100.0}, 100.0)], ids=str)
def test_rotary_turns_pairs_as_complex_numbers(own, base, rng):
    """x_i + j x_{i + H/2}, times e^(j p / base^(2i/H)), in float64."""
    x, positions, rotary = normal(rng, 1, 4, 2, 6), np.array([0, 1, 17, 300]), make("rotary", **own)
    angles = positions[:, None, None] * base ** (-2 * np.arange(3) / 6)
    pairs = (np.float64(x[..., :3]) + 1j * np.float64(x[..., 3:])) * np.exp(1j * angles)
    out = rotary.rotate(x, at(*positions))
    np.testing.assert_allclose(out, np.concatenate([pairs.real, pairs.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    assert rotary.rotate(x.astype(jnp.bfloat16), at(*positions)).dtype == jnp.bfloat16


def published_bucket(distance, causal, buckets=32, most=128):
    """T5's rule in whole numbers: the k-th far bucket begins at n · (most / n)^(k / n)."""
    half = buckets // 2
    buckets, first = (buckets, 0) if causal else (half, half * (distance > 0))
    distance, n = abs(distance), buckets // 2
    begun = (distance**n * n**k >= n**n * most**k for k in range(1, n))
    return first + (distance if distance < n else n + sum(begun))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("own", "sizes"), [({}, (32, 128)), (FEW, (*FEW.values(),))], ids=str)
def test_relative_buckets_are_the_published_ones(own, sizes, causal):
    distances = np.arange(-300, 1 if causal else 301)  # no key of the decoder is later
    ours = make("relative", causal=causal, **own).bucket(jnp.asarray(distances))
    expected = [published_bucket(int(distance), causal, *sizes) for distance in distances]
    np.testing.assert_array_equal(ours, expected)
    assert set(expected) == set(range(sizes[0])) - (set() if causal else {sizes[0] // 2})


def test_relative_bias_is_the_heads_entry_for_the_distance():
    position, queries, keys = make("relative", heads=3), (4, 0), (0, 4, 9, 200)
    bias = position.bias(at(*queries), at(*keys))
    buckets = [[published_bucket(s - t, False) for s in keys] for t in queries]
    expected = np.asarray(position.embedding[...])[np.array(buckets)]
    np.testing.assert_array_equal(bias[0], np.moveaxis(expected, -1, 0))


def test_the_encoder_tells_sides_apart_and_the_decoder_twice_as_many_distances():
    module = small_model(position_encoding="relative").build(jax.random.key(0))
    sides = module.source_position, module.target_position
    encoder, decoder = (each.bias(at(20), at(9, 10, 30))[0, 0, 0] for each in sides)
    assert encoder[0] == encoder[1]  # 10 and 11 back share a bucket
    assert encoder[1] != encoder[2]  # 10 back and 10 ahead do not
    assert decoder[0] != decoder[1]


@pytest.mark.parametrize("layers", [1, 3])
def test_all_layers_of_a_stack_share_its_relative_bias(layers):
    """If the table allows distance 0 alone, every position attends to itself in every layer."""
    model = small_model(position_encoding="relative", num_layers=layers)
    tables = [name for name in model.shapes if "position" in name]
    assert sorted(tables) == ["source_position/embedding", "target_position/embedding"]
    params = random_params(model, 0)
    params |= {name: jnp.full((32, 2), -1e4).at[0].set(0.0) for name in tables}
    tokens = np.array([[3, 4, 5, 6]], np.int32)
    maps = maps_of(model, params, Dataset(tokens, tokens, 1))
    for weights in maps["encoder"] + maps["decoder"]:
        np.testing.assert_array_equal(weights, np.broadcast_to(np.eye(4), (1, 2, 4, 4)))
    assert [len(each) for each in maps.values()] == [layers] * 3
    assert (maps["cross"][0] > 0).all()


def test_alibi_slopes_are_the_papers():
    """1/2, 1/4 … 1/256 for 8 heads, times the distance to either side."""
    bias = make("alibi", heads=8).bias(at(5, 0), at(5, 4, 6, 0))[0]
    distance, slopes = np.array([[0, 1, 1, 5], [5, 4, 6, 0]]), 0.5 ** np.arange(1, 9)
    np.testing.assert_allclose(bias, -slopes[:, None, None] * distance, rtol=1e-6)
    two = make("alibi", heads=2).bias(at(0), at(1))[0, :, 0, 0]
    np.testing.assert_allclose(two, [-1 / 16, -1 / 256], rtol=1e-6)


def published_scores(query, key, kernel, u, v, *, queries, keys, scale):
    """Dai et al. 2019, section 3.3, pair by pair; [N, T, S]."""
    features, heads, _ = kernel.shape
    scores = np.zeros((heads, len(queries), len(keys)))
    rates = 10000.0 ** (-2 * np.arange(features // 2) / features)
    for (n, i, j), _ in np.ndenumerate(scores):
        angles = (queries[i] - keys[j]) * rates
        wave = np.concatenate([np.sin(angles), np.cos(angles)]) @ kernel[:, n]
        scores[n, i, j] = (query[n, i] + u[n]) @ key[n, j] + (query[n, i] + v[n]) @ wave
    return scale * scores


@pytest.mark.parametrize("scale", [None, 0.7])
def test_transformer_xl_scores_are_the_published_ones(scale, rng):
    """Also of shared keys, of positions with gaps, by keys as they are and as they are cached."""
    options = {"num_heads": 4, "num_kv_heads": 2, "scale": scale, "use_bias": False}
    attention = MultiHeadAttention(in_features=6, qkv_features=12, **options, rngs=nnx.Rngs(1))
    position = make("transformer_xl", 6, heads=4, head_width=3, scale=scale)
    position.content[...], position.position[...] = normal(rng, 4, 3), normal(rng, 4, 3)
    x, y = normal(rng, 1, 3, 6), normal(rng, 1, 5, 6)
    queries, keys = (0, 17, 301), (4, 0, 2, 300, 1)
    weights = (position.project.kernel, position.content, position.position)
    given = (attention.query(x), jnp.repeat(attention.key(y), 2, axis=2))
    given = *(each[0].swapaxes(0, 1) for each in given), *(each[...] for each in weights)
    given = [np.float64(each) for each in given]
    scores = published_scores(*given, queries=queries, keys=keys, scale=scale or 3**-0.5)
    values = jnp.repeat(attention.value(y)[0], 2, axis=1)
    heads = jnp.einsum("NTS,SNE->TNE", jax.nn.softmax(jnp.float32(scores)), values)
    expected = jnp.einsum("TNE,NED->TD", heads, attention.out.kernel[...])

    bias, query = position.bias(at(*queries), at(*keys)), attention.project_query(x)
    cached = KeyValueCache.of(attention.project_kv(y))
    for out in (attention(x, y, bias=bias), attention.attend_cached(query, cached, None, bias)):
        np.testing.assert_allclose(out[0], expected, atol=2e-5)


def test_a_model_has_transformer_xl_positions_of_its_sizes_in_each_stack_or_layer():
    own = {"position_encoding": "transformer_xl", "d_k": 3, "kernel_init": "normal"}
    shapes = {"project/kernel": (16, 2, 3), "content": (2, 3), "position": (2, 3)}
    for model, place in (
        (small_model(**own), "source_position/"),
        (small_model(**own, relative_per_layer=True, num_layers=2), "target_position/1/"),
    ):
        found = {name: leaf.shape for name, leaf in model.shapes.items() if place in name}
        assert found == {place + name: shape for name, shape in shapes.items()}
    kernel = small_model(**own).init(jax.random.key(0))["source_position/project/kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.3)
    odd = {"position_encoding": "transformer_xl", "d_model": 15, "num_heads": 3}
    refused("^model.d_model=15 is odd: transformer_xl", small_model, **odd)
