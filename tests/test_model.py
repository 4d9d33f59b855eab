"""Properties that hold for every variant of every table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import vaswani_base, vaswani_big
from tests.helpers import (
    TOKENIZER,
    VARIANTS,
    logits_of,
    random_params,
    small_model,
    strings,
    training_of,
)
from transformer.layers import NORM_PLACEMENTS
from transformer.model import Model, flatten
from transformer.model_config import ModelConfig
from transformer.normalization import NORMS, Statistic
from transformer.positions import POSITIONS
from transformer.recurrent import CELLS
from transformer.sharding import RULES

PAIRS = (("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
PADDED = strings(*PAIRS, source_length=9, target_length=8)

each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_an_output_depends_on_no_later_input(changes):
    """The gradient of logits t with respect to the embedded token u is exactly 0 for u > t.

    With a window it is 0 as well for a u that is too far back.
    """
    model = small_model(**changes)
    params = random_params(model, 0)
    batch = strings(("abcd", "dcba"))
    length = batch.target_in.shape[1]
    embedded = jax.random.normal(jax.random.key(0), (1, length, model.config.width))

    def outputs(embedded):
        module = model.bind(params)
        module.target_embedding = lambda tokens: embedded
        return module(batch.source, batch.source_segments, batch.target_in, batch.target_segments)

    jacobian = jax.jit(jax.jacobian(outputs))(embedded)[0, :, :, 0]  # [T, V, T, D]
    influence = jnp.abs(jacobian).sum((1, 3))
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    read = (back >= 0) & (back < (model.config.window or length))
    np.testing.assert_array_equal(influence[~read], 0.0)
    assert (influence[read] > 0).all()


@each_variant
def test_later_target_tokens_change_no_earlier_logits(changes):
    """The same through the front door: the mask that the model builds is causal."""
    model = small_model(**changes)
    params = random_params(model, 0)
    batch = strings(("abcd", "dcba"))
    logits = logits_of(model, params, batch)
    for t in range(1, batch.target_in.shape[1]):
        changed = batch._replace(target_in=batch.target_in.at[0, t:].set(9))
        difference = jnp.abs(logits_of(model, params, changed) - logits).sum((0, 2))
        np.testing.assert_array_equal(difference[:t], 0.0)
        assert difference[t] > 0


@each_variant
def test_padding_and_batch_mates_do_not_matter(changes):
    model = small_model(**changes)
    params = random_params(model, 1)
    together = logits_of(model, params, PADDED)
    row, pair = 1, PAIRS[1]
    alone = logits_of(model, params, strings(pair))
    length = len(pair[1]) + 1
    np.testing.assert_allclose(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


@each_variant
def test_what_stands_in_the_padding_does_not_matter(changes):
    model = small_model(**changes)
    params = random_params(model, 1)
    real = PADDED.target_segments == 1
    np.testing.assert_array_equal(
        logits_of(model, params, PADDED)[real], logits_of(model, params, littered(PADDED))[real]
    )


def littered(batch):
    """The same batch with tokens where its padding was."""
    return batch._replace(
        source=jnp.where(batch.source_segments == 0, 5, batch.source),
        target_in=jnp.where(batch.target_segments == 0, 6, batch.target_in),
    )


@each_variant
def test_cached_decoding_is_teacher_forcing_several_positions_at_once_or_one_by_one(changes):
    model = small_model(**changes)
    params = random_params(model, 2)
    whole = logits_of(model, params, PADDED)
    length = PADDED.target_in.shape[1]

    start, step = cached(model, PADDED, length)
    cache, parts = start(params), []
    for tokens in jnp.split(PADDED.target_in, [3, 4, 5, 6, 7], axis=1):
        logits, cache = step(params, tokens, cache)
        parts.append(logits)
    assert int(cache.filled) == length
    # A row that has ended reads padding: only real positions are compared.
    real = PADDED.target_segments == 1
    decoded = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(decoded[real], whole[real], rtol=1e-4, atol=1e-5)


def cached(model, batch, length):
    """Jitted: params → an empty cache; params, tokens, cache → logits, cache."""

    @jax.jit
    def start(params):
        module = model.bind(params)
        memory = module.encode(batch.source, batch.source_segments)
        return module.start_cache(memory, batch.source_segments, length)

    return start, jax.jit(
        lambda params, tokens, cache: model.bind(params).decode_step(tokens, cache)
    )


def test_decoding_past_the_cache_is_nan_and_not_silent():
    model = small_model()
    params = random_params(model, 0)
    batch = strings(("ab", "ba"))
    start, step = cached(model, batch, 2)
    within, cache = step(params, batch.target_in[:, :2], start(params))
    beyond, _ = step(params, batch.target_in[:, 2:3], cache)
    assert jnp.isfinite(within).all()
    assert jnp.isnan(beyond).all()


@each_variant
def test_gradients_are_finite_beside_empty_rows_and_reach_every_parameter(changes):
    model = small_model(**changes)
    batch = strings(*PAIRS)
    batch = jax.tree.map(lambda leaf: leaf.at[1].set(0), batch)

    def loss(params):
        return jnp.sin(logits_of(model, params, batch)).sum()

    for name, gradient in jax.jit(jax.grad(loss))(random_params(model, 0)).items():
        assert jnp.isfinite(gradient).all(), name
        if not name.endswith("key/bias"):  # it shifts all scores of a query alike
            assert jnp.abs(gradient).max() > 1e-5, name


@pytest.mark.parametrize(
    ("changes", "draws"),
    [
        # The embedded source and target, two encoder layers of two sublayers, two decoder
        # layers of three.
        ({"dropout": 0.5}, 2 + 2 * 2 + 2 * 3),
        # The weights of two encoder layers, of two decoder layers twice.
        ({"attention_dropout": 0.5}, 2 + 2 * 2),
        ({"attention_dropout": 0.5, "dropout": 0.5}, 18),
        # The positions of source and target.
        ({"random_positions": 64}, 2),
        # The embedded source and target, two encoder layers, between two decoder layers, the
        # output.
        ({"dropout": 0.5, "architecture": "recurrent"}, 2 + 2 + 1 + 1),
    ],
)
def test_whatever_is_drawn_in_training_is_drawn_with_a_key_of_its_own(changes, draws, monkeypatch):
    model = small_model(layers=2, **changes)
    params = random_params(model, 0)
    batch = strings(*PAIRS)
    one, same, other = (logits_of(model, params, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()

    keys = []

    def recorded(draw):
        def recording(key, *args, **kwargs):
            keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return draw(key, *args, **kwargs)

        return recording

    for name in ("bernoulli", "choice"):
        monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
    call(model, params, batch, training_of(model, jax.random.key(1)))
    assert len(keys) == len(set(keys)) == draws


def call(model, params, batch, training=None):
    """What a call returns, and the statistics after it."""
    module = model.bind(params)
    logits = module(
        batch.source,
        batch.source_segments,
        batch.target_in,
        batch.target_segments,
        training=training,
    )
    return logits, flatten(nnx.state(module, Statistic))


@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_with_batch_norm_padding_changes_no_output_and_no_statistic_in_training(placement):
    model = small_model(norm="batch", norm_placement=placement)
    params = random_params(model, 0)
    key = jax.random.key(0)
    step = jax.jit(lambda params, batch: call(model, params, batch, training_of(model, key)))
    plain, padded = strings(*PAIRS), littered(PADDED)
    (logits, seen), (other_logits, other_seen) = step(params, plain), step(params, padded)
    real, other_real = plain.target_segments == 1, padded.target_segments == 1
    np.testing.assert_allclose(logits[real], other_logits[other_real], rtol=1e-4, atol=1e-5)
    assert seen.keys() == model.statistics
    for name in seen:
        np.testing.assert_allclose(seen[name], other_seen[name], rtol=1e-4, atol=1e-5)
        assert (seen[name] != params[name]).all(), name


@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_batch_norms_and_no_parameters(norm):
    model = small_model(norm=norm)
    params, statistics = model.split(model.shapes)
    assert params | statistics == model.shapes
    assert not params.keys() & statistics.keys()
    kept = {name for name in model.shapes if name.endswith(("/mean", "/variance"))}
    assert statistics.keys() == kept
    # Two sublayers in the encoder, three in the decoder, and a last norm in each.
    assert len(kept) == (2 * (2 + 3 + 1 + 1) if norm == "batch" else 0)
    if norm == "batch":
        assert model.count_parameters() == small_model(norm="layer").count_parameters()


@each_variant
def test_every_variable_has_names_for_its_axes(changes):
    model = small_model(**changes)
    assert model.axes.keys() == model.shapes.keys()
    for name, shape in model.shapes.items():
        assert len(model.axes[name]) == len(shape.shape), name
        assert set(model.axes[name]) <= set(RULES), name


def test_random_positions_in_training_are_a_sorted_draw_without_replacement():
    model = small_model(random_positions=64)
    params = random_params(model, 0)

    @jax.jit
    @jax.vmap
    def draw(key):
        return model.bind(params).positions(jnp.arange(8)[None], training_of(model, key))[0]

    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert drawn.min() == 0
    assert drawn.max() == 63
    assert (np.diff(drawn) > 0).all()
    assert (drawn[1:] != drawn[:-1]).any(1).all()
    # Each of the 64 as often as the others: 500 times of 4000, give or take 21.
    assert np.abs(np.bincount(drawn.ravel(), minlength=64) - 500).max() < 5 * 21


def test_random_positions_in_evaluation_are_evenly_spaced_over_the_same_range():
    module = small_model(random_positions=64).build(jax.random.key(0))
    np.testing.assert_array_equal(module.positions(jnp.arange(32)[None], None), [range(0, 64, 2)])


@pytest.mark.parametrize("position", POSITIONS)
def test_a_model_reaches_to_max_length_where_positions_are_learned_or_random(position):
    config = small_model(position=position).config
    limited = position == "learned"
    assert [config.reach(length) for length in (31, 32, 33)] == [31, 32, 32 if limited else 33]
    if position != "none":
        random = small_model(position=position, random_positions=64).config
        assert [random.reach(length) for length in (31, 32, 33)] == [31, 32, 32]


def test_init_is_of_the_matrices_of_attention_and_feed_forward_alone():
    fresh = jax.jit(small_model(init="normal").init)(jax.random.key(0))
    for name, leaf in fresh.items():
        if leaf.ndim > 1:
            deviation = 16**-0.5 if name == "embedding/table" else 0.02
            np.testing.assert_allclose(leaf.std(), deviation, rtol=0.2, err_msg=name)


def test_attention_maps_are_there_when_asked_for():
    model = small_model(layers=2)
    params = random_params(model, 0)
    batch = strings(*PAIRS)
    maps = {"encoder": [], "decoder": [], "cross": []}
    with_maps = model.bind(params)(
        batch.source, batch.source_segments, batch.target_in, batch.target_segments, maps=maps
    )
    np.testing.assert_allclose(with_maps, logits_of(model, params, batch), rtol=1e-5, atol=1e-5)
    source, target = batch.source.shape[1], batch.target_in.shape[1]
    shapes = {kind: [each.shape for each in layers] for kind, layers in maps.items()}
    assert shapes == {
        "encoder": [(3, 2, source, source)] * 2,
        "decoder": [(3, 2, target, target)] * 2,
        "cross": [(3, 2, target, source)] * 2,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "batch"},
        {"qk_norm": True, "position": "rotary"},
        {"position": "alibi", "kv_heads": 1},
        {"position": "relative", "attention_backend": "xla"},
        *({"architecture": "recurrent", "layers": 2, "cell": cell} for cell in CELLS),
    ],
)
def test_compute_in_bfloat16_is_near_float32_and_the_logits_are_float32(changes):
    params = random_params(small_model(**changes), 0)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    batch = strings(*PAIRS)
    high = logits_of(small_model(**changes), params, batch)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own attention relies on it
        low = logits_of(small_model(dtype="bfloat16", **changes), params, batch)
    assert low.dtype == jnp.float32
    assert 1e-4 < jnp.abs(low - high).max() < 0.2


def test_the_same_key_gives_the_same_parameters():
    init = jax.jit(small_model().init)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, same[name])
    assert (one["embedding/table"] != other["embedding/table"]).any()


def formula(layers, width, ff_width, vocab_size):
    """Parameters of the paper's model by hand: post-norm, tied, no bias in attention."""
    attention = 4 * width * width
    feed_forward = 2 * width * ff_width + ff_width + width
    norm = 2 * width
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    return layers * (encoder + decoder) + vocab_size * width


@pytest.mark.parametrize(
    ("config", "sizes", "millions"),
    [(vaswani_base, (6, 512, 2048), 63.0), (vaswani_big, (6, 1024, 4096), 214.2)],
)
def test_parameter_counts_of_the_paper(config, sizes, millions):
    model = Model(ModelConfig(**config.get_config().model), 37_000)
    assert model.count_parameters() == formula(*sizes, 37_000)
    assert round(model.count_parameters() / 1e6, 1) == millions


def test_untied_tables_are_three():
    tied, untied = small_model(), small_model(tie_embeddings=False)
    table = TOKENIZER.vocab_size * 16
    assert untied.count_parameters() - tied.count_parameters() == 2 * table
