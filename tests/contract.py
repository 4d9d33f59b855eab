"""The properties of every model, whatever its options: `check(model)`.

Most of the time is compilation, so they share five programs: logits with gradients, the same in
bfloat16 and on eight devices, an unpadded row with and without a cache, and decoding.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from tests.helpers import TOKENIZER, random_params
from transformer import testing
from transformer.data.batches import Batch, make_batch
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.inference.decoding import GREEDY
from transformer.inference.logits import next_log_p
from transformer.inference.search import Sources, beam_search
from transformer.modules.linear import Embed
from transformer.modules.model import Model, Params
from transformer.parallel import mesh

# No two axes are alike: rows, source, target. Each target position has a row of its own.
B, S, T = 8, 9, 6
LONG, SHORT, SINGLE = ("abcdefgh", "hgfed"), ("xyz", "zyx"), ("q", "q")
PACKED = (("ab", "c"), ("cdefg", "gfe"))  # fill a row of each side together


class Outputs(NamedTuple):
    logits: Float[Array, "B T V"]
    params: Params  # gradients
    target: Float[Array, "B T D"]  # gradient with respect to the embedded target


def check(model: Model) -> None:
    outputs, params = program(model), random_params(model, 0)
    causality(model, partial(outputs, params))
    separation(model, partial(outputs, params))
    packing(model, partial(outputs, params))
    gradients(model, outputs, params)
    caching(model, outputs, params)
    searching(model, outputs)
    sharding(model, outputs, params)


class Nudged(Embed):
    def __init__(self, embed: Embed, nudge: Array):
        self.embed, self.nudge, self.features = embed, nudge, embed.features

    def __call__(self, inputs: Array) -> Array:
        return self.embed(inputs) + self.nudge


def program(model: Model):
    """Jitted: parameters, a batch, and weights of the logits in the loss → `Outputs`."""
    packed = model.config.architecture != "recurrent"  # which reads one example a row

    def loss(params, nudge, batch, weights):
        module = model.bind(params)
        embed = module.target_embedding or module.embedding
        module.output_embedding = module.output  # which may be the same
        module.target_embedding = Nudged(embed, nudge / model.config.d_model**0.5)
        if not packed:
            batch = batch._replace(source_positions=None, target_positions=None)
        logits = module(**batch.inputs())
        return (logits * weights).sum(), logits

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def outputs(params: Params, batch: Batch, weights: np.ndarray | float = 1.0) -> Outputs:
        nudge = np.zeros((B, T, model.config.d_model), jnp.dtype(model.config.dtype))
        weights = np.broadcast_to(np.float32(weights), (B, T, model.vocab_size))
        gradients, logits = jax.device_get(gradient(params, nudge, batch, weights))
        return Outputs(logits, *gradients)

    return outputs


def rows(*examples) -> Batch:
    """A batch of B rows, each a pair of texts, several pairs, or nothing."""
    tokens = np.full((2, B, max(S, T)), PAD, np.int32)
    for row, pairs in enumerate(examples):
        for side, texts in enumerate(zip(*pairs, strict=True)):
            together = [token for text in texts for token in TOKENIZER.encode(text)]
            tokens[side, row, : len(together)] = together
    source, target = jnp.asarray(tokens[0, :, :S]), jnp.asarray(tokens[1, :, :T])
    return make_batch(source, target, packed=True)


def noise(model: Model) -> np.ndarray:
    """Random weights of the logits, so that no two gradients cancel."""
    return np.random.default_rng(1).normal(size=(B, T, model.vocab_size)).astype(np.float32)


def none(found: list) -> None:
    assert not found, "\n".join(map(str, found))


def alike(one: Params, other: Params) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), one, other)


def causality(model: Model, outputs) -> None:
    """Logits at t depend on no later target token, nor on one that a window excludes.

    By the gradient of row t, whose loss is of position t alone, and by changing tokens.
    """
    batch = rows(*[[LONG]] * B)
    alone = np.eye(B, T)[..., None] * noise(model)
    influence = np.abs(outputs(batch, alone).target).sum(-1)[:T]
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    read = (back >= 0) & (back < (model.config.window or T))
    np.testing.assert_array_equal(influence[~read], 0.0)
    assert (influence[read] > 0).all()

    moved = testing.influence(
        lambda tokens: outputs(batch._replace(target_in=tokens)).logits, batch.target_in
    )
    np.testing.assert_array_equal(moved > 0, np.broadcast_to(read, moved.shape))


def separation(model: Model, outputs) -> None:
    """Logits depend on no other example of their row, on no padding and on no other row."""
    packed = [PACKED] if model.config.architecture != "recurrent" else []  # one example a row
    batch = rows([LONG], [SHORT], [], [SINGLE], *packed)

    def logits(**tokens):
        return outputs(batch._replace(**tokens)).logits

    source, target = batch.source_segments, batch.target_segments
    none(testing.packing_leaks(lambda x: logits(source=x), batch.source, source, target))
    none(testing.packing_leaks(lambda x: logits(target_in=x), batch.target_in, target, target))
    others = outputs(rows([], [SHORT], [LONG], [SINGLE], [LONG], [SINGLE], [LONG])).logits
    none(testing.differences(others[[1, 3]], logits()[[1, 3]]))


def packing(model: Model, outputs) -> None:
    """Examples that share a row have the logits and gradients that they have apart."""
    if model.config.architecture == "recurrent":  # reads one example a row
        return
    first, second = PACKED
    start = len(first[1]) + 1
    end = start + len(second[1]) + 1
    batch, weights = rows(PACKED, [first], [second]), noise(model)[0]
    together, apart = np.zeros((2, B, *weights.shape))
    together[0, :end], apart[1, :start] = weights[:end], weights[:start]
    apart[2, : end - start] = weights[start:end]
    one, other = outputs(batch, together), outputs(batch, apart)
    none(testing.differences(one.logits[:1, :start], one.logits[1:2, :start]))
    none(testing.differences(one.logits[:1, start:end], one.logits[2:3, : end - start]))
    alike(one.params, other.params)


def gradients(model: Model, outputs, params: Params) -> None:
    """Gradients are finite beside empty rows and reach every parameter, also in bfloat16."""
    config = replace(model.config, dtype="bfloat16")
    batch, weights = rows([LONG], [], [SHORT]), noise(model)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own attention relies on it
        low = program(Model(config, model.vocab_size))(params, batch, weights)
    high = outputs(params, batch, weights)
    for found in (high, low):
        assert found.logits.dtype == jnp.float32
        none(testing.nonfinite_gradients(found.params))
        for name, gradient in found.params.items():
            if not name.endswith("key/bias"):  # it shifts all scores of a query alike
                assert np.abs(gradient).max() > 1e-5, name
    error = np.abs(low.logits - high.logits).max() / np.abs(high.logits).max()
    assert 1e-4 < error < 0.05


def caching(model: Model, outputs, params: Params) -> None:
    """Decoding with a cache, of one token or several, equals teacher forcing, padded or not."""
    batch = make_batch(*(jnp.asarray([TOKENIZER.encode(text)], jnp.int32) for text in SHORT))
    length = batch.target_in.shape[1]

    @jax.jit
    def both(params):
        module = model.bind(params)
        source = (batch.source, batch.source_segments)
        whole = module(**batch.inputs())
        cache = module.start_cache(module.encode(*source), batch.source_segments, length)
        first, cache = module.decode_step(batch.target_in[:, :-1], cache)
        last, cache = module.decode_step(batch.target_in[:, -1:], cache)
        return whole, jnp.concatenate([first, last], axis=1), cache.filled

    whole, decoded, filled = both(params)
    assert filled == length
    none(testing.differences(decoded, whole))
    padded = outputs(params, rows([LONG], [SHORT])).logits[1:2, :length]
    none(testing.differences(padded, whole))


def searching(model: Model, outputs) -> None:
    """Greedy decoding takes the likeliest token of teacher forcing, and is a beam of 1."""
    batch = rows([LONG], [SHORT], [SINGLE], [])

    @jax.jit
    def search(params):
        call = (model.bind(params), Sources(batch.source, T))
        return GREEDY.method()(*call), beam_search(*call, beam_size=1, length_penalty=0.0)

    for seed in range(1, 4):
        params = random_params(model, seed)
        found, beam = search(params)
        np.testing.assert_array_equal(beam.tokens, found.tokens)
        np.testing.assert_allclose(beam.scores[:3], found.scores[:3], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.tokens[3:], PAD)  # without a source nothing is said
        np.testing.assert_array_equal(found.scores[3:], 0.0)
        np.testing.assert_array_equal(beam.scores[3:], -np.inf)
        tokens = np.asarray(found.tokens)[:, 0]
        ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) > 0
        np.testing.assert_array_equal(tokens[ended], PAD)
        forced = batch._replace(
            target_in=jnp.asarray(np.insert(tokens[:, :-1], 0, BOS, axis=1)),
            target_segments=jnp.asarray(~ended, jnp.int32),
            target_positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
        )
        log_p = np.asarray(next_log_p(jnp.asarray(outputs(params, forced).logits), None))[:3]
        best, taken = log_p.argmax(-1), ~ended[:3]
        np.testing.assert_array_equal(best[taken], tokens[:3][taken])
        total = (log_p.max(-1) * taken).sum(-1)
        # Near zero, log p is a difference of larger numbers, the logits, and rounds as they do.
        np.testing.assert_allclose(found.scores[:3, 0], total, rtol=1e-4, atol=1e-6)


def sharding(model: Model, outputs, params: Params) -> None:
    """Eight devices give what one gives; every dimension of a variable has a name in the rules."""
    assert model.axes.keys() == model.shapes.keys()
    for name, shape in model.shapes.items():
        assert len(model.axes[name]) == len(shape.shape), name
        assert set(model.axes[name]) <= set(mesh.RULES), name
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    if model.config.num_heads == 1:  # a single head cannot be split in two
        sizes |= {"data": 2, "tensor": 1}
    if model.config.architecture == "recurrent":  # is split over the batch alone
        sizes = {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    devices = mesh.make_mesh(mesh.MeshConfig(replica=1, **sizes))
    batch, weights = rows([LONG], [SHORT], [], [SINGLE]), noise(model)
    with jax.set_mesh(devices):
        shardings = mesh.parameter_shardings(devices, model.shapes, model.axes)
        rules = NamedSharding(devices, mesh.partition_spec(("batch",)))
        placed, split = jax.device_put((params, batch), (shardings, rules))
        found = outputs(placed, split, weights)
    expected = outputs(params, batch, weights)
    none(testing.differences(found.logits, expected.logits))
    alike(found.params, expected.params)
