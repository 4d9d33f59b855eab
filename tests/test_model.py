"""Properties that hold for every variant of every table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import vaswani_base, vaswani_big
from tests.helpers import TOKENIZER, VARIANTS, small_model, strings
from transformer.model import Model, ModelConfig

PAIRS = (("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))

each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def logits_of(model, params, batch, **kwargs):
    return model.bind(params)(
        batch.source, batch.source_segments, batch.target_in, batch.target_segments, **kwargs
    )


@each_variant
def test_an_output_depends_on_no_later_input(changes):
    """The gradient of output t with respect to the embedded input u is exactly 0 for u > t."""
    model = small_model(**changes)
    module = model.bind(model.init(jax.random.key(0)))
    batch = strings(("abcd", "dcba"))
    memory = module.encode(batch.source, batch.source_segments)
    projected = module.decoder.project_memory(memory)
    length = batch.target_in.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    memory_mask = jnp.ones((1, 1, length, batch.source.shape[1]), bool)
    embedded = module.embed_target(batch.target_in, jnp.arange(length)[None], None)

    def outputs(embedded):
        return module.decoder(embedded, mask, projected, memory_mask)[0][0]

    jacobian = jax.jacobian(outputs)(embedded)[:, :, 0]  # [T, D, T, D]
    influence = jnp.abs(jacobian).sum((1, 3))
    later = ~np.tril(np.ones((length, length), bool))
    np.testing.assert_array_equal(influence[later], 0.0)
    assert (influence[~later] > 0).all()


@each_variant
def test_later_target_tokens_change_no_earlier_logits(changes):
    """The same through the front door: the mask that the model builds is causal."""
    model = small_model(**changes)
    params = model.init(jax.random.key(0))
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
    params = model.init(jax.random.key(1))
    together = logits_of(model, params, strings(*PAIRS, source_length=9, target_length=8))
    for row, pair in enumerate(PAIRS):
        alone = logits_of(model, params, strings(pair))
        length = len(pair[1]) + 1
        np.testing.assert_allclose(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


@each_variant
def test_what_stands_in_the_padding_does_not_matter(changes):
    model = small_model(**changes)
    params = model.init(jax.random.key(1))
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
    params = model.init(jax.random.key(2))
    batch = strings(*PAIRS)
    whole = logits_of(model, params, batch)
    length = batch.target_in.shape[1]

    module = model.bind(params)
    memory = module.encode(batch.source, batch.source_segments)
    step = jax.jit(lambda tokens, cache: model.bind(params).decode_step(tokens, cache))
    cache = module.start_cache(memory, batch.source_segments, length)
    for t in range(length):
        logits, cache = step(batch.target_in[:, t : t + 1], cache)
        # A row that has ended reads padding: only real positions are compared.
        real = batch.target_segments[:, t] == 1
        np.testing.assert_allclose(logits[real, 0], whole[real, t], rtol=1e-4, atol=1e-5)
    # Several tokens at once are the same as one by one.
    cache = module.start_cache(memory, batch.source_segments, length)
    first, cache = module.decode_step(batch.target_in[:, :3], cache)
    second, cache = module.decode_step(batch.target_in[:, 3:], cache)
    np.testing.assert_allclose(
        jnp.concatenate([first, second], 1)[0], whole[0], rtol=1e-4, atol=1e-5
    )


def test_decoding_past_the_cache_is_nan_and_not_silent():
    model = small_model()
    module = model.bind(model.init(jax.random.key(0)))
    batch = strings(("ab", "ba"))
    memory = module.encode(batch.source, batch.source_segments)
    cache = module.start_cache(memory, batch.source_segments, 2)
    _, cache = module.decode_step(batch.target_in[:, :2], cache)
    beyond, _ = module.decode_step(batch.target_in[:, 2:3], cache)
    assert jnp.isnan(beyond).all()


@each_variant
def test_gradients_are_finite_though_rows_are_all_padding(changes):
    model = small_model(dropout=0.1, **changes)
    batch = strings(("ab", "ba"), ("c", "c"))
    empty = jax.tree.map(lambda leaf: leaf.at[1].set(0), batch)

    def loss(params):
        logits = logits_of(model, params, empty, rngs=nnx.Rngs(dropout=0))
        return jnp.sin(logits).sum()

    gradients = jax.grad(loss)(model.init(jax.random.key(0)))
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all(), name


@each_variant
def test_every_parameter_matters(changes):
    model = small_model(**changes)
    batch = strings(*PAIRS)
    gradients = jax.grad(lambda p: jnp.sin(logits_of(model, p, batch)).sum())(
        model.init(jax.random.key(0))
    )
    for name, gradient in gradients.items():
        if not name.endswith("key/bias"):  # it shifts all scores of a query alike
            assert jnp.abs(gradient).max() > 1e-6, name


def test_dropout_differs_between_layers_and_between_keys():
    model = small_model(dropout=0.5, norm_placement="pre")
    params = model.init(jax.random.key(0))
    batch = strings(*PAIRS)
    one, same, other = (
        logits_of(model, params, batch, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    # Two embeddings, two encoder layers of two sublayers, two decoder layers of three:
    # each draws from the stream, and no two draws of a stream are the same.
    rngs = nnx.Rngs(dropout=1)
    logits_of(model, params, batch, rngs=rngs)
    assert int(rngs.dropout.count[...]) == 2 + 2 * 2 + 2 * 3


def test_attention_maps_are_there_when_asked_for():
    model = small_model()
    params = model.init(jax.random.key(0))
    batch = strings(*PAIRS)
    maps = {"encoder": [], "decoder": [], "cross": []}
    with_maps = logits_of(model, params, batch, maps=maps)
    np.testing.assert_array_equal(with_maps, logits_of(model, params, batch))
    source, target = batch.source.shape[1], batch.target_in.shape[1]
    shapes = {kind: [each.shape for each in layers] for kind, layers in maps.items()}
    assert shapes == {
        "encoder": [(3, 2, source, source)] * 2,
        "decoder": [(3, 2, target, target)] * 2,
        "cross": [(3, 2, target, source)] * 2,
    }


def test_compute_in_bfloat16_is_near_float32_and_the_logits_are_float32():
    params = small_model().init(jax.random.key(0))
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    batch = strings(*PAIRS)
    low = logits_of(small_model(dtype="bfloat16"), params, batch)
    high = logits_of(small_model(), params, batch)
    assert low.dtype == jnp.float32
    assert 1e-4 < jnp.abs(low - high).max() < 0.2


def test_the_same_key_gives_the_same_parameters():
    one, same, other = (small_model().init(jax.random.key(seed)) for seed in (0, 0, 1))
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
