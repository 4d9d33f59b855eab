"""Evaluation of a split: totals, outputs, attention maps, tables; in the order of its examples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from transformer.console import table
from transformer.data.batches import Dataset, make_batch
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import EOS, PAD
from transformer.inference.decoding import GREEDY, DecodingConfig
from transformer.inference.logits import Constraints
from transformer.inference.search import Hypotheses, Sources, scaled
from transformer.loss import linear_cross_entropy
from transformer.metrics import PRINTED, Totals, finalize, token_sums
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.model import Model, Params
from transformer.modules.stacks import Stack
from transformer.parallel import hosts
from transformer.parallel.mesh import constrain, row_shards, shard_rows

NARROW = 32  # tokens of a source, up to which decoding has one program
SMALL_WIDTH = 128  # of a model of which a CPU device decodes `HYPOTHESES` at once
HYPOTHESES = 64
SAMPLES = 50  # examples in the samples file
BUCKETS = 24  # the maximum number of rows by source length
GROUPS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]  # lengths in a row


def score(model: Model, variables: Params, data: Dataset) -> Totals:
    """The totals of each example under teacher forcing, [examples] float32, for `finalize`."""
    sides = jnp.asarray(data.source), jnp.asarray(data.target)
    source, target = (constrain(side, "batch", "length") for side in sides)
    module, batch = model.bind(variables), make_batch(source, target, start=model.outputs.start)
    inputs = module.hidden(**batch.inputs()), module.output_table(), batch.target_out
    bias = module.output_bias()
    _, sums = linear_cross_entropy(*inputs, batch.weights, bias=bias, measure=token_sums)
    totals = {name: (each * batch.weights).sum(-1) for name, each in sums.items()}
    return totals | {"tokens": batch.weights.sum(-1)}


def in_batches(
    function: Callable, rows: Any, size: int, axis: int = 0, between: Callable = lambda: None
) -> Any:
    """The results of `function(batch)` for all `rows`, NumPy arrays of examples; as NumPy arrays.

    Examples are on `axis` of the results. `between` is called before each batch; an exception that
    it raises ends the evaluation. Splits of equal width share a program, that of a batch.
    """
    count, parts = len(jax.tree.leaves(rows)[0]), []
    size = min(size, count)
    for first in range(0, count, size):
        between()
        start = min(first, count - size)  # the last batch overlaps: all have one shape
        parts.append(function(jax.tree.map(lambda x, k=start: x[k : k + size], rows)))
        if len(parts) > 1:  # one dispatch computes, one waits
            parts[-2] = hosts.fetch(parts[-2])

    def whole(*results: Any) -> np.ndarray:
        *others, last = (np.moveaxis(x, axis, 0) for x in results)
        last = last[len(results) * size - count :]
        return np.moveaxis(np.concatenate([*others, last]), 0, axis)

    return jax.tree.map(whole, *parts[:-1], hosts.fetch(parts[-1]))


def rows_at_once(model: Model, batch_size: int, beam_size: int) -> int:
    """The number of sources that are decoded at once.

    On a CPU the caches of a small model stay in the processor's if they are few; the matrices of a
    large one take longer to read.
    """
    if jax.default_backend() != "cpu" or model.config.d_model > SMALL_WIDTH:
        return batch_size
    most = max(HYPOTHESES // beam_size, 1)
    return min(batch_size, (1 << (most.bit_length() - 1)) * row_shards())


def decode_in_batches(
    decode: Callable, source: Int[np.ndarray, "examples S"], size: int, axis: int = 0
) -> Hypotheses:
    """The hypotheses for all sources, from a call of `decode(sources, streams)` per batch.

    A batch takes as many steps as its longest output, so sources of similar length are decoded
    together, on a CPU in arrays of one to four quarters of the width, each with a program of its
    own. Their outputs have one length.
    """
    lengths, width = (source != PAD).sum(1), source.shape[1]
    order = np.argsort(lengths, kind="stable")
    for k in range(size, len(order) - size + 1, 2 * size):
        order[k : k + size] = order[k : k + size][::-1]  # devices take turns with the longest
    whole = width <= NARROW or jax.default_backend() != "cpu"
    quarter = width if whole else -(-width // 4)

    def decode_rows(rows: np.ndarray) -> Any:
        needed = -(-lengths[rows].max() // quarter) * quarter
        streams = np.stack([rows, np.zeros_like(rows)], axis=1).astype(np.int32)
        return decode(source[rows, :needed], streams)

    found = in_batches(decode_rows, order, size, axis)
    return jax.tree.map(lambda x: x.take(np.argsort(order), axis), found)


def decode(
    model: Model,
    variables: Params,
    source: Int[Array, "B S"],
    streams: Int[Array, "B 2"] | None = None,  # of random numbers; None: the rows' indices, and 0
    prefix: Int[Array, "P"] | None = None,  # the first tokens of all outputs, in place of a text
    decoding: DecodingConfig = GREEDY,
    *,
    margin: int | None = None,  # the run's, used if `decoding` has none
    max_length: int | None = None,  # of outputs; None: the limit of a source of this width
) -> Hypotheses:
    """Decodes a batch, of which each device has adjacent rows and stops when these have ended."""
    (rows, width), shards, outputs = source.shape, row_shards(), model.outputs
    margin, ratio = decoding.margin(margin), decoding.length_ratio
    if max_length is None:
        (limit,) = decoding.limits(np.array([width]), margin or 0).tolist()
        max_length = model.config.reach(limit)
    if streams is None:
        streams = jnp.stack([jnp.arange(rows), jnp.zeros(rows, jnp.int32)], axis=1)

    def decode_shard(replicated, inputs):
        (variables, prefix), (source, streams) = replicated, inputs
        fold, key = jax.random.fold_in, jax.random.key(decoding.seed)
        keys = jax.vmap(lambda n: fold(fold(key, n[0]), n[1]))(streams)
        settings = decoding.min_length, decoding.no_repeat_ngram_size, decoding.repetition_penalty
        forced = outputs.forced_first, outputs.forced_last
        start = None if outputs.start in outputs.banned else outputs.start
        constraints = Constraints(prefix, *settings, *forced, start)
        limits = max_length, keys, model.tokens, margin, ratio
        sources = Sources(source, *limits, constraints, outputs)
        return decoding.method()(model.bind(variables), sources)

    padding = ((0, -rows % shards), (0, 0))
    inputs = tuple(jnp.pad(x, padding, constant_values=PAD) for x in (source, streams))
    if shards == 1:
        inputs = tuple(constrain(x, "batch", None) for x in inputs)
    found = shard_rows(decode_shard, shards)((variables, prefix), inputs)
    return jax.tree.map(lambda x: x[:rows], found)


def compiler_options(*, once: bool = False) -> dict[str, str]:
    """The `compiler_options` of `jax.jit`; `once`: of a program that runs once.

    XLA's CPU backend rewrites each sum over more than 32 elements as two operations. Without it a
    decoding step is 5% faster for one source, and 10% faster with four beams; a train step 2%.
    Without LLVM's optimisations compilation takes half the time.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "tree_reduction_rewriter"}
    return options | ({"xla_backend_optimization_level": "0"} if once else {})


