"""Masked attention does not see the future, masked values have no probability, heads differ."""

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from configs import base
from transformer import evaluation, masking, sharding
from transformer.attention import ATTENTION_BACKENDS, attention_weights
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD
from transformer.experiments.claims import pictures
from transformer.experiments.claims.page import Check, Claim, Setting, table
from transformer.experiments.claims.sweeps import records
from transformer.experiments.report import Record
from transformer.experiments.statistics import Interval, holm, mean_interval, paired
from transformer.metrics import by_replica
from transformer.model import Model, ModelConfig, Params
from transformer.trained import load
from transformer.workdir import Workdir

KINDS = {"encoder": "encoder", "decoder": "masked decoder", "cross": "cross"}
SCALES = (1.0, 1e4)  # of scores: ordinary, and far beyond what an exponential can hold


def model_of(vocab_size: int, **changes: Any) -> Model:
    """The model of `configs/base.py`, narrow, but for some knobs."""
    config: Any = base.get_config().model
    config.update({"layers": 2, "width": 16, "heads": 2, "ff_width": 32, "dropout": 0.0})
    config.update(changes)
    return Model(ModelConfig(**config), vocab_size)


def dependence(backend: str, length: int, seed: int) -> Float[np.ndarray, "T T"]:
    """The largest |∂ logit at position t / ∂ embedding of the token at position u|.

    Through the whole of a model of two layers with random parameters. Each position has a token
    of its own and the target's table is nobody else's, so a row of that table is a position.
    """
    first = 3  # the tokens before it mean something
    model = model_of(first + length, attention_backend=backend, tie_embeddings=False)
    params = model.init(jax.random.key(seed))
    tokens = jnp.arange(first, first + length)[None]
    segments = jnp.ones_like(tokens)
    name = "target_embedding/table"
    assert name in params

    def logits(rows: Array) -> Array:
        table = params[name].at[first:].set(rows)
        return model.bind(params | {name: table})(tokens, segments, tokens, segments)[0]

    jacobian = jax.jit(jax.jacrev(logits))(params[name][first:])  # [T, V, T, D]
    return np.abs(np.asarray(jacobian)).max((1, 3))


def causality(setting: Setting, *, length: int = 12, seeds: int = 5) -> Claim:
    """∂ output / ∂ what comes later."""
    later = np.triu(np.ones((length, length), bool), 1)
    checks, drawn = [], {}
    for backend in ATTENTION_BACKENDS:
        found = np.max([dependence(backend, length, seed) for seed in range(seeds)], axis=0)
        drawn[f"|∂ logits / ∂ token|, {backend}"] = found
        largest, smallest = found[later].max(), found[~later].min()
        checks.append(
            Check(
                f"backend {backend}",
                f"later positions: {largest:g}; earlier and own: at least {smallest:.2g}",
                bool(largest == 0.0 and smallest > 0.0),
            )
        )
    pictures.maps(drawn, "input position", "output position", setting.folder / "causality.png")
    return Claim(
        title="Masked attention sees no future",
        says="With masked multi-head attention an output depends on earlier outputs alone.",
        method=(
            "The gradient of every logit with respect to the embedded token of every target "
            f"position, through a whole model of 2 layers with random parameters ({seeds} seeds, "
            f"{length} positions, {later.sum()} pairs that look ahead). True if the largest "
            "magnitude of all that look ahead is exactly 0, and no other is."
        ),
        checks=checks,
        picture="causality.png",
        data={name: found.tolist() for name, found in drawn.items()},
    )


