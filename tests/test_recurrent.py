"""Properties of the recurrent model alone; test_model.py tests those of both architectures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model, strings, training
from transformer.modules.cells import CELLS, run

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))


def recurrent(**changes):
    return small_model(architecture="recurrent", **changes)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_is_its_steps_one_after_another_and_passes_over_padding(cell, reverse, rng):
    cell = CELLS[cell](4, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    # So that a step changes a state of zeros.
    cell.input.bias[...] = jnp.asarray(rng.normal(size=cell.input.bias.shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    real = np.array([[1] * 6, [0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], bool)
    outputs = run(cell, x, jnp.asarray(real), reverse=reverse)
    for row in range(3):
        state = cell.start(1)
        for t in np.flatnonzero(real[row])[:: -1 if reverse else 1]:
            state = cell.step(state, cell.input(x[row, t][None]))
            np.testing.assert_allclose(outputs[row, t], state[0][0], rtol=1e-5, atol=1e-6)


def test_the_forget_gate_of_an_lstm_begins_open_by_1():
    cell = CELLS["lstm"](4, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    _, memory = cell.step((jnp.zeros((1, 3)), jnp.ones((1, 3))), jnp.zeros((1, 12)))
    np.testing.assert_allclose(memory, 1 / (1 + np.exp(-1.0)), rtol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_the_memory_of_a_token_knows_both_sides_of_its_source(cell):
    model, source = recurrent(cell=cell), BATCH.source[:1]
    module, half = model.bind(random_params(model, 0)), model.config.d_model // 2
    sources = (source, source.at[0, 0].set(9), source.at[0, -1].set(9))
    memory, *others = (module.encode(each, BATCH.source_segments[:1])[0] for each in sources)
    changed = np.abs(np.stack(others) - memory) > 0
    # The first token changes all of the forward half, the last token the end; backward reversed.
    moved = [[True] * len(memory), np.arange(len(memory)) == len(memory) - 1]
    np.testing.assert_array_equal(changed[..., :half].any(-1), moved)
    np.testing.assert_array_equal(changed[::-1, ::-1, half:].any(-1), moved)


def transparent(layers):
    """A GRU model whose dropout can be read from its logits, and its parameters.

    The first layer of the decoder gives ones at each step, the others the tanh of what
    they read, and the first D logits are the output.
    """
    model = recurrent(cell="gru", num_layers=layers, dropout_rate=0.5, tie_embeddings="none")
    width = model.config.d_model
    params = {name: jnp.zeros(leaf.shape) for name, leaf in model.shapes.items()}
    for i in range(layers):
        # Reset gate, update gate (which keeps nothing of the state), candidate.
        parts = jnp.array([0.0, -1e4, 1e4 if i == 0 else 0.0])
        params[f"decoder/{i}/input/bias"] = jnp.repeat(parts, width)
        if i > 0:
            params[f"decoder/{i}/input/kernel"] = jnp.eye(width, 3 * width, k=2 * width)
    params["combine/kernel"] = jnp.eye(2 * width, width)
    params["output_embedding/embedding"] = jnp.eye(model.vocab_size, width)
    return model, params


def test_dropout_of_the_decoder_differs_between_steps_and_between_layers():
    """A feature comes through if it is kept between each two layers and at the output."""
    tokens = jnp.full((64, 8), 5)

    @partial(jax.jit, static_argnums=0)
    def outputs(model, params):
        modes = (training(jax.random.key(0)), {})
        return [model.bind(params)(tokens, tokens, **mode)[..., :16] for mode in modes]

    for layers, whole in ((1, np.tanh(1.0)), (3, np.tanh(np.tanh(np.tanh(1.0))))):
        dropped, evaluated = map(np.asarray, outputs(*transparent(layers)))
        np.testing.assert_allclose(evaluated, whole, rtol=1e-6)  # where all do
        through, share = dropped != 0, 0.5**layers  # [rows, steps, width]
        # Were a feature dropped at all steps alike, few would be kept at some step.
        for kept, expected in ((through, share), (through.any(1), 1 - (1 - share) ** 8)):
            error = np.sqrt(expected * (1 - expected) / kept.size)
            assert abs(kept.mean() - expected) < 5 * error


def test_the_decoder_reads_what_it_attended_to_and_begins_with_the_source():
    """Input feeding, and the bridge from the encoder's first backward state."""
    model = recurrent(num_layers=2)
    params = random_params(model, 0)
    module = model.bind(params)
    memory = module.encode(BATCH.source, BATCH.source_segments)
    cache = module.start_cache(memory, BATCH.source_segments, 1)
    half = memory[:, 0, model.config.d_model // 2 :]
    for i, state in enumerate(cache.states):
        kernel, bias = params[f"bridge/{i}/kernel"], params[f"bridge/{i}/bias"]
        np.testing.assert_allclose(state[0], np.tanh(half @ kernel + bias), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state[1], 0.0)
    fed, first = cache._replace(attended=jnp.ones_like(cache.attended)), BATCH.target_in[:, :1]
    logits, other = (module.decode_step(first, each)[0] for each in (cache, fed))
    assert (jnp.abs(logits - other).max((1, 2)) > 1e-3).all()
