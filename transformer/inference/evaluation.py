"""Evaluation of a model on a whole split: teacher-forced totals, decoded outputs, attention maps.

The functions keep the order of the examples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from transformer.data.batches import Dataset, make_batch
from transformer.data.tokenizer import PAD
from transformer.inference.decoding import Hypotheses, greedy
from transformer.loss import cross_entropy
from transformer.metrics import Predictions, token_sums
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.model import Model, Params
from transformer.modules.stacks import Stack
from transformer.parallel.mesh import constrain, row_shards, shard_rows

# Totals over the target tokens of each example, [examples] float32: `token_sums`, and `tokens`.
Totals = dict[str, Any]
# The attention weights [examples, N, T, S] of each layer, under "encoder", "decoder", "cross".
Maps = dict[str, list[Array]]


def map_batches(function: Callable, data: Dataset) -> Any:
    """Maps `function(source, target)` over batches, sharded as in training."""
    rows, size = len(data), data.batch_size
    batches = -(-rows // size)

    def fold(tokens):
        padded = jnp.pad(tokens, ((0, batches * size - rows), (0, 0)), constant_values=PAD)
        return padded.reshape(batches, size, -1)

    def of_batch(pair):
        return function(*(constrain(tokens, "batch", "length") for tokens in pair))

    results = jax.lax.map(of_batch, (fold(data.source), fold(data.target)))
    return jax.tree.map(lambda x: x.reshape(batches * size, *x.shape[2:])[:rows], results)


def score(model: Model, variables: Params, data: Dataset) -> Totals:
    """The totals of each example under teacher forcing, for `metrics.finalize`."""
    module = model.bind(variables)

    def score_batch(source, target):
        batch = make_batch(source, target)
        logits = module(**batch.inputs())
        losses = cross_entropy(logits, batch.target_out)
        sums = token_sums(Predictions(logits, batch.target_out, losses))
        totals = {name: (each * batch.weights).sum(-1) for name, each in sums.items()}
        return totals | {"tokens": batch.weights.sum(-1)}

    return map_batches(score_batch, data)


def score_in_batches(
    score: Callable[[Params, Dataset], Totals],
    variables: Params,
    data: Dataset,
    place: Callable[[Dataset], Dataset],
    between: Callable[[], None] = lambda: None,
) -> Totals:
    """The totals of each example as NumPy arrays, computed with one dispatch per batch.

    Args:
      score: the jitted function `score` of a model.
      variables: the model's variables.
      data: the examples, on the host.
      place: puts a batch on the devices.
      between: called before each dispatch; an exception that it raises ends the evaluation.
    """
    size, parts = min(data.batch_size, len(data)), []
    for first in range(0, len(data), size):
        between()
        start = min(first, len(data) - size)  # the last batch overlaps: all have one shape
        rows = slice(start, start + size)
        batch = Dataset(data.source[rows], data.target[rows], data.batch_size, data.packed)
        parts.append((first - start, score(variables, place(batch))))
        if len(parts) > 1:  # one dispatch computes, one waits
            jax.block_until_ready(parts[-2])
    whole = [jax.tree.map(lambda x, k=k: np.asarray(x)[..., k:], part) for k, part in parts]
    return jax.tree.map(lambda *each: np.concatenate(each, axis=-1), *whole)


def decode(
    model: Model,
    variables: Params,
    data: Dataset,
    max_length: int,
    method: Callable[..., Hypotheses] = greedy,
    keys: Array | None = None,
) -> Hypotheses:
    """Decodes every source in `data`; returns the hypotheses in the order of the examples.

    A batch takes as many steps as its longest output, so sources of similar length are decoded
    together, and each length is distributed over all devices.

    Args:
      model: the model.
      variables: its variables.
      data: the examples, of which only the sources are read.
      max_length: the maximum number of tokens in an output, EOS included.
      method: one of `decoding.METHODS`, with its settings.
      keys: PRNG keys of the examples, [examples], for sampling.
    """
    source, shards = jnp.asarray(data.source), row_shards()
    order = jnp.argsort((source != PAD).sum(1))
    order = jnp.pad(order, (0, -len(data) % shards), constant_values=len(data))
    order = order.reshape(-1, shards).T.reshape(-1)

    def decode_shard(variables, rows):
        module, (source, key_data) = model.bind(variables), rows

        def decode_batch(source, key_data):
            own = {} if keys is None else {"keys": jax.random.wrap_key_data(key_data)}
            segments = (source != PAD).astype(jnp.int32)
            return method(module, source, segments, max_length, num_tokens=model.tokens, **own)

        batch_size = max(data.batch_size // shards, 1)
        return map_batches(decode_batch, Dataset(source, key_data, batch_size))

    def in_order(rows):
        return rows.at[order].get(mode="fill", fill_value=PAD)

    key_data = source if keys is None else jax.random.key_data(keys)
    rows = in_order(source), in_order(key_data)
    found = shard_rows(decode_shard, shards)(variables, rows)
    return jax.tree.map(lambda rows: jnp.zeros_like(rows[: len(data)]).at[order].set(rows), found)


def compiler_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for decoding.

    XLA's CPU backend rewrites each sum over more than 32 elements as two operations. Without it a
    decoding step is 5% faster for one source, and 10% faster with four beams.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


def attention_maps(model: Model, variables: Params, data: Dataset) -> Maps:
    """The attention weights [examples, N, T, S] of each layer under teacher forcing."""
    batch = make_batch(jnp.asarray(data.source), jnp.asarray(data.target))
    module = model.bind(variables)
    module.set_attributes(MultiHeadAttention, sow_weights=True)
    # Inside a scan or a checkpoint nothing can be sown.
    module.set_attributes(Stack, raise_if_not_found=False, scan_layers=False, remat="none")
    _, sown = nnx.capture(module, nnx.Intermediate)(**batch.inputs())
    maps: Maps = {"encoder": [], "decoder": [], "cross": []}
    for path, (weights,) in nnx.traversals.flatten_mapping(nnx.to_pure_dict(sown)).items():
        maps[str(path[0]) if "self_attention" in path else "cross"].append(weights)
    return maps


def exact_match(
    outputs: Int[np.ndarray, "examples _"], targets: Int[np.ndarray, "examples _"]
) -> Bool[np.ndarray, "examples"]:
    """Whether each output equals its target, including EOS."""
    width = max(outputs.shape[1], targets.shape[1])
    pad = partial(np.pad, constant_values=PAD)
    return np.all(
        pad(outputs, ((0, 0), (0, width - outputs.shape[1])))
        == pad(targets, ((0, 0), (0, width - targets.shape[1]))),
        axis=1,
    )
