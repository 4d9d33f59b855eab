"""Properties that hold for every variant of every table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import vaswani_base, vaswani_big
from tests.helpers import TOKENIZER, VARIANTS, logits_of, random_params, small_model, strings
from transformer.model import Model, ModelConfig

PAIRS = (("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))

each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_an_output_depends_on_no_later_input(changes):
    """The gradient of output t with respect to the embedded input u is exactly 0 for u > t."""
    model = small_model(**changes)
    params = random_params(model, 0)
    batch = strings(("abcd", "dcba"))
    length = batch.target_in.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    memory_mask = jnp.ones((1, 1, length, batch.source.shape[1]), bool)
    embedded = jax.random.normal(jax.random.key(0), (1, length, model.config.width))

    def outputs(embedded):
        module = model.bind(params)
        memory = module.encode(batch.source, batch.source_segments)
        projected = module.decoder.project_memory(memory)
        return module.decoder(embedded, mask, projected, memory_mask)[0][0]

    jacobian = jax.jit(jax.jacobian(outputs))(embedded)[:, :, 0]  # [T, D, T, D]
    influence = jnp.abs(jacobian).sum((1, 3))
    later = ~np.tril(np.ones((length, length), bool))
    np.testing.assert_array_equal(influence[later], 0.0)
    assert (influence[~later] > 0).all()


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
    together = logits_of(model, params, strings(*PAIRS, source_length=9, target_length=8))
    row, pair = 1, PAIRS[1]
    alone = logits_of(model, params, strings(pair))
    length = len(pair[1]) + 1
    np.testing.assert_allclose(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


@each_variant
def test_what_stands_in_the_padding_does_not_matter(changes):
    model = small_model(**changes)
    params = random_params(model, 1)
    batch = strings(*PAIRS, source_length=9)
    other = jnp.where(batch.source_segments == 0, 5, batch.source)
    real = batch.target_segments == 1
    np.testing.assert_array_equal(
        logits_of(model, params, batch)[real],
        logits_of(model, params, batch._replace(source=other))[real],
    )


@each_variant
def test_cached_decoding_is_teacher_forcing_position_by_position(changes):
    model = small_model(**changes)
    params = random_params(model, 2)
    batch = strings(*PAIRS)
    whole = logits_of(model, params, batch)
    length = batch.target_in.shape[1]

    start, step = cached(model, batch, length)
    cache = start(params)
    for t in range(length):
        logits, cache = step(params, batch.target_in[:, t : t + 1], cache)
        # A row that has ended reads padding: only real positions are compared.
        real = batch.target_segments[:, t] == 1
        np.testing.assert_allclose(logits[real, 0], whole[real, t], rtol=1e-4, atol=1e-5)


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


def test_several_tokens_at_once_are_the_same_as_one_by_one():
    model = small_model()
    params = random_params(model, 2)
    batch = strings(*PAIRS)
    start, step = cached(model, batch, batch.target_in.shape[1])
    first, cache = step(params, batch.target_in[:, :4], start(params))
    second, _ = step(params, batch.target_in[:, 4:], cache)
    whole = logits_of(model, params, batch)
    np.testing.assert_allclose(
        jnp.concatenate([first, second], 1)[0], whole[0], rtol=1e-4, atol=1e-5
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


def test_dropout_differs_between_layers_and_between_keys():
    model = small_model(dropout=0.5, layers=2)
    params = random_params(model, 0)
    batch = strings(*PAIRS)
    one, same, other = (logits_of(model, params, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    # Two embeddings, two encoder layers of two sublayers, two decoder layers of three:
    # each draws from the stream, and no two draws of a stream are the same.
    rngs = nnx.Rngs(dropout=1)
    model.bind(params)(
        batch.source, batch.source_segments, batch.target_in, batch.target_segments, rngs=rngs
    )
    assert int(rngs.dropout.count[...]) == 2 + 2 * 2 + 2 * 3


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


def test_compute_in_bfloat16_is_near_float32_and_the_logits_are_float32():
    params = random_params(small_model(), 0)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    batch = strings(*PAIRS)
    low = logits_of(small_model(dtype="bfloat16"), params, batch)
    high = logits_of(small_model(), params, batch)
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
