"""What the recurrent model has of its own; test_model.py holds what it shares with the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model, strings, training_of
from transformer.recurrent import CELLS, run

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
FLOAT32 = jnp.dtype("float32")


def recurrent(**changes):
    return small_model(architecture="recurrent", **changes)


def make_cell(name, rng, inputs=4, width=3):
    """With a bias, so that a step does something to a state of zeros."""
    cell = CELLS[name](inputs, width, dtype=FLOAT32, rngs=nnx.Rngs(0))
    cell.input.bias[...] = jnp.asarray(rng.normal(size=cell.input.bias.shape), jnp.float32)
    return cell


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_is_its_steps_one_after_another(cell, reverse, rng):
    cell = make_cell(cell, rng)
    x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    outputs = run(cell, x, jnp.ones((2, 5), bool), reverse=reverse)
    state = cell.start(2)
    for t in reversed(range(5)) if reverse else range(5):
        state = cell.step(state, cell.input(x[:, t]))
        np.testing.assert_allclose(outputs[:, t], state[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_passes_over_padding_wherever_it_stands(cell, reverse, rng):
    cell = make_cell(cell, rng)
    x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    real = jnp.array([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], bool)
    outputs = run(cell, x, real, reverse=reverse)
    for row in range(2):
        alone = run(cell, x[row, real[row]][None], jnp.ones((1, 3), bool), reverse=reverse)
        np.testing.assert_allclose(outputs[row, real[row]], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_the_memory_of_a_token_knows_both_sides_of_its_source(cell):
    model = recurrent(cell=cell)
    params = random_params(model, 0)
    source, segments = BATCH.source[:1], BATCH.source_segments[:1]
    memory = model.bind(params).encode(source, segments)[0]
    last = model.bind(params).encode(source.at[0, -1].set(9), segments)[0]
    first = model.bind(params).encode(source.at[0, 0].set(9), segments)[0]
    half = model.config.width // 2
    changed = np.abs(np.stack([first, last]) - memory) > 0
    # Of the forward half the first token moves all, the last one the last alone; and of the
    # backward half the other way round.
    forward, backward = changed[..., :half].any(-1), changed[..., half:].any(-1)
    np.testing.assert_array_equal(forward[0], True)
    np.testing.assert_array_equal(np.flatnonzero(forward[1]), [len(memory) - 1])
    np.testing.assert_array_equal(np.flatnonzero(backward[0]), [0])
    np.testing.assert_array_equal(backward[1], True)


def test_attention_maps_are_distributions_over_the_source():
    model = recurrent(layers=2)
    params = random_params(model, 0)
    maps = {"encoder": [], "decoder": [], "cross": []}
    call = (BATCH.source, BATCH.source_segments, BATCH.target_in, BATCH.target_segments)
    logits = model.bind(params)(*call, maps=maps)
    np.testing.assert_allclose(logits, model.bind(params)(*call), rtol=1e-5, atol=1e-5)
    assert not maps["encoder"] + maps["decoder"]
    (weights,) = maps["cross"]
    assert weights.shape == (3, 2, BATCH.target_in.shape[1], BATCH.source.shape[1])
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    padding = jnp.broadcast_to((BATCH.source_segments == 0)[:, None, None], weights.shape)
    np.testing.assert_array_equal(weights[padding], 0.0)


def test_attention_maps_follow_the_target_step_by_step():
    """The map of step t depends on no later target token, and on its own."""
    model = recurrent()
    params = random_params(model, 0)

    def weights(target_in):
        maps = {"encoder": [], "decoder": [], "cross": []}
        model.bind(params)(
            BATCH.source, BATCH.source_segments, target_in, BATCH.target_segments, maps=maps
        )
        return maps["cross"][0][0]

    changed = weights(BATCH.target_in.at[0, 2].set(9)) != weights(BATCH.target_in)
    np.testing.assert_array_equal(changed.any((0, 2)), [False, False, True, True, True, True])


def transparent(layers):
    """A GRU model whose dropout can be read from its logits, and its parameters.

    The first layer of the decoder gives ones at each step, the others the tanh of what
    they read, and the first D logits are the output.
    """
    model = recurrent(cell="gru", layers=layers, dropout=0.5, tie_embeddings=False)
    width = model.config.width
    params = {name: jnp.zeros(leaf.shape) for name, leaf in model.shapes.items()}
    for i in range(layers):
        # Reset gate, update gate (which keeps nothing of the state), candidate.
        parts = jnp.array([0.0, -1e4, 1e4 if i == 0 else 0.0])
        params[f"decoder/{i}/input/bias"] = jnp.repeat(parts, width)
        if i > 0:
            params[f"decoder/{i}/input/kernel"] = jnp.eye(width, 3 * width, k=2 * width)
    params["combine/kernel"] = jnp.eye(2 * width, width)
    params["output_embedding/table"] = jnp.eye(model.vocab_size, width)
    return model, params


def test_dropout_of_the_decoder_differs_between_steps_and_between_layers():
    """A feature comes through if it is kept between each two layers and at the output."""
    rows, steps, width = 64, 8, 16
    tokens = jnp.full((rows, steps), 5)
    ones = jnp.ones_like(tokens)

    def kept(layers):
        model, params = transparent(layers)

        @jax.jit
        def call(params):
            training = training_of(model, jax.random.key(0))
            return model.bind(params)(tokens, ones, tokens, ones, training=training)

        return np.asarray(call(params)[..., :width] != 0)  # [rows, steps, width]

    for layers in (1, 3):
        through, share = kept(layers), 0.5**layers
        error = np.sqrt(share * (1 - share) / through.size)
        assert abs(through.mean() - share) < 5 * error
        # Were a feature dropped at all steps alike, few would be kept at some step.
        once, expected = through.any(1), 1 - (1 - share) ** steps
        error = np.sqrt(expected * (1 - expected) / once.size)
        assert abs(once.mean() - expected) < 5 * error


def test_nothing_of_the_decoder_is_dropped_in_evaluation():
    model, params = transparent(2)
    tokens = jnp.full((2, 3), 5)
    ones = jnp.ones_like(tokens)
    out = model.bind(params)(tokens, ones, tokens, ones)[..., : model.config.width]
    np.testing.assert_allclose(out, np.tanh(np.tanh(1.0)), rtol=1e-6)


def test_the_decoder_reads_what_it_attended_to_and_begins_with_the_source():
    """Input feeding, and the bridge from the encoder's first backward state."""
    model = recurrent(layers=2)
    params = random_params(model, 0)
    module = model.bind(params)
    memory = module.encode(BATCH.source, BATCH.source_segments)
    cache = module.start_cache(memory, BATCH.source_segments, 1)
    half = memory[:, 0, model.config.width // 2 :]
    for i, state in enumerate(cache.states):
        kernel, bias = params[f"bridge/{i}/kernel"], params[f"bridge/{i}/bias"]
        np.testing.assert_allclose(state[0], np.tanh(half @ kernel + bias), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state[1], 0.0)
    logits, _ = module.decode_step(BATCH.target_in[:, :1], cache)
    fed = cache._replace(attended=jnp.ones_like(cache.attended))
    other, _ = module.decode_step(BATCH.target_in[:, :1], fed)
    assert (jnp.abs(logits - other).max((1, 2)) > 1e-3).all()
