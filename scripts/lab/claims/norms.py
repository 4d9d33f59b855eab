"""Layer normalisation: mean 0 and variance 1, and the same scale at every layer."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lab import plots
from lab.claims.attention import model_of
from lab.claims.claim import Check, Claim, Setting, band
from lab.claims.learning import REPLICAS, bests, records, sweep_of
from lab.sweeps.sweep import plan
from transformer.config import default_config
from transformer.modules.linear import embed_scaled
from transformer.modules.model import Model, Params
from transformer.modules.normalization import BatchNorm, LayerNorm
from transformer.parallel.replicas import split_replicas
from transformer.run import Run

FACTORS = (1.0, 2.0)  # of the weights, where scales are compared
POWERS = range(-4, 5)  # of ten, of the weights before a norm
EPSILON = default_config().model.norm_epsilon


def moments(setting: Setting, *, rows: int = 512, width: int = 64) -> Claim:
    """The mean and the variance of a norm's output for weights of several scales before it."""
    inputs = jax.random.normal(jax.random.key(0), (rows // 8, 8, width))
    matrix = jax.random.normal(jax.random.key(1), (width, width)) * width**-0.5
    options = {"epsilon": EPSILON, "rngs": nnx.Rngs(0)}
    layer, batch = LayerNorm(width, **options), BatchNorm(width, **options)
    weights = {f"weights × {10.0**power:g}": 10.0**power * matrix for power in POWERS}
    uneven = {"one row of the weights × 1000": matrix.at[0].multiply(1e3)}
    checks, series = [], {}
    for name, each in (weights | uneven).items():
        y = np.asarray(layer(projected(inputs, each)), np.float64)
        mean, variance = np.abs(y.mean(-1)).max(), y.var(-1)
        text = f"means within ±{mean:.1g}; variance {variance.min():.4f} to {variance.max():.4f}"
        checks.append(Check(name, text, bool(mean < 1e-3 and np.abs(variance - 1).max() < 1e-2)))
    before = projected(inputs, matrix)
    training = np.asarray(batch(before), np.float64).var(-1)
    others = inputs.at[1:].multiply(3.0)
    ours, theirs = (bool((norm(inputs)[0] == norm(others)[0]).all()) for norm in (layer, batch))
    batch.mean[...], batch.var[...] = before.mean((0, 1)), before.var((0, 1))
    batch.eval()
    in_use = np.asarray(batch(projected(inputs, 10.0 * matrix)), np.float64).var(-1)
    for name, variance in (
        ("unlike batch norm in training", training),
        ("unlike batch norm in evaluation, weights × 10 since its averages", in_use),
    ):
        text = f"its variance over the width is {variance.min():.2f} to {variance.max():.2f}"
        checks.append(Check(name, text, bool(np.abs(variance - 1.0).max() > 1e-2)))
    text = (
        f"layer norm's is {'bit-identical' if ours else 'different'}; batch norm's in training is "
        f"{'identical' if theirs else 'different'}"
    )
    name = "one example's output, others of its batch changed"
    checks.append(Check(name, text, ours and not theirs))
    for name, norm in (("layer norm", layer), ("batch norm in evaluation", batch)):
        found = [np.var(norm(projected(inputs, each)), -1).ravel() for each in weights.values()]
        series[name] = ([10.0**power for power in POWERS], *band(found))
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
        "normalises over the batch instead, and in evaluation by its running averages, here for "
        "weights × 1. Bands go from the lowest to the highest.",
        checks=checks,
        data={name: np.array(each).tolist() for name, each in series.items()},
    )


def projected(inputs: Array, weights: Array) -> Array:
    """The output of a layer with these weights, with a mean as large as its spread."""
    x = inputs @ weights
    return x + jnp.sqrt(x.var())


def scales_by_layer(model: Model, params: Params, tokens: Array) -> dict[str, list[float]]:
    """Root mean squares of the encoder's residual stream after each layer, and of the inputs of
    its attention."""
    module = model.bind(params)
    x = module.source_position(embed_scaled(module.embedding, tokens))
    found: dict[str, list[float]] = {"inputs": [], "stream": []}
    for layer in module.encoder.layers:
        attention = layer.residuals[0]
        inputs = x if attention.placement == "post" else attention.norm(x)
        found["inputs"].append(rms(inputs))
        x = layer(x)
        found["stream"].append(rms(x))
    return found


def rms(x: Array) -> float:
    """Root mean square in float64: without norm it may be large."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


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


def growth(values: Sequence[float]) -> float:
    """The largest over the smallest."""
    return max(values) / min(values)


def same_scale(setting: Setting, *, layers: int = 16, width: int = 64) -> Claim:
    """How activations grow through a deep stack, before and after training."""
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 3, 29)
    series: dict[str, Mapping[str, Sequence[float]]] = {}
    sizes = {"num_layers": layers, "d_model": width, "d_ff": 4 * width}
    for norm, placement in (("layer", "post"), ("layer", "pre"), ("none", "pre")):
        model = model_of(29, norm=norm, norm_placement=placement, **sizes)
        params = model.init(jax.random.key(1))
        for factor in FACTORS:
            larger = {k: factor * v if k.endswith("kernel") else v for k, v in params.items()}
            name = "no norm" if norm == "none" else f"{placement}-norm"
            series[f"{name}, weights × {factor:g}"] = scales_by_layer(model, larger, tokens)
    after = [scales_by_layer(*each, tokens) for each in trained(setting)]
    checks = []
    kinds = {"inputs": "the inputs of attention", "stream": "the residual stream"}
    for what, words in kinds.items():
        without = [f"{growth(each[what]):.3g}" for k, each in series.items() if "no norm" in k]
        for placement in ("post-norm", "pre-norm"):
            runs = [each[what] for name, each in series.items() if placement in name]
            spread = growth([value for each in runs for value in each[what == "inputs" :]])
            text = f"largest {spread:.3g} times the smallest (without norm {' and '.join(without)})"
            checks.append(Check(f"{words}, {placement}", text, spread < 1.1))
        grown = [growth(each[what]) for each in after]
        text = f"largest {min(grown):.3g} to {max(grown):.3g} times the smallest"
        text += f" ({len(after)} seeds)"
        checks.append(Check(f"{words}, pre-norm, trained", text, max(grown) < 1.1))
    index = range(1, layers + 1)
    panels = []
    for what, title in kinds.items():
        lines = {name: (index, each[what]) for name, each in series.items()}
        panels.append(plots.Panel(title, "layer", "root mean square", lines, log="y"))
    plots.lines(panels, setting.folder / "same_scale.png")
    return Claim(
        title="The scale of every layer",
        says="With layer normalisation the inputs of every layer have the same scale.",
        method=f"The root mean square of the inputs of attention (from the second layer on: the "
        "first of post-norm reads embeddings) and of the residual stream, in an encoder of "
        f"{layers} layers of width {width}, with its initial weights and with weights twice as "
        "large. True if the largest, over layers and weights, is less than 1.1 times the smallest. "
        "The output of a norm has that scale by construction while its scale parameter is 1; so "
        "the trained models of 4 layers of `configs/ablations/convergence_128.py` are included.",
        checks=checks,
        data=series,
    )
