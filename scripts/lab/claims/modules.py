"""What attention and layer norm do: masks, heads, the mean and variance of activations."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from lab import plots
from lab.claims.claim import Check, Claim, Setting, above_zero, band
from lab.claims.learning import REPLICAS, bests, records, sweep_of
from lab.statistics import Interval, mean_interval
from lab.sweeps.sweep import plan
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD
from transformer.inference import evaluation
from transformer.metrics import finalize
from transformer.modules import masking
from transformer.modules.config import ModelConfig
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.modules.model import Model, Params
from transformer.modules.normalization import BatchNorm, LayerNorm
from transformer.parallel.replicas import split_replicas
from transformer.run import Run
from transformer.training.step import stream

KINDS = {  # of attention maps → where its modules are
    "encoder": ("encoder/layers", "self_attention"),
    "decoder": ("decoder/layers", "self_attention"),
    "cross": ("decoder/layers", "cross_attention"),
}
APART = 0.1  # total variation beyond which the maps of two heads are said to differ
# Those that compute in float32 on any device; a kernel falls back to einsum where it cannot run.
BACKENDS = {
    name: attend for name, attend in ATTENTION_BACKENDS.items() if name not in BFLOAT16_BACKENDS
}
SCORES = (1.0, 1e4)  # scales of scores: ordinary, and far beyond the range of exp
SCALES = [10.0**power for power in range(-4, 5)]  # of the weights before a norm
EPSILON = ModelConfig().norm_epsilon


def model_of(vocab_size: int, **changes: Any) -> Model:
    """A narrow model, with some options changed."""
    options = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "dropout_rate": 0.0}
    return Model(ModelConfig(**options | changes), vocab_size)


def dependence(backend: str, length: int, seed: int) -> Float[np.ndarray, "T T"]:
    """The largest |∂ logit at position t / ∂ embedding of the token at position u|."""
    first = 3  # after the special tokens; a token per position, so that a row is a position
    model = model_of(first + length, attention_backend=backend, tie_embeddings="none")
    params = model.init(jax.random.key(seed))
    tokens = jnp.arange(first, first + length)[None]
    (name,) = (name for name in params if name.startswith("target_embedding/"))

    def logits(rows: Array) -> Array:
        return model.bind(params | {name: params[name].at[first:].set(rows)})(tokens, tokens)[0]

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
        f"position of a model with random parameters ({seeds} seeds, {length} positions). True if "
        f"those of the {later.sum()} later inputs are exactly 0, and no others are.",
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def probabilities(setting: Setting, *, length: int = 16, seeds: int = 5) -> Claim:
    """Attention probabilities of masked keys."""
    real = jnp.arange(length) < length - 5
    packed = jnp.where(real, 1 + jnp.arange(length) // 5, 0)[None]
    masks: dict[str, Bool[Array, "1 1 T S"]] = {
        "causal": masking.causal(length),
        "padding": jnp.broadcast_to(masking.padding(real[None]), (1, 1, length, length)),
        "causal, packed rows": masking.causal(length) & masking.segment(packed, packed),
    }
    # With unit vectors as values, the outputs are the probabilities.
    units = jnp.broadcast_to(jnp.eye(length), (1, 2, length, length))
    checks, drawn = [], {}
    for mask, backend, scale in itertools.product(masks, BACKENDS, SCORES):
        outputs = []
        for seed in range(seeds):
            query, key = jax.random.normal(jax.random.key(seed), (2, 1, 2, length, length))
            outputs.append(BACKENDS[backend](scale * query, key, units, masks[mask]))
        found = np.asarray(jnp.concatenate(outputs))
        allowed = np.broadcast_to(np.asarray(masks[mask]), found.shape)
        masked = np.abs(found[~allowed]).max()
        off = np.abs(found.sum(-1) - allowed.any(-1)).max()  # a fully masked query gets zeros
        if scale == 1.0:
            drawn[mask] = found[0, 0]
        case = f"{mask} mask, backend {backend}, scores × {scale:g}"
        text = f"masked: {masked:g}; the sum of the others is off 1 by {off:.1g}"
        checks.append(Check(case, text, bool(masked == 0.0 and off < 1e-5)))
    plots.maps(drawn, "key", "query", setting.folder / "probabilities.png")
    return Claim(
        title="Probabilities of masked values",
        says="Masking sets illegal scores to -∞, so that their probability is zero.",
        method=f"The output of every attention backend for random queries and keys (2 heads, "
        f"{length} positions, {seeds} seeds) with unit vectors as values: the probabilities. True "
        "if those of masked keys are exactly 0 and those of each query sum to 1 within 1e-5, or to "
        "0 where it may attend to nothing.",
        checks=checks,
        data={name: found.tolist() for name, found in drawn.items()},
    )


def distance(maps: Float[np.ndarray, "B N T S"], real: Bool[np.ndarray, "B T"]) -> float:
    """Total variation, Σ|p - q| / 2, of the two most similar heads; the mean over all tokens."""
    pairs = itertools.combinations(range(maps.shape[1]), 2)
    return float(min(np.abs(maps[:, i] - maps[:, j]).sum(-1)[real].mean() / 2 for i, j in pairs))


def without_head(variables: Params, kind: str, head: int) -> Params:
    """The variables with one head of one kind of attention silenced in every layer."""
    layers, attention = KINDS[kind]
    silenced = {
        name: leaf.at[head].set(0.0)
        for name, leaf in variables.items()
        if name.startswith(layers) and name.endswith(f"{attention}/out/kernel")
    }
    return variables | silenced


def measure_heads(folder: Path, data_dir: str | None, examples: int) -> dict[str, list[float]]:
    """Measurements of the heads of the population trained in a folder, a value for each seed.

    `encoder, trained` and `encoder, untrained` are the mean `distance` over layers; `encoder, lost`
    the points of accuracy lost without the head that is most useful to the other half of the data.
    """
    run = Run.saved(folder, data_dir=data_dir)
    model, config, state = run.model, run.config, run.restore()
    data, half = run.data["test"].head(examples), examples // 2
    halves = data.head(half), Dataset(data.source[half:], data.target[half:], half)
    score = jax.jit(partial(evaluation.score, model))
    attend = jax.jit(partial(evaluation.attention_maps, model))
    found: dict[str, list[float]] = defaultdict(list)

    def accuracies(variables: Params) -> np.ndarray:
        totals = (jax.device_get(score(variables, each)) for each in halves)
        return np.array([finalize(each, "test")["test/sequence_accuracy"] for each in totals])

    variables_of = split_replicas(state.variables(), config.replicas)
    for variables, seed in zip(variables_of, np.atleast_1d(config.seeds()), strict=True):
        trained = jax.tree.map(jnp.asarray, variables)
        initial, whole = model.init(stream(jnp.asarray(seed), "init")), accuracies(trained)
        for when, each in (("trained", trained), ("untrained", initial)):
            maps = jax.device_get(attend(each, halves[0]))
            for kind in KINDS:
                tokens = halves[0].source if kind == "encoder" else halves[0].target
                apart = [distance(layer, np.asarray(tokens) != PAD) for layer in maps[kind]]
                found[f"{kind}, {when}"].append(float(np.mean(apart)))
        for kind in KINDS:
            heads = range(model.config.num_heads)
            left = [accuracies(without_head(trained, kind, head)) for head in heads]
            _, lost = max((100 * (whole - each)).tolist() for each in left)
            found[f"{kind}, lost"].append(lost)
    return dict(found)


def heads(setting: Setting, *, examples: int = 1_000) -> Claim:
    """Whether heads attend differently, and what one is worth."""
    accuracy = {
        name: [100 * each.outcomes["sequence_accuracy"] for each in found]
        for name, found in records(setting, "heads").items()
    }
    found = measure_heads(setting.root / "heads" / "4_heads", setting.data_dir, examples)
    cases: dict[str, Any] = {}
    for kind in KINDS:
        trained, before = np.array(found[f"{kind}, trained"]), found[f"{kind}, untrained"]
        apart = f"{kind}: distance of the two most similar heads, minus"
        cases[f"{apart} {APART}"] = trained - APART
        cases[f"{apart} that before training"] = trained - before
        cases[f"{kind}: points lost without its most useful head"] = found[f"{kind}, lost"]
    whole = np.subtract(accuracy["4 heads"], accuracy["1 head"])
    cases["points lost with one head as wide as four"] = whole
    means = {name: mean_interval(each) for name, each in (found | accuracy).items()}
    panels = {
        "distance of the two most similar heads (total variation)": "trained",
        "points lost without the most useful head": "lost",
        "sequence accuracy, %": "head",
    }
    drawn = {x: {k: each for k, each in means.items() if word in k} for x, word in panels.items()}
    plots.intervals(drawn, setting.folder / "heads.png")
    return Claim(
        title="Several heads",
        says="Several heads attend in several ways at once; one head averages them.",
        method="The seeds with 4 heads of `configs/ablations/heads.py`, on test strings. The "
        "distance of two heads is the total variation of their attention, here of the two most "
        f"similar ones: more than {APART}, and more than before training. The worth of a head is "
        "the accuracy lost when it is silenced; the most useful one is chosen on one half of the "
        "strings and measured on the other. One head as wide as the four is trained alike. True "
        "if the mean over seeds is above 0 or the stated value (t-tests, Holm).",
        checks=above_zero(cases, Interval.text),
        data=found | {"accuracy": accuracy},
    )


def moments(setting: Setting, *, rows: int = 512, width: int = 64) -> Claim:
    """The mean and the variance of a norm's output for weights of several scales before it."""
    inputs = jax.random.normal(jax.random.key(0), (rows // 8, 8, width))
    matrix = jax.random.normal(jax.random.key(1), (width, width)) * width**-0.5
    options = {"epsilon": EPSILON, "rngs": nnx.Rngs(0)}
    layer, batch = LayerNorm(width, **options), BatchNorm(width, **options)
    weights = {f"weights × {scale:g}": scale * matrix for scale in SCALES}
    uneven = {"one row of the weights × 1000": matrix.at[0].multiply(1e3)}
    checks, series = [], {}
    for name, each in (weights | uneven).items():
        y = np.asarray(layer(projected(inputs, each)), np.float64)
        mean, variance = np.abs(y.mean(-1)).max(), y.var(-1)
        text = f"means within ±{mean:.1g}; variance {variance.min():.4f} to {variance.max():.4f}"
        checks.append(Check(name, text, bool(mean < 1e-3 and np.abs(variance - 1).max() < 1e-2)))
    before, others = projected(inputs, matrix), inputs.at[1:].multiply(3.0)
    outputs = {"in training": batch(before)}
    ours, theirs = (bool((norm(inputs)[0] == norm(others)[0]).all()) for norm in (layer, batch))
    batch.mean[...], batch.var[...] = before.mean((0, 1)), before.var((0, 1))
    batch.eval()
    after = batch(projected(inputs, 10.0 * matrix))
    outputs["in evaluation, weights × 10 since its averages"] = after
    for name, y in outputs.items():
        variance = np.asarray(y, np.float64).var(-1)
        text = f"its variance over the width is {variance.min():.2f} to {variance.max():.2f}"
        holds = bool(np.abs(variance - 1.0).max() > 1e-2)
        checks.append(Check(f"unlike batch norm {name}", text, holds))
    words = ["bit-identical" if same else "different" for same in (ours, theirs)]
    text = f"layer norm's is {words[0]}; batch norm's in training is {words[1]}"
    name = "one example's output, others of its batch changed"
    checks.append(Check(name, text, ours and not theirs))
    for name, norm in (("layer norm", layer), ("batch norm in evaluation", batch)):
        found = [np.var(norm(projected(inputs, each)), -1).ravel() for each in weights.values()]
        series[name] = (SCALES, *band(found))
    labels = "after the norm", "scale of the weights before it", "variance over the width"
    plots.lines([plots.Panel(*labels, series, log="xy")], setting.folder / "moments.png")
    return Claim(
        title="Mean 0 and variance 1",
        says="Layer normalisation gives outputs of mean 0 and variance 1 whatever the weights, "
        "unlike batch normalisation.",
        method=f"{rows} vectors of width {width} through random weights of nine scales and uneven "
        "ones, with a mean as large as their spread, then the norm (scale 1, bias 0, "
        f"ε = {EPSILON:g}). True if every mean over the width is within 1e-3 of 0 and every "
        "variance within 1e-2 of 1; ε shows where the variance is of its size. Batch norm "
        "normalises over the batch, and in evaluation by its running averages, here for "
        "weights × 1. Bands show all vectors.",
        checks=checks,
        data={name: np.array(each).tolist() for name, each in series.items()},
    )


def projected(inputs: Array, weights: Array) -> Array:
    """The output of a layer with these weights, with a mean as large as its spread."""
    x = inputs @ weights
    return x + jnp.sqrt(x.var())


def scales_by_layer(model: Model, params: Params, tokens: Array) -> dict[str, list[float]]:
    """Root mean squares of the inputs of the encoder's attention, and of its residual stream."""

    def rms(x: Array) -> float:  # in float64: without norm it may be large
        return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))

    module = model.bind(params)
    x = module.source_position(module.embed(tokens))
    found: dict[str, list[float]] = {"inputs": [], "stream": []}
    for layer in module.encoder.layers:
        attention = layer.residuals[0]
        found["inputs"].append(rms(x if attention.placement == "post" else attention.norm(x)))
        x = layer(x)
        found["stream"].append(rms(x))
    return found


