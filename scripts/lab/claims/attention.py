"""Masked attention does not see the future, masked keys have no probability, heads differ."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lab import plots
from lab.claims.claim import Check, Claim, Setting, above_zero, shown
from lab.claims.learning import records
from lab.statistics import mean_interval
from lab.tables import markdown
from transformer.config import default_config
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD
from transformer.inference import evaluation
from transformer.metrics import finalize
from transformer.modules import masking
from transformer.modules.config import ModelConfig
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.modules.model import Model, Params
from transformer.parallel.replicas import split_replicas
from transformer.run import Run
from transformer.training.step import stream

KINDS = {  # of attention maps → name, place and module
    "encoder": ("encoder", "encoder/layers", "self_attention"),
    "decoder": ("masked decoder", "decoder/layers", "self_attention"),
    "cross": ("cross", "decoder/layers", "cross_attention"),
}
APART = 0.1  # total variation beyond which the maps of two heads are said to differ
# Those that compute in float32 on any device; a kernel falls back to einsum where it cannot run.
BACKENDS = {
    name: attend for name, attend in ATTENTION_BACKENDS.items() if name not in BFLOAT16_BACKENDS
}
SCALES = (1.0, 1e4)  # of scores: ordinary, and far beyond the range of exp


def model_of(vocab_size: int, **changes: Any) -> Model:
    """The default model, narrow, with some knobs changed."""
    config: Any = default_config().model
    config.update({"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "dropout_rate": 0.0})
    config.update(changes)
    return Model(ModelConfig(**config), vocab_size)


def dependence(backend: str, length: int, seed: int) -> Float[np.ndarray, "T T"]:
    """The largest |∂ logit at position t / ∂ embedding of the token at position u|.

    Through a whole model with random parameters. Every position has its own token, and the
    target's embedding table is separate, so that a row of the table stands for a position.
    """
    first = 3  # after the special tokens
    model = model_of(first + length, attention_backend=backend, tie_embeddings=False)
    params = model.init(jax.random.key(seed))
    tokens = jnp.arange(first, first + length)[None]
    (name,) = (name for name in params if name.startswith("target_embedding/"))

    def logits(rows: Array) -> Array:
        variables = params | {name: params[name].at[first:].set(rows)}
        return model.bind(variables)(tokens, tokens)[0]

    jacobian = jax.jit(jax.jacrev(logits))(params[name][first:])  # [T, V, T, D]
    return np.abs(np.asarray(jacobian)).max((1, 3))


def causality(setting: Setting, *, length: int = 12, seeds: int = 5) -> Claim:
    """Gradients of outputs with respect to later inputs."""
    later = np.triu(np.ones((length, length), bool), 1)
    checks, drawn = [], {}
    for backend in BACKENDS:
        found = np.max([dependence(backend, length, seed) for seed in range(seeds)], axis=0)
        drawn[f"|∂ logits / ∂ token|, {backend}"] = found
        largest, smallest = found[later].max(), found[~later].min()
        text = f"later positions: {largest:g}; earlier and own: at least {smallest:.2g}"
        checks.append(Check(f"backend {backend}", text, bool(largest == 0.0 < smallest)))
    plots.maps(drawn, "input position", "output position", setting.folder / "causality.png")
    return Claim(
        title="Masked attention",
        says="With masked multi-head attention an output depends on earlier outputs alone.",
        method="The gradient of every logit with respect to the embedded token at every target "
        f"position, through a whole model with random parameters ({seeds} seeds, {length} "
        f"positions, {later.sum()} pairs of an output and a later input). True if the gradients "
        "of all these pairs are exactly 0, and no others are.",
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def probabilities(setting: Setting, *, length: int = 16, seeds: int = 5) -> Claim:
    """Attention probabilities of masked keys."""
    real = jnp.arange(length) < length - 5
    packed = jnp.where(real, 1 + jnp.arange(length) // 5, 0)[None]
    mask_of: dict[str, Bool[Array, "1 1 T S"]] = {
        "causal": masking.causal(length),
        "padding": jnp.broadcast_to(masking.padding(real[None]), (1, 1, length, length)),
        "causal, packed rows": masking.causal(length) & masking.segment(packed, packed),
    }
    # With unit vectors as values, the outputs are the probabilities.
    units = jnp.broadcast_to(jnp.eye(length), (1, 2, length, length))
    checks, drawn = [], {}
    for (name, mask), (backend, attend), scale in itertools.product(
        mask_of.items(), BACKENDS.items(), SCALES
    ):
        outputs = []
        for seed in range(seeds):
            query, key = jax.random.normal(jax.random.key(seed), (2, 1, 2, length, length))
            outputs.append(attend(scale * query, key, units, mask))
        found = np.asarray(jnp.concatenate(outputs))
        allowed = np.broadcast_to(np.asarray(mask), found.shape)
        masked = np.abs(found[~allowed]).max()
        off = np.abs(found.sum(-1) - allowed.any(-1)).max()  # a fully masked query gets zeros
        if scale == 1.0:
            drawn[name] = found[0, 0]
        case = f"{name} mask, backend {backend}, scores × {scale:g}"
        text = f"masked: {masked:g}; the sum of the others is off 1 by {off:.1g}"
        checks.append(Check(case, text, bool(masked == 0.0 and off < 1e-5)))
    plots.maps(drawn, "key", "query", setting.folder / "probabilities.png")
    return Claim(
        title="Probabilities of masked values",
        says="Masking sets illegal scores to -∞, so that their probability is zero.",
        method=f"The output of every attention backend for random queries and keys (2 heads, "
        f"{length} positions, {seeds} seeds) with unit vectors as values: the probabilities. True "
        "if the largest of a masked key is exactly 0 and those of each query sum to 1 within 1e-5, "
        "or to 0 where a query may attend to nothing.",
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def distance(maps: Float[np.ndarray, "B N T S"], real: Bool[np.ndarray, "B T"]) -> float:
    """Total variation distance, Σ|p - q| / 2, of the two heads with the most similar maps.

    The mean over all queries that are tokens, 0 to 1.
    """
    pairs = itertools.combinations(range(maps.shape[1]), 2)
    return float(min(np.abs(maps[:, i] - maps[:, j]).sum(-1)[real].mean() / 2 for i, j in pairs))


def distances(model: Model, variables: Params, data: Dataset) -> dict[str, float]:
    """`distance` of each kind of attention, the mean over its layers."""
    maps = jax.device_get(jax.jit(partial(evaluation.attention_maps, model))(variables, data))
    queries = {"encoder": data.source, "decoder": data.target, "cross": data.target}
    real = {kind: np.asarray(tokens) != PAD for kind, tokens in queries.items()}
    return {k: float(np.mean([distance(layer, real[k]) for layer in maps[k]])) for k in KINDS}


def without_head(variables: Params, kind: str, head: int) -> Params:
    """The variables with one head of one kind of attention silenced in every layer."""
    _, layers, attention = KINDS[kind]
    return {
        name: leaf.at[head].set(0.0)
        if name.startswith(layers) and name.endswith(f"{attention}/out/kernel")
        else leaf
        for name, leaf in variables.items()
    }


def measure_heads(folder: Path, data_dir: str | None, examples: int) -> dict[str, list[float]]:
    """Measurements of the heads of the population trained in a folder, a value for each seed.

    `encoder, trained` and `encoder, untrained` are `distance` after and before training;
    `encoder, rank 1` is the loss of accuracy, in points, without the most useful head, which is
    ranked on one half of the test examples and measured on the other.
    """
    run = Run.saved(folder, data_dir=data_dir)
    model, state = run.model, run.restore()
    data, half = run.data["test"].head(examples), examples // 2
    halves = data.head(half), Dataset(data.source[half:], data.target[half:], half)
    score = jax.jit(partial(evaluation.score, model))

    def accuracies(variables: Params) -> list[float]:
        totals = (jax.device_get(score(variables, each)) for each in halves)
        return [finalize(each, "test")["test/sequence_accuracy"] for each in totals]

    found: dict[str, list[float]] = {}
    seeds, replicas = np.atleast_1d(run.config.seeds()), run.config.replicas
    for variables, seed in zip(split_replicas(state.variables(), replicas), seeds, strict=True):
        trained = jax.tree.map(jnp.asarray, variables)
        initial = model.init(stream(jnp.asarray(seed), "init"))
        for when, each in (("trained", trained), ("untrained", initial)):
            for kind, apart in distances(model, each, halves[0]).items():
                found.setdefault(f"{KINDS[kind][0]}, {when}", []).append(apart)
        whole = accuracies(trained)
        for kind, (name, *_) in KINDS.items():
            costs = []
            for head in range(model.config.num_heads):
                left = accuracies(without_head(trained, kind, head))
                costs.append([100 * (a - b) for a, b in zip(whole, left, strict=True)])
            for rank, (_, cost) in enumerate(sorted(costs, reverse=True), 1):
                found.setdefault(f"{name}, rank {rank}", []).append(cost)
    return found


def heads(setting: Setting, *, examples: int = 1_000) -> Claim:
    """Whether heads attend differently, and what one is worth."""
    accuracy = {
        name: [100 * each.outcomes["sequence_accuracy"] for each in found]
        for name, found in records(setting, "heads").items()
    }
    folder = setting.root / "heads" / "4_heads"
    found = measure_heads(folder, setting.data_dir, examples)
    cases: dict[str, Sequence[float]] = {}
    for name, *_ in KINDS.values():
        trained, untrained = found[f"{name}, trained"], found[f"{name}, untrained"]
        cases[f"{name}: the two most similar heads are more than {APART} apart"] = [
            each - APART for each in trained
        ]
        cases[f"{name}: they are further apart than before training"] = [
            a - b for a, b in zip(trained, untrained, strict=True)
        ]
        cases[f"{name}: points lost without its most useful head"] = found[f"{name}, rank 1"]
    cases["points lost with one head as wide as four"] = [
        a - b for a, b in zip(accuracy["4 heads"], accuracy["1 head"], strict=True)
    ]
    means = {name: mean_interval(each) for name, each in found.items()}
    ranks = {name: each for name, each in means.items() if "rank" in name}
    apart = {name: each for name, each in means.items() if "rank" not in name}
    panels: Mapping[str, Any] = {
        "distance of the two most similar heads (total variation)": apart,
        "points of sequence accuracy lost without that head": ranks,
        "sequence accuracy, %": {name: mean_interval(each) for name, each in accuracy.items()},
    }
    plots.intervals(panels, setting.folder / "heads.png")
    return Claim(
        title="Several heads",
        says="Several heads attend in several ways at once; one head averages them.",
        method="The trained seeds of 4 heads of `configs/ablations/heads.py`, on test strings. The "
        "distance of two heads is the total variation of their attention, here of the two most "
        f"similar ones: more than {APART}, and more than in the same seed before training. The "
        "worth of a head is the accuracy lost when it is silenced; heads are ranked on one half of "
        "the strings and measured on the other. One head as wide as the four is compared with "
        "them, trained alike. True if the mean over seeds is above 0 or above the stated value "
        "(t-tests, Holm).",
        checks=above_zero(cases, shown),
        tables=[
            markdown(("most similar heads", "apart"), [(k, shown(x)) for k, x in apart.items()]),
            markdown(("head", "points lost"), [(k, shown(x, ".1f")) for k, x in ranks.items()]),
        ],
        data=found | {"accuracy": accuracy},
    )