def attention_maps(model: Model, variables: Params, data: Dataset) -> dict[str, list[Array]]:
    """The attention weights [examples, N, T, S] of each layer under teacher forcing."""
    sides = jnp.asarray(data.source), jnp.asarray(data.target)
    batch = make_batch(*sides, start=model.outputs.start)
    module = model.bind(variables)
    module.set_attributes(MultiHeadAttention, sow_weights=True)
    # Inside a scan or a checkpoint nothing can be sown.
    module.set_attributes(Stack, raise_if_not_found=False, scan_layers=False, remat="none")
    _, sown = nnx.capture(module, nnx.Intermediate)(**batch.inputs())
    maps: dict[str, list[Array]] = {"encoder": [], "decoder": [], "cross": []}
    for path, (weights,) in nnx.traversals.flatten_mapping(nnx.to_pure_dict(sown)).items():
        maps[str(path[0]) if "self_attention" in path else "cross"].append(weights)
    return maps


def exact_match(outputs: np.ndarray, targets: np.ndarray) -> Bool[np.ndarray, "examples"]:
    """Whether each output equals its target, including EOS."""
    width = min(outputs.shape[1], targets.shape[1])
    same = (outputs[:, :width] == targets[:, :width]).all(1)
    return same & (outputs[:, width:] == PAD).all(1) & (targets[:, width:] == PAD).all(1)


