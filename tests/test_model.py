"""Properties that hold for every entry of every table."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import vaswani_base, vaswani_big
from tests import contract
from tests.helpers import logits_of, maps_of, random_params, small_model, strings, training
from transformer.config import default_config
from transformer.data.batches import Dataset, make_batch
from transformer.data.tokenizer import EOS
from transformer.modules.cells import CELLS
from transformer.modules.config import ModelConfig
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.modules.layers import FEED_FORWARDS, NORM_PLACEMENTS
from transformer.modules.model import Model, flatten
from transformer.modules.normalization import NORMS
from transformer.modules.positions import POSITIONS

PER_LAYER = {"position_encoding": "relative", "relative_per_layer": True}
XL = PER_LAYER | {"position_encoding": "transformer_xl"}
RECURRENT = {"architecture": "recurrent"}
PAIRS = (("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
BATCH = strings(*PAIRS)

# The entries of every table but the defaults; test_layers.py tests the `INITIALIZERS`.
ENTRIES = {
    knob: [value for value in values if default_config().model[knob] != value]
    for knob, values in {
        "norm": NORMS,
        "norm_placement": NORM_PLACEMENTS,
        "position_encoding": POSITIONS,
        "attention_backend": [name for name in ATTENTION_BACKENDS if name not in BFLOAT16_BACKENDS],
        "feed_forward": FEED_FORWARDS,
    }.items()
}
ALONE = [{knob: value} for knob, values in ENTRIES.items() for value in values]
# The first entries of all tables together, the second ones, and so on.
TOGETHER = [
    {knob: values[row] for knob, values in ENTRIES.items() if row < len(values)}
    for row in range(max(map(len, ENTRIES.values())))
]

# Other options; those that do not affect each other share a model, since a model takes seconds.
OTHERS = [
    {},
    {"tie_embeddings": "none", "logits_bias": True, "d_k": 3, "d_v": 5},
    {"tie_embeddings": "inputs", "embedding_norm": True, "final_norm": False}
    | {"num_heads": 4, "num_kv_heads": 2},
    {"tie_embeddings": "target_output", "logits_bias": True, "logits_scale": 0.5, "window": 2},
    {"embedding_scale": 1.5, "sinusoid_layout": "halves", "position_offset": 2}
    | {"feed_forward": "swiglu", "scale_gated": False, "ff_bias": False},
    {"sinusoid_rates": "tensor2tensor", "norm_placement": "post", "final_norm": True}
    | {"normalize_qk": True},
    {"position_encoding": "learned", "position_offset": 2, "decoder_layers": 2},
    {"position_encoding": "rotary", "rotary_base": 100.0, "attention_scale": 0.5},
    {"position_encoding": "relative", "relative_buckets": 6, "relative_distance": 7}
    | {"random_positions": 64},
    PER_LAYER | {"num_layers": 2, "decoder_layers": 3},
    {"num_layers": 2, "scan_layers": True, "remat": "full"},
    *(RECURRENT | {"cell": name} for name in CELLS),
]

PLACED = [name for name in POSITIONS if name not in ("none", "relative")]
RARE = [
    *(each for each in ALONE if each not in TOGETHER),
    {"num_heads": 1},
    {"num_kv_heads": 1},
    {"attention_bias": True},
    {"num_layers": 2},
    PER_LAYER | {"num_layers": 2, "scan_layers": True, "remat": "full"},
    PER_LAYER | {"num_layers": 2, "remat": "dots", "attention_backend": "chunked"},
    XL | {"num_layers": 2, "scan_layers": True, "remat": "full", "num_heads": 4, "num_kv_heads": 2},
    XL | {"num_layers": 2, "attention_scale": 0.7, "attention_backend": "splash", "d_k": 3},
    {"embedding_norm": True, "norm": "batch", "norm_placement": "post"},
    *({"attention_scale": 0.7, "attention_backend": name} for name in ("xla", "splash", "auto")),
    {"num_layers": 2, "scan_layers": True, "norm": "batch"},
    {"num_layers": 2, "remat": "dots", "norm": "batch"},
    {"norm": "batch", "norm_placement": "both"},
    *({"random_positions": 64, "position_encoding": name} for name in PLACED),
    RECURRENT | {"num_layers": 2, "tie_embeddings": "none"},
    RECURRENT | {"tie_embeddings": "target_output", "logits_bias": True, "logits_scale": 0.5},
]


LOW: list = [
    {"attention_bias": True, "normalize_qk": True, "norm": "rms"},
    {"attention_bias": True, "position_encoding": "learned", "feed_forward": "swiglu"},
    {"tie_embeddings": "none", "position_encoding": "relative", "norm": "batch"},
    RECURRENT,
]
ALL = [*TOGETHER, *OTHERS, *(pytest.param(each, marks=pytest.mark.slow) for each in RARE)]


def named(changes):
    return ",".join(f"{knob}={value}" for knob, value in changes.items()) or "small"


@pytest.mark.parametrize("changes", ALL, ids=named)
def test_every_variant_keeps_the_contract(changes):
    contract.check(small_model(**{"d_model": 20, "d_ff": 24} | changes))  # no two sizes alike


@pytest.mark.parametrize("changes", LOW, ids=named)
def test_gradients_are_summed_in_float32_under_bfloat16(changes, rng):
    """Also of a token that occurs 4,096 times: bfloat16 cannot count above 256."""
    model = small_model(**changes)
    tokens = np.full((256, 17), 5).astype(np.int32)
    tokens[:, -1], tokens[:128, 3:6] = EOS, rng.integers(6, 20, size=(128, 3))
    batch, params = make_batch(*(jnp.asarray(tokens),) * 2), random_params(model, 0)
    weights = rng.normal(size=(*tokens.shape, model.vocab_size)).astype(np.float32) + 0.5

    def gradients(dtype):
        low = Model(replace(model.config, dtype=dtype), model.vocab_size)

        def loss(params):
            return (jax.nn.log_softmax(logits_of(low, params, batch)) * weights).sum()

        return jax.device_get(jax.grad(loss)(params))

    with jax.numpy_dtype_promotion("standard"):
        high, low = gradients("float32"), gradients("bfloat16")
    # XLA's CPU client of JAX 0.12.0 sums some small bfloat16 products in bfloat16, among them the
    # gradients of these kernels.
    by_xla = "kernel" if jax.__version_info__ >= (0, 11) else "key/bias"
    for name in high.keys() - model.statistics:
        if not name.endswith(("key/bias", by_xla)):  # the former shifts all scores of a query alike
            error = np.linalg.norm(low[name] - high[name]) / np.linalg.norm(high[name])
            assert error < 0.04, (name, error)


def test_norm_epsilon_is_that_of_every_norm():
    model = small_model(normalize_qk=True, norm_epsilon=0.25, norm_placement="both")
    module = model.bind(model.shapes)
    norms = [each for _, each in nnx.iter_graph(module) if hasattr(each, "epsilon")]
    assert [each.epsilon for each in norms] == [0.25] * (3 * 2 + 2 * 5 + 2)


def test_decoding_past_the_cache_is_nan_and_not_silent():
    batch, model = strings(("ab", "ba")), small_model()

    @jax.jit
    def decoded(params):
        module, source = model.bind(params), (batch.source, batch.source_segments)
        cache = module.start_cache(module.encode(*source), batch.source_segments, 2)
        within, cache = module.decode_step(batch.target_in[:, :2], cache)
        beyond, _ = module.decode_step(batch.target_in[:, 2:3], cache)
        return within, beyond

    within, beyond = decoded(random_params(model, 0))
    assert jnp.isfinite(within).all()
    assert jnp.isnan(beyond).all()


@pytest.mark.parametrize(
    ("changes", "draws"),
    [
        ({"dropout_rate": 0.5}, 2 + 2 * 2 + 2 * 3),  # embeddings, sublayers
        ({"attention_dropout_rate": 0.5}, 2 + 2 * 2),
        ({"attention_dropout_rate": 0.5, "dropout_rate": 0.5}, 18),
        ({"ff_dropout_rate": 0.5, "feed_forward": "swiglu"}, 2 * 2),
        ({"random_positions": 64}, 2),  # of source and target
        # Embeddings, two encoder layers, between two decoder layers, the output.
        ({"dropout_rate": 0.5, "architecture": "recurrent"}, 2 + 2 + 1 + 1),
    ],
)
def test_whatever_is_drawn_in_training_is_drawn_with_a_key_of_its_own(changes, draws, monkeypatch):
    model = small_model(num_layers=2, **changes)
    params = random_params(model, 0)
    one, same, other = (logits_of(model, params, BATCH, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()

    spies = [Mock(side_effect=draw) for draw in (jax.random.bernoulli, jax.random.choice)]
    for spy, name in zip(spies, ("bernoulli", "choice"), strict=True):
        monkeypatch.setattr(jax.random, name, spy)
    call(model, params, BATCH, **training(jax.random.key(1)))
    drawn = [each.args[0] for spy in spies for each in spy.call_args_list]
    assert len(drawn) == len({str(jax.random.key_data(key)) for key in drawn}) == draws


def call(model, params, batch, **mode):
    """What a call returns, and the statistics after it."""
    module = model.bind(params)
    return module(**batch.inputs(), **mode), flatten(nnx.state(module, nnx.BatchStat))


@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_with_batch_norm_padding_changes_no_output_and_no_statistic_in_training(placement):
    model = small_model(norm="batch", norm_placement=placement)
    params, key = random_params(model, 0), jax.random.key(0)
    step = jax.jit(lambda params, batch: call(model, params, batch, **training(key)))
    padded = strings(*PAIRS, source_length=9, target_length=8)
    padded = padded._replace(  # and tokens where the padding was
        source=jnp.where(padded.source_segments == 0, 5, padded.source),
        target_in=jnp.where(padded.target_segments == 0, 6, padded.target_in),
    )
    (logits, seen), (others, other_seen) = step(params, BATCH), step(params, padded)
    found, expected = others[padded.target_segments == 1], logits[BATCH.target_segments == 1]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (expected, seen), (found, other_seen))
    # Two sublayers in the encoder, three in the decoder, and a last norm in each unless post-norm.
    norms = {"pre": 5 + 2, "post": 5, "both": 2 * 5 + 2}[placement]
    assert len(seen) == 2 * norms == len(model.statistics & seen.keys())
    assert all((seen[name] != params[name]).all() for name in seen)


def test_random_positions_in_training_are_a_sorted_draw_without_replacement():
    model = small_model(random_positions=64)
    params = random_params(model, 0)

    @jax.jit
    @jax.vmap
    def draw(key):
        return model.bind(params).positions(jnp.arange(8)[None], **training(key))[0]

    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert (drawn.min(), drawn.max()) == (0, 63)
    assert (np.diff(drawn) > 0).all()
    assert (drawn[1:] != drawn[:-1]).any(1).all()
    # Each of the 64 as often as the others: 500 times of 4000, give or take 21.
    assert np.abs(np.bincount(drawn.ravel(), minlength=64) - 500).max() < 5 * 21
    even = model.bind(params).positions(jnp.arange(32)[None])  # in evaluation
    np.testing.assert_array_equal(even, [range(0, 64, 2)])


@pytest.mark.parametrize("position", POSITIONS)
def test_a_model_reaches_to_max_length_where_positions_are_learned_or_random(position):
    config = small_model(position_encoding=position).config
    limited = position == "learned"
    assert [config.reach(length) for length in (31, 32, 33)] == [31, 32, 32 if limited else 33]
    if position != "none":
        random = small_model(position_encoding=position, random_positions=64).config
        assert [random.reach(length) for length in (31, 32, 33)] == [31, 32, 32]


def test_init_follows_its_key_and_kernel_init_is_of_attention_and_feed_forward_alone():
    init = jax.jit(small_model(kernel_init="normal").init)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one["embedding/embedding"] != other["embedding/embedding"]).any()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, same[name])
        if leaf.ndim > 1:
            deviation = 16**-0.5 if name == "embedding/embedding" else 0.02
            np.testing.assert_allclose(leaf.std(), deviation, rtol=0.2, err_msg=name)


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, RECURRENT])
def test_attention_maps_have_each_layers_distributions_over_real_tokens(changes):
    model = small_model(num_layers=2, **changes)
    data = Dataset(np.asarray(BATCH.source), np.asarray(BATCH.target_out), 3)
    later = replace(data, target=np.asarray(BATCH.target_out.at[0, 1].set(9)))  # read from 2 on
    maps, others = (maps_of(model, random_params(model, 0), each) for each in (data, later))
    source, target = BATCH.source_segments, BATCH.target_segments
    sides = {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}
    layers = {"encoder": 0, "decoder": 0, "cross": 1} if changes == RECURRENT else {}
    for kind, (query, key) in sides.items():
        assert len(maps[kind]) == layers.get(kind, 2)
        for weights in maps[kind]:
            assert weights.shape == (3, 2, query.shape[1], key.shape[1])
            np.testing.assert_array_equal(weights.swapaxes(1, 3)[key == 0], 0.0)
            totals = weights.sum(-1).swapaxes(1, 2)[query == 1]
            np.testing.assert_allclose(totals, 1.0, rtol=1e-5)
    for one, other in zip(maps["cross"], others["cross"], strict=True):
        changed = (one != other).any((1, 3))
        np.testing.assert_array_equal(changed[0], np.arange(6) >= 2)
        assert not changed[1:].any()


PAPER = [(vaswani_base, 512, 2048, 63.0), (vaswani_big, 1024, 4096, 214.2)]


@pytest.mark.parametrize(("config", "width", "ff_width", "millions"), PAPER)
def test_parameter_counts_of_the_paper(config, width, ff_width, millions):
    """Six layers of each kind, post-norm, tied, no bias in attention."""
    attention, norm = 4 * width * width, 2 * width
    feed_forward = 2 * width * ff_width + ff_width + width
    layers = 6 * (3 * attention + 2 * feed_forward + 5 * norm)
    count = Model(ModelConfig(**config.get_config().model), 37_000).count_parameters()
    assert count == layers + 37_000 * width
    assert round(count / 1e6, 1) == millions
