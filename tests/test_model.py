"""Properties that hold for every variant of every table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base, vaswani_base, vaswani_big
from tests import contract
from tests.helpers import (
    TOKENIZER,
    logits_of,
    random_params,
    small_model,
    strings,
    training_of,
)
from transformer.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.layers import FEED_FORWARDS, NORM_PLACEMENTS
from transformer.model import Model, flatten
from transformer.model_config import ModelConfig
from transformer.normalization import NORMS, Statistic
from transformer.positions import POSITIONS
from transformer.recurrent import CELLS

PAIRS = (("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
PADDED = strings(*PAIRS, source_length=9, target_length=8)


# Every entry of every table, one at a time: the small model but for that. (`init` is not among
# them, for these tests draw their own parameters: test_layers.py has one over `INITIALIZERS`.)
ENTRIES = [
    {knob: value}
    for knob, values in {
        "norm": NORMS,
        "norm_placement": NORM_PLACEMENTS,
        "position": POSITIONS,
        "attention_backend": [name for name in ATTENTION_BACKENDS if name not in BFLOAT16_BACKENDS],
        "feed_forward": FEED_FORWARDS,
    }.items()
    for value in values
    if base.get_config().model[knob] != value
]

# Other knobs, and knobs that meet.
OTHERS = [
    {},
    {"tie_embeddings": False},
    {"qk_norm": True},
    {"head_width": 3, "value_width": 5},
    {"heads": 4, "kv_heads": 2},
    {"window": 2},
    {"fused_qkv": True, "attention_bias": True},
    {"layers": 2, "scan_layers": True, "remat": "full"},
    {"random_positions": 64, "position": "relative"},
    *({"architecture": "recurrent", "cell": name} for name in CELLS),
]

# Further meetings of the same knobs.
RARE = [
    {"heads": 1},
    {"kv_heads": 1},
    {"attention_bias": True},
    {"layers": 2},
    {"layers": 2, "scan_layers": True, "norm": "batch"},
    {"layers": 2, "remat": "dots", "norm": "batch"},
    {"norm": "batch", "norm_placement": "both"},
    *(
        {"random_positions": 64, "position": name}
        for name in POSITIONS
        if name not in ("none", "relative")
    ),
    {"architecture": "recurrent", "layers": 2, "tie_embeddings": False},
]


def named(changes):
    return ",".join(f"{knob}={value}" for knob, value in changes.items()) or "small"


@pytest.mark.parametrize(
    "changes",
    [*ENTRIES, *OTHERS, *(pytest.param(each, marks=pytest.mark.slow) for each in RARE)],
    ids=named,
)
def test_every_variant_keeps_the_contract(changes):
    """At sizes of which no two are alike: see `contract`."""
    contract.check(small_model(**{"width": 20, "ff_width": 24} | changes))


def littered(batch):
    """The same batch with tokens where its padding was."""
    return batch._replace(
        source=jnp.where(batch.source_segments == 0, 5, batch.source),
        target_in=jnp.where(batch.target_segments == 0, 6, batch.target_in),
    )


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
