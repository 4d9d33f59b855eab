"""How well a model does on a whole split, in one dispatch, with a result for each example."""

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
from transformer.inference.decoding import greedy
from transformer.loss import cross_entropy
from transformer.metrics import Predictions, token_sums
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.model import Model, Params
from transformer.modules.stacks import Stack
from transformer.parallel.mesh import constrain, row_shards, shard_rows


def map_batches(function: Callable, data: Dataset) -> Any:
    """`function` of each batch's (source, target), the rows' results joined in order.

    A batch is split over the devices as one of training is.
    """
    rows, size = len(data), data.batch_size
    batches = -(-rows // size)

    def fold(tokens):
        padded = jnp.pad(tokens, ((0, batches * size - rows), (0, 0)), constant_values=PAD)
        return padded.reshape(batches, size, -1)

    def of_batch(pair):
        return function(*(constrain(tokens, "batch", "length") for tokens in pair))

    results = jax.lax.map(of_batch, (fold(data.source), fold(data.target)))
    return jax.tree.map(lambda x: x.reshape(batches * size, *x.shape[2:])[:rows], results)


# The attention weights [B, N, T, S] of each layer, under "encoder", "decoder", "cross".
Maps = dict[str, list[Array]]

# Totals over the target tokens of each example, [examples] float32: `token_sums`, and `tokens`.
Totals = dict[str, Any]


def score(model: Model, params: Params, data: Dataset) -> Totals:
    """The totals of every example under teacher forcing, for `metrics.finalize`."""
    module = model.bind(params)

    def score_batch(source, target):
        batch = make_batch(source, target)
        logits = module(**batch.inputs())
        losses = cross_entropy(logits, batch.target_out)
        sums = token_sums(Predictions(logits, batch.target_out, losses))
        totals = {name: (each * batch.weights).sum(-1) for name, each in sums.items()}
        return totals | {"tokens": batch.weights.sum(-1)}

    return map_batches(score_batch, data)


def in_parts(
    score: Callable[[Params, Dataset], Totals],
    params: Params,
    data: Dataset,
    place: Callable[[Dataset], Dataset],
    between: Callable[[], None] = lambda: None,
) -> Totals:
    """Scores of every example as NumPy's arrays, a batch in a dispatch, of which one waits.

    Args:
      score: `score` of a model, jitted.
      params: its variables.
      data: the examples, on the host.
      place: puts a batch on the devices.
      between: called before each dispatch; what it raises ends the evaluation.
    """
    size, parts = min(data.batch_size, len(data)), []
    for first in range(0, len(data), size):
        between()
        start = min(first, len(data) - size)  # all have one shape, and some rows come twice
        rows = slice(start, start + size)
        batch = Dataset(data.source[rows], data.target[rows], data.batch_size, data.packed)
        parts.append((first - start, score(params, place(batch))))
        if len(parts) > 1:
            jax.block_until_ready(parts[-2])
    whole = [jax.tree.map(lambda x, k=k: np.asarray(x)[..., k:], part) for k, part in parts]
    return jax.tree.map(lambda *each: np.concatenate(each, axis=-1), *whole)


def decode(
    model: Model,
    params: Params,
    data: Dataset,
    length: int,
    search: Callable[..., Any] = greedy,
    keys: Array | None = None,
) -> Any:
    """What `search` finds for every source of `data`, at most `length` tokens with EOS.

    A batch takes as many steps as its longest output, so sources of like length are
    decoded together, and each device has some of every length.

    Args:
      model: the model.
      params: its variables.
      data: the examples, of which only the sources are read.
      length: of an output, at most.
      search: `decoding.greedy`, or `beam_search` or `sample` with its settings.
      keys: of each example, [examples], which `sample` takes.

    Returns:
      What `search` returns, with the examples in their order: Decoded, or Beams.
    """
    source, ways = jnp.asarray(data.source), row_shards()
    order = jnp.argsort((source != PAD).sum(1))
    order = jnp.pad(order, (0, -len(data) % ways), constant_values=len(data))
    order = order.reshape(-1, ways).T.reshape(-1)

    def decode_part(params, rows):
        module, (source, numbers) = model.bind(params), rows

        def decode_batch(source, numbers):
            given = {} if keys is None else {"keys": jax.random.wrap_key_data(numbers)}
            segments = (source != PAD).astype(jnp.int32)
            return search(module, source, segments, length, tokens=model.tokens, **given)

        return map_batches(decode_batch, Dataset(source, numbers, max(data.batch_size // ways, 1)))

    def dealt(rows):
        return rows.at[order].get(mode="fill", fill_value=PAD)

    numbers = source if keys is None else jax.random.key_data(keys)
    found = shard_rows(decode_part, ways)(params, (dealt(source), dealt(numbers)))
    return jax.tree.map(lambda rows: jnp.zeros_like(rows[: len(data)]).at[order].set(rows), found)


def compiler_options() -> dict[str, str]:
    """What `jax.jit` is to be told of a program that decodes.

    On a CPU XLA makes two operations of each sum over more than 32 numbers, so that large ones
    use all of a core. A step of decoding has a norm's width of them: one operation is faster, by
    5% for one source and by 10% for one of four beams.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


def attention_maps(model: Model, params: Params, data: Dataset) -> Maps:
    """The attention weights [examples, N, T, S] of each layer under teacher forcing."""
    batch = make_batch(jnp.asarray(data.source), jnp.asarray(data.target))
    module = model.bind(params)
    module.set_attributes(MultiHeadAttention, sow_weights=True)
    # Inside a scan or a checkpoint nothing can be sown.
    module.set_attributes(Stack, raise_if_not_found=False, scan_layers=False, remat="none")
    _, sown = nnx.capture(module, nnx.Intermediate)(**batch.inputs())
    maps: Maps = {"encoder": [], "decoder": [], "cross": []}
    for path, (weights,) in nnx.traversals.flatten_mapping(nnx.to_pure_dict(sown)).items():
        maps[str(path[0]) if "self_attention" in path else "cross"].append(weights)
    return maps


def exact_match(
    decoded: Int[np.ndarray, "examples _"], target: Int[np.ndarray, "examples _"]
) -> Bool[np.ndarray, "examples"]:
    """Which outputs are their target, token for token, EOS included."""
    width = max(decoded.shape[1], target.shape[1])
    pad = partial(np.pad, constant_values=PAD)
    return np.all(
        pad(decoded, ((0, 0), (0, width - decoded.shape[1])))
        == pad(target, ((0, 0), (0, width - target.shape[1]))),
        axis=1,
    )