def trained(setting: Setting) -> list[tuple[Model, Params]]:
    """The pre-norm models of 4 layers of the convergence sweep, at their best learning rate."""
    name, found = "convergence_128", []
    best = bests(records(setting, name), sweep_of(name).target)["layer, 4 layers"]
    for program in plan(sweep_of(name), REPLICAS):
        replicas = [k for k, (variant, _) in enumerate(program.members) if variant == best.variant]
        if replicas:
            run = Run.saved(setting.root / name / program.name)
            variables = split_replicas(run.restore().variables(), len(program.members))
            found += [(run.model, jax.tree.map(jnp.asarray, variables[k])) for k in replicas]
    return found


def _growth(values: Sequence[float]) -> float:
    return max(values) / min(values)


def same_scale(setting: Setting, *, layers: int = 16, width: int = 64) -> Claim:
    """How activations grow through a deep stack, before and after training."""
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 3, 29)
    series: dict[str, Mapping[str, Sequence[float]]] = {}
    sizes = {"num_layers": layers, "d_model": width, "d_ff": 4 * width}
    for norm, placement in (("layer", "post"), ("layer", "pre"), ("none", "pre")):
        model = model_of(29, norm=norm, norm_placement=placement, **sizes)
        params = model.init(jax.random.key(1))
        for factor in (1.0, 2.0):  # of the weights
            larger = {k: factor * v if k.endswith("kernel") else v for k, v in params.items()}
            name = "no norm" if norm == "none" else f"{placement}-norm"
            series[f"{name}, weights × {factor:g}"] = scales_by_layer(model, larger, tokens)
    after = [scales_by_layer(*each, tokens) for each in trained(setting)]
    checks, panels = [], []
    kinds = {"inputs": "the inputs of attention", "stream": "the residual stream"}
    for what, title in kinds.items():
        without = [f"{_growth(each[what]):.3g}" for k, each in series.items() if "no norm" in k]
        for placement in ("post-norm", "pre-norm"):
            runs = [each[what] for name, each in series.items() if placement in name]
            spread = _growth([value for each in runs for value in each[what == "inputs" :]])
            text = f"largest {spread:.3g} times the smallest (without norm {' and '.join(without)})"
            checks.append(Check(f"{title}, {placement}", text, spread < 1.1))
        grown = [_growth(each[what]) for each in after]
        spread = f"{min(grown):.3g} to {max(grown):.3g}"
        text = f"largest {spread} times the smallest ({len(after)} seeds)"
        checks.append(Check(f"{title}, pre-norm, trained", text, max(grown) < 1.1))
        lines = {name: (range(1, layers + 1), each[what]) for name, each in series.items()}
        panels.append(plots.Panel(title, "layer", "root mean square", lines, log="y"))
    plots.lines(panels, setting.folder / "same_scale.png")
    return Claim(
        title="The scale of every layer",
        says="With layer normalisation the inputs of every layer have the same scale.",
        method=f"The root mean square of the inputs of attention (from the second layer on: the "
        "first of post-norm reads embeddings) and of the residual stream, in an encoder of "
        f"{layers} layers of width {width}, with its initial weights and with weights twice as "
        "large. True if the largest, over layers and weights, is less than 1.1 times the smallest. "
        "A norm gives that by construction while its scale parameter is 1; therefore also in the "
        "trained models of 4 layers of `configs/ablations/convergence_128.py`.",
        checks=checks,
        data=series,
    )