def summarize(split: str, data: Dataset, totals: Totals, found: Hypotheses) -> dict[str, Any]:
    """The metrics of a split and of each source length, and the number of truncated outputs.

    `sequence_accuracy` is the exact match of the best hypotheses; all other metrics are those of
    teacher forcing. If there are more than `BUCKETS` source lengths (without EOS), adjacent ones
    share a row, labelled by the longest.
    """
    outputs = np.asarray(found.tokens)[:, 0]
    exact = exact_match(outputs, np.asarray(data.target))

    def metrics_of(rows: Any) -> dict[str, float]:
        values = finalize({name: each[rows] for name, each in totals.items()})
        values |= {"sequence_accuracy": float(exact[rows].mean())}
        return {name: values[name] for name in PRINTED}

    lengths = (np.asarray(data.source) != PAD).sum(1) - 1
    group = next(group for group in GROUPS if lengths.max() <= BUCKETS * group)
    lengths = -(-lengths // group) * group
    return {
        "outputs_cut": int((outputs != EOS).all(1).sum()),
        "metrics": {f"{split}/{name}": value for name, value in metrics_of(...).items()},
        "by_source_length": [
            {"length": int(length), "sequences": int(number)} | metrics_of(lengths == length)
            for length, number in zip(*np.unique(lengths, return_counts=True), strict=True)
        ],
    }


def show_samples(tokenizers: Tokenizers, data: Dataset, found: Hypotheses, count: int = 3) -> None:
    """Prints source, target and best output of the first examples."""
    source, target = (each.decode for each in tokenizers)
    sides = ((source, data.source), (target, data.target), (target, found.tokens[:, 0]))
    columns = [map(decode, np.asarray(side)[:count].tolist()) for decode, side in sides]
    table("samples", ("source", "target", "output"), zip(*columns, strict=True), text=True)


def limit_report(
    decoding: DecodingConfig, margin: int, data: Dataset, truncated: Sequence[int]
) -> tuple[int, str]:
    """The number of targets that are longer than outputs may be, and a line about the limit.

    The line is empty if there are none and no replica has `truncated` outputs.
    """
    target, source = ((np.asarray(x) != PAD).sum(1) for x in (data.target, data.source))
    beyond = int((target > decoding.limits(source, margin)).sum())
    needed = int((target - scaled(source, decoding.length_ratio)).max())
    flags, limit = f"--decode_margin={max(margin, needed)}", f"decode_margin={margin}"
    if decoding.length_ratio != 1.0:
        limit += f", length_ratio={decoding.length_ratio}"
    if decoding.max_length is not None:
        flags += f" --max_length={max(decoding.max_length, target.max())}"
        limit += f", max_length={decoding.max_length}"
    count = " to ".join(f"{each:,}" for each in sorted({min(truncated), max(truncated)}))
    found = [f"{count} outputs reached it"] * any(truncated)
    found += [f"{beyond:,} targets are longer; {flags} suffices for all"] * (beyond > 0)
    return beyond, f"of the outputs' length ({limit}): {', '.join(found)}" if found else ""


def write_samples(
    path: Path, tokenizers: Tokenizers, data: Dataset, found: Hypotheses, distinct: bool = False
) -> None:
    r"""Writes source, target and outputs of the first examples as tab-separated values.

    Each hypothesis of beam search has a line with its score; if `distinct`, the best of each text.
    Tabs, line ends and backslashes in a text are escaped as \t, \n, \r and \\.
    """
    text, escapes = tokenizers.target.decode, {92: r"\\", 9: r"\t", 10: r"\n", 13: r"\r"}
    rows = [["source", "target", "output"] + ["score"] * (found.tokens.shape[1] > 1)]
    examples = (data.source, data.target, found.tokens, found.scores)
    head = (np.asarray(side)[:SAMPLES].tolist() for side in examples)
    for source, target, *hypotheses in zip(*head, strict=True):
        outputs = [(text(output), score) for output, score in zip(*hypotheses, strict=True)]
        best = {output[0]: output for output in outputs[::-1] if output[1] != -np.inf}
        for output in outputs:
            if distinct and best.get(output[0]) is not output:
                continue
            row = [tokenizers.source.decode(source), text(target), output[0], f"{output[1]:.4f}"]
            rows.append([field.translate(escapes) for field in row[: len(rows[0])]])
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
