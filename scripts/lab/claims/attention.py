"""Masked attention does not see the future, masked values have no probability, heads differ."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lab.claims import pictures
from lab.claims.judging import above_zero, shown
from lab.claims.page import Check, Claim, Setting, table
from lab.claims.sweeps import records
from lab.sweeps.statistics import mean_interval
from transformer.config import default_config
from transformer.data.batches import Dataset
from transformer.data.load import open_corpus
from transformer.data.tokenizer import PAD
from transformer.inference import evaluation
from transformer.metrics import finalize
from transformer.modules import masking
from transformer.modules.config import ModelConfig
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.modules.model import Model, Params
from transformer.parallel.mesh import one_device_mesh
from transformer.training.metrics import by_replica
from transformer.training.step import stream
from transformer.training.trained import load
from transformer.training.workdir import Workdir

KINDS = {"encoder": "encoder", "decoder": "masked decoder", "cross": "cross"}
APART = 0.1  # total variation, beyond which the maps of two heads are said to differ
# Those that compute in float32, on any device. (What a kernel cannot take, it leaves to einsum.)
BACKENDS = {
    name: attend for name, attend in ATTENTION_BACKENDS.items() if name not in BFLOAT16_BACKENDS
}
SCALES = (1.0, 1e4)  # of scores: ordinary, and far beyond what an exponential can hold


def model_of(vocab_size: int, **changes: Any) -> Model:
    """The default model, narrow, but for some knobs."""
    config: Any = default_config().model
    config.update({"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "dropout_rate": 0.0})
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
    for backend in BACKENDS:
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
        name="causality",
        title="Masked attention",
        says="With masked multi-head attention an output depends on earlier outputs alone.",
        method=(
            "The gradient of every logit with respect to the embedded token of every target "
            f"position, through a whole model of 2 layers with random parameters ({seeds} seeds, "
            f"{length} positions, {later.sum()} pairs that look ahead). True if the largest "
            "magnitude of all that look ahead is exactly 0, and no other is."
        ),
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def probabilities(setting: Setting, *, length: int = 16, seeds: int = 5) -> Claim:
    """What attention gives to masked keys."""
    real = jnp.arange(length) < length - 5
    packed = jnp.where(real, 1 + jnp.arange(length) // 5, 0)[None]
    mask_of: dict[str, Bool[Array, "1 1 T S"]] = {
        "causal": masking.causal(length),
        "padding": jnp.broadcast_to(masking.padding(real[None]), (1, 1, length, length)),
        "causal, packed rows": masking.causal(length) & masking.segment(packed, packed),
    }
    # Values that are the unit vectors: what comes out is the probabilities themselves.
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
        sums, attends = found.sum(-1), allowed.any(-1)
        off = np.abs(sums - attends).max()  # a query that may attend to nothing gets zeros
        if scale == 1.0:
            drawn[name] = found[0, 0]
        checks.append(
            Check(
                f"{name} mask, backend {backend}, scores × {scale:g}",
                f"masked: {masked:g}; the others' sum is off 1 by {off:.1g}",
                bool(masked == 0.0 and off < 1e-5),
            )
        )
    pictures.maps(drawn, "key", "query", setting.folder / "probabilities.png")
    return Claim(
        name="probabilities",
        title="Probabilities of masked values",
        says="Masking sets illegal scores to -∞, so that their probability is zero.",
        method=(
            f"What every attention backend gives for random queries and keys (2 heads, {length} "
            f"positions, {seeds} seeds) where the values are unit vectors: the probabilities. True "
            "if the largest of a masked key is exactly 0 and those of each query add up to 1 "
            "within 1e-5; to 0 where a query may attend to nothing."
        ),
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def distance(maps: Float[np.ndarray, "B N T S"], real: Bool[np.ndarray, "B T"]) -> float:
    """How far the maps of the two heads are apart that are most alike, 0 to 1.

    Total variation, Σ|p - q| / 2, the mean over all queries that are tokens.
    """
    pairs = itertools.combinations(range(maps.shape[1]), 2)
    return float(min(np.abs(maps[:, i] - maps[:, j]).sum(-1)[real].mean() / 2 for i, j in pairs))


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
    return finalize(scores, "test")["test/sequence_accuracy"]


def heads(setting: Setting, *, examples: int = 1_000) -> Claim:
    """Whether heads look elsewhere, and what one is worth."""
    found = records(setting, "heads")
    accuracy = {name: [100 * each.accuracy for each in found[name]] for name in found}
    folder = setting.root / "heads" / "4_heads"
    return judge_heads(setting, measure_heads(folder, setting.data_dir, examples), accuracy)


class Heads(NamedTuple):
    """What the heads of a trained population are like, a value for each seed.

    trained, untrained: kind of attention → `distance` after training and before.
    lost: (kind, rank) → points of sequences right that are lost without that head; the rank
      is by the loss on one half of the examples, the value is of the other half.
    """

    trained: dict[str, list[float]]
    untrained: dict[str, list[float]]
    lost: dict[tuple[str, int], list[float]]


def measure_heads(folder: Path, data_dir: str | None, examples: int) -> Heads:
    """Of the population whose folder that is, on so many test strings."""
    run = load(Workdir(str(folder)), one_device_mesh())
    corpus = open_corpus(run.cfg.data, data_dir)
    data = corpus.load(run.cfg.data.test, run.cfg.batch_size).head(examples)
    half = examples // 2
    halves = data.head(half), Dataset(data.source[half:], data.target[half:], half)
    heads = Heads({kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}, {})
    for variables, seed in zip(
        by_replica(run.variables, run.cfg.replicas), np.atleast_1d(run.cfg.seeds()), strict=True
    ):
        variables = jax.tree.map(jnp.asarray, variables)
        fresh = run.model.init(stream(jnp.asarray(seed), "init"))  # what this very seed began with
        for into, each in ((heads.trained, variables), (heads.untrained, fresh)):
            for kind, apart in distances(run.model, each, halves[0]).items():
                into[kind].append(apart)
        whole = [right(run.model, variables, each) for each in halves]
        for kind in KINDS:
            costs = []
            for head in range(run.model.config.num_heads):
                silent = without_head(variables, kind, head)
                left = [right(run.model, silent, each) for each in halves]
                costs.append([100 * (a - b) for a, b in zip(whole, left, strict=True)])
            for rank, (_, cost) in enumerate(sorted(costs, reverse=True), 1):
                heads.lost.setdefault((kind, rank), []).append(cost)
    return heads


def judge_heads(setting: Setting, heads: Heads, accuracy: Mapping[str, Sequence[float]]) -> Claim:
    """The verdict on them, and on the accuracy (in %) by seed of models with other numbers."""
    single = [a - b for a, b in zip(accuracy["4 heads"], accuracy["1 head"], strict=True)]
    cases = {
        f"{name}: the two heads most alike are more than {APART} apart": [
            each - APART for each in heads.trained[kind]
        ]
        for kind, name in KINDS.items()
    }
    cases |= {
        f"{name}: they are further apart than before training": [
            a - b for a, b in zip(heads.trained[kind], heads.untrained[kind], strict=True)
        ]
        for kind, name in KINDS.items()
    }
    cases |= {
        f"{name}: points lost without its most useful head": heads.lost[kind, 1]
        for kind, name in KINDS.items()
    }
    cases["points lost with one head as wide as four"] = single
    ranks = {key: mean_interval(each) for key, each in heads.lost.items()}
    pictures.points(
        {
            "distance of the two heads most alike (total variation)": {
                f"{KINDS[kind]}, {when}": mean_interval(values[kind])
                for kind in KINDS
                for when, values in (("trained", heads.trained), ("untrained", heads.untrained))
            },
            "points of sequences right lost without that head": {
                f"{KINDS[kind]}, rank {rank}": each for (kind, rank), each in ranks.items()
            },
            "% of sequences right": {
                name: mean_interval(values) for name, values in accuracy.items()
            },
        },
        setting.folder / "heads.png",
    )
    apart = [
        (
            KINDS[kind],
            *(shown(mean_interval(each[kind])) for each in (heads.trained, heads.untrained)),
        )
        for kind in KINDS
    ]
    rows = [(KINDS[kind], str(rank), shown(each, ".1f")) for (kind, rank), each in ranks.items()]
    return Claim(
        name="heads",
        title="Several heads",
        says="Several heads attend in several ways at once; one head averages them.",
        method=(
            f"The {len(single)} trained seeds of 4 heads of `configs/ablations/heads.py`, on the "
            "test strings. How far the maps of two heads are apart is their total variation "
            "distance (the share of its weight that one gives to other keys), here of the two "
            f"that are most alike: more than {APART}, and further than in the same seed before "
            "training. What a head is worth is what the model loses when it is silent: heads are "
            "ranked on one half of the strings and measured on the other. And one head as wide as "
            "the four is compared with them, trained alike. True if the mean over seeds is above "
            "0, or above what is said (t-tests, Holm)."
        ),
        checks=above_zero(cases, shown),
        tables=[
            table(("attention", "two heads most alike are apart by", "before training"), apart),
            table(("attention", "rank", "points lost without that head"), rows),
        ],
        data={
            "trained": heads.trained,
            "untrained": heads.untrained,
            "lost": {f"{kind}, rank {rank}": each for (kind, rank), each in heads.lost.items()},
            "accuracy": accuracy,
        },
    )