def probabilities(setting: Setting, *, length: int = 16, seeds: int = 5) -> Claim:
    """What attention gives to masked keys."""
    real = jnp.arange(length) < length - 5
    mask_of: dict[str, Bool[Array, "1 1 T S"]] = {
        "causal": masking.causal(length),
        "padding": jnp.broadcast_to(masking.padding(real[None]), (1, 1, length, length)),
        "causal, packed rows": masking.causal(length)
        & masking.segment(*[jnp.where(real, 1 + jnp.arange(length) // 5, 0)[None]] * 2),
    }
    checks, drawn = [], {}
    for (name, mask), scale in itertools.product(mask_of.items(), SCALES):
        weights = []
        for seed in range(seeds):
            query, key = jax.random.normal(jax.random.key(seed), (2, 1, length, 2, 16))
            weights.append(attention_weights(scale * query, key, mask))
        found = np.asarray(jnp.concatenate(weights))
        allowed = np.broadcast_to(np.asarray(mask), found.shape)
        masked = found[~allowed].max()
        sums, attends = found.sum(-1), allowed.any(-1)
        off = np.abs(sums - attends).max()  # a query that may attend to nothing gets zeros
        if scale == 1.0:
            drawn[f"probabilities, {name}"] = found[0, 0]
        checks.append(
            Check(
                f"{name} mask, scores × {scale:g}",
                f"masked: {masked:g}; the others' sum is off 1 by {off:.1g}",
                bool(masked == 0.0 and off < 1e-5),
            )
        )
    pictures.maps(drawn, "key", "query", setting.folder / "probabilities.png")
    return Claim(
        title="Masked values have no probability",
        says="Masking sets illegal scores to -∞, so that their probability is zero.",
        method=(
            f"Attention weights of random queries and keys (2 heads, {length} positions, {seeds} "
            "seeds). True if the largest weight of a masked key is exactly 0 and the weights of "
            "each query add up to 1 within 1e-5; to 0 where a query may attend to nothing."
        ),
        checks=checks,
        picture="probabilities.png",
        data={name: found.tolist() for name, found in drawn.items()},
    )


def distance(maps: Float[np.ndarray, "B N T S"], real: Bool[np.ndarray, "B T"]) -> float:
    """How far the maps of two heads are apart, 0 to 1: total variation, Σ|p - q| / 2.

    The mean over all pairs of heads and all queries that are tokens.
    """
    pairs = itertools.combinations(range(maps.shape[1]), 2)
    apart = [np.abs(maps[:, i] - maps[:, j]).sum(-1)[real].mean() / 2 for i, j in pairs]
    return float(np.mean(apart))


def distances(model: Model, variables: Params, data: Dataset) -> dict[str, float]:
    """`distance` of each kind of attention, the mean over its layers."""
    maps = jax.device_get(jax.jit(partial(evaluation.attention_maps, model))(variables, data))
    queries = {"encoder": data.source, "decoder": data.target, "cross": data.target}
    return {
        kind: float(
            np.mean([distance(layer, np.asarray(queries[kind]) != PAD) for layer in maps[kind]])
        )
        for kind in KINDS
    }


def without_head(variables: Params, kind: str, head: int) -> Params:
    """The model with one head of one kind of attention silent in every layer."""
    module = {"encoder": "encoder/layers", "decoder": "decoder/layers", "cross": "decoder/layers"}
    attention = "cross_attention" if kind == "cross" else "self_attention"
    return {
        name: leaf.at[head].set(0.0)
        if name.startswith(module[kind]) and name.endswith(f"{attention}/out/kernel")
        else leaf
        for name, leaf in variables.items()
    }


def right(model: Model, variables: Params, data: Dataset) -> float:
    """The share of sequences that the model gets right."""
    scores = jax.jit(partial(evaluation.score, model))(variables, data)
    return scores.metrics("test")["test/sequence_accuracy"]


def heads(setting: Setting, *, examples: int = 500) -> Claim:
    """Whether heads look elsewhere, and what one is worth."""
    found = records(setting, "heads")
    return judge_heads(setting, found, setting.root / "heads" / "4_heads", examples)


def judge_heads(
    setting: Setting, found: Mapping[str, list[Record]], folder: Path, examples: int
) -> Claim:
    """The same, from the sweep's records and the folder of its 4 heads."""
    run = load(Workdir(str(folder)), sharding.one_device(), data_dir=setting.data_dir)
    data = run.corpus.load(run.cfg.data.test, run.cfg.batch_size).head(examples)
    trained, fresh, number = [], [], run.model.config.heads
    lost: dict[tuple[str, int], list[float]] = {}
    for k, variables in enumerate(by_replica(run.variables, run.cfg.replicas)):
        variables = jax.tree.map(jnp.asarray, variables)
        trained.append(distances(run.model, variables, data))
        start = run.model.init(jax.random.key(1_000 + k))
        fresh.append(distances(run.model, start, data))
        whole = right(run.model, variables, data)
        for kind in KINDS:
            silent = (without_head(variables, kind, head) for head in range(number))
            costs = sorted((whole - right(run.model, each, data) for each in silent), reverse=True)
            for rank, cost in enumerate(costs, 1):  # head 0 of one seed is not head 0 of another
                lost.setdefault((kind, rank), []).append(100 * cost)
    tests = {k: paired([t[k] for t in trained], [f[k] for f in fresh]) for k in KINDS}
    p = dict(zip(tests, holm([each.p for each in tests.values()]), strict=True))
    checks = [
        Check(
            f"maps of the {name} attention differ",
            f"apart by {shown(mean_interval([t[kind] for t in trained]))}, untrained "
            f"{shown(mean_interval([f[kind] for f in fresh]))} (p {p[kind]:.2g})",
            tests[kind].mean > 0.0 and p[kind] <= 0.05,
        )
        for kind, name in KINDS.items()
    ]
    accuracy = {name: [100 * each.accuracy for each in found[name]] for name in found}
    single = paired(accuracy["4 heads"], accuracy["1 head"])
    checks.append(
        Check(
            "one head as wide as four loses accuracy",
            f"{np.mean(accuracy['4 heads']):.1f}% with 4, {np.mean(accuracy['1 heads']):.1f}% "
            f"with 1: {shown(single)} points lost (p {single.p:.2g})",
            single.mean > 0.0 and single.p <= 0.05,
        )
    )
    cut = {key: mean_interval(each) for key, each in lost.items()}
    pictures.points(
        {
            "distance of the heads' maps (total variation)": {
                f"{KINDS[kind]}, {when}": mean_interval([each[kind] for each in values])
                for kind in KINDS
                for when, values in (("trained", trained), ("untrained", fresh))
            },
            "points of sequences right lost without that head": {
                f"{KINDS[kind]}, rank {rank}": each for (kind, rank), each in cut.items()
            },
        },
        setting.folder / "heads.png",
    )
    rows = [(KINDS[kind], str(rank), shown(each, ".1f")) for (kind, rank), each in cut.items()]
    return Claim(
        title="Heads attend differently",
        says="Several heads let the model attend in several ways at once; one head averages them.",
        method=(
            f"The {run.cfg.replicas} trained seeds of 4 heads of `configs/ablations/heads.py` on "
            f"{examples} test strings: the total variation distance between the maps of two "
            "heads, over all pairs and queries. True if it is larger than before training "
            "(paired t, Holm). And what one head as wide as the four comes to: true if it is "
            "worse (paired t). Below, the points of sequences right that a trained model loses "
            "when one of its heads is silent, heads ranked by it in each seed."
        ),
        checks=checks,
        picture="heads.png",
        tables=[table(("attention", "rank", "points lost without that head"), rows)],
        data={"trained": trained, "untrained": fresh, "accuracy": accuracy},
    )


def shown(interval: Interval | Any, figures: str = ".2f") -> str:
    """`0.52 [0.40, 0.64]`"""
    return f"{interval.mean:{figures}} [{interval.low:{figures}}, {interval.high:{figures}}]"
