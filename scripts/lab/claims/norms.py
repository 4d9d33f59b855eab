"""Layer normalisation: mean 0 and variance 1, the same scale at every layer, sooner there."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lab.claims import pictures
from lab.claims.attention import model_of
from lab.claims.judging import (
    CHOOSING,
    Race,
    arrival,
    bests,
    judge,
    rates_table,
)
from lab.claims.page import Check, Claim, Setting, table
from lab.claims.sweeps import (
    curves,
    in_seconds,
    records,
    step_times,
    target_of,
    trained,
)
from lab.sweeps.report import Record
from transformer.config import default_config
from transformer.modules.dropout import Training, streams
from transformer.modules.model import Model, Params, relations
from transformer.modules.normalization import BatchNorm, LayerNorm

FACTORS = (1.0, 2.0)  # of the weights, where scales are compared
EPSILON = default_config().model.norm_epsilon


def moments(setting: Setting, *, rows: int = 512, width: int = 64) -> Claim:
    """The mean and the variance of what a norm gives, whatever the weights before it."""
    inputs = jax.random.normal(jax.random.key(0), (rows // 8, 8, width))
    matrix = jax.random.normal(jax.random.key(1), (width, width)) * width**-0.5
    uneven = matrix.at[0].multiply(1e3)  # one input outweighs all others
    layer, batch = LayerNorm(width, epsilon=EPSILON), BatchNorm(width, epsilon=EPSILON)
    weights = {f"weights × {10.0**power:g}": 10.0**power * matrix for power in range(-4, 5)}
    weights["one row of the weights × 1000"] = uneven
    checks, variances = [], []
    for name, each in weights.items():
        y = np.asarray(layer(stand_in(inputs, each)), np.float64)
        mean, variance = np.abs(y.mean(-1)).max(), y.var(-1)
        variances.append((variance.mean(), variance.min(), variance.max()))
        checks.append(
            Check(
                name,
                f"means within ±{mean:.1g}; variance {variance.min():.4f} to {variance.max():.4f}",
                bool(mean < 1e-3 and np.abs(variance - 1.0).max() < 1e-2),
            )
        )
    before = stand_in(inputs, matrix)
    seen = np.asarray(batch(before, in_training(before)), np.float64).var(-1)
    batch.mean[...], batch.variance[...] = before.mean((0, 1)), before.var((0, 1))
    in_use = [np.asarray(batch(stand_in(inputs, each))).var(-1) for each in weights.values()]
    others = inputs.at[1:].multiply(3.0)
    ours, theirs = (
        bool((norm(inputs, training)[0] == norm(others, training)[0]).all())
        for norm, training in ((layer, None), (batch, in_training(inputs)))
    )
    checks += [
        Check(
            "unlike batch norm in training",
            f"there the variance of a position over the width is {seen.min():.2f} to "
            f"{seen.max():.2f}",
            bool(np.abs(seen - 1.0).max() > 1e-2),
        ),
        Check(
            "unlike batch norm in use, weights × 10 since its averages",
            f"there that variance is {in_use[5].min():.0f} to {in_use[5].max():.0f}",
            bool(np.abs(in_use[5] - 1.0).max() > 1e-2),
        ),
        Check(
            "one example's output, others of its batch changed",
            f"layer norm's is {'the same, bit for bit' if ours else 'another'}; batch norm's in "
            f"training is {'the same' if theirs else 'another'}",
            ours and not theirs,
        ),
    ]
    scales, figures = [10.0**power for power in range(-4, 5)], np.array(variances[:-1]).T
    series = {
        "layer norm": (scales, *figures),
        "batch norm in use": (
            scales,
            *([getattr(each, f)() for each in in_use[:-1]] for f in ("mean", "min", "max")),
        ),
    }
    panel = pictures.Panel(
        "after the norm", "scale of the weights before it", "variance over the width", series
    )
    pictures.lines([panel], setting.folder / "moments.png")
    return Claim(
        name="moments",
        title="Mean 0 and variance 1",
        says=(
            "Layer normalisation gives outputs of mean 0 and variance 1 whatever the weights, "
            "unlike batch normalisation."
        ),
        method=(
            f"{rows} vectors of width {width} through random weights of nine scales, and of one "
            "uneven one, with a mean as large as their spread, then the norm (gain 1, bias 0, "
            f"ε = {EPSILON:g}). True if no mean over the width is off 0 by 1e-3 and no variance "
            "off 1 by 1e-2; ε keeps the division finite, and shows where the variance comes near "
            "it. Batch norm has its mean and variance over the batch instead; in use it has "
            "those that it saw before, here of weights × 1. Bands go from the lowest to the "
            "highest."
        ),
        checks=checks,
        data={"weights": list(weights), "variance: mean, lowest, highest": variances},
    )


def stand_in(inputs: Array, weights: Array) -> Array:
    """What a layer with these weights gives: a mean as large as its spread."""
    x = inputs @ weights
    return x + jnp.sqrt(x.var())


def in_training(x: Array) -> Training:
    """What a norm is told in training, where all of `x` is real."""
    training = Training(streams(jax.random.key(0)), 0.0, 0.0)
    return training.over(jnp.ones(x.shape[:-1], jnp.int32))


def scales_by_layer(model: Model, params: Params, tokens: Array) -> dict[str, list[float]]:
    """Root mean square of the encoder's stream after each layer and of what its attention reads."""
    module = model.bind(params)
    positions = jnp.arange(tokens.shape[1])[None]
    everywhere = jnp.ones((1, 1, tokens.shape[1], tokens.shape[1]), bool)
    related = relations(module.source_position, everywhere, positions, positions)
    x = module.source_position.embed(module.embedding(tokens), positions)
    found: dict[str, list[float]] = {"read": [], "stream": []}
    for layer in module.encoder.layers:
        found["read"].append(rms(layer.residuals[0].input(x, None)))
        x = layer(x, related)
        found["stream"].append(rms(x))
    return found


def rms(x: Array) -> float:
    """Root mean square; in float64, for without norm it may be large."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def same_scale(setting: Setting) -> Claim:
    """How activations grow through a deep stack, before and after training."""
    name = "convergence_128"
    best = bests(records(setting, name), target_of(name))["layer, 4 layers"]
    return judge_scales(setting, trained(setting, name, best.variant))


def judge_scales(
    setting: Setting,
    after: Sequence[tuple[Model, Params]],
    *,
    layers: int = 16,
    width: int = 64,
) -> Claim:
    """The same, from trained pre-norm models."""
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 3, 29)
    series: dict[str, dict[str, list[float]]] = {}
    for norm, placement in (("layer", "post"), ("layer", "pre"), ("none", "pre")):
        model = model_of(
            29, layers=layers, width=width, ff_width=4 * width, norm=norm, norm_placement=placement
        )
        params = model.init(jax.random.key(1))
        for factor in FACTORS:
            larger = {
                name: factor * leaf if name.endswith("kernel") else leaf
                for name, leaf in params.items()
            }
            name = "no norm" if norm == "none" else f"{placement}-norm"
            series[f"{name}, weights × {factor:g}"] = scales_by_layer(model, larger, tokens)

    def grown(values: Sequence[float]) -> float:
        return max(values) / min(values)

    kinds = {"read": "what attention reads", "stream": "the residual stream"}
    checks = []
    for what, words in kinds.items():
        without = [grown(found[what]) for name, found in series.items() if "no norm" in name]
        for placement in ("post-norm", "pre-norm"):
            runs = [found[what] for name, found in series.items() if placement in name]
            values = [value for each in runs for value in each[what == "read" :]]
            checks.append(
                Check(
                    f"{words}, {placement}",
                    f"largest {grown(values):.3g} times the smallest (without norm "
                    f"{without[0]:.3g} and, with larger weights, {without[1]:.3g})",
                    grown(values) < 1.1,
                )
            )
        if after:
            spread = [grown(scales_by_layer(*each, tokens)[what]) for each in after]
            checks.append(
                Check(
                    f"{words}, pre-norm, trained",
                    f"largest {min(spread):.3g} to {max(spread):.3g} times the smallest "
                    f"({len(after)} seeds)",
                    max(spread) < 1.1,
                )
            )
    index = range(1, layers + 1)
    panels = [
        pictures.Panel(
            title,
            "layer",
            "root mean square",
            {name: (index, found[what]) for name, found in series.items()},
            log="y",
        )
        for what, title in kinds.items()
    ]
    pictures.lines(panels, setting.folder / "same_scale.png")
    return Claim(
        name="same_scale",
        title="The scale of every layer",
        says="With layer normalisation the inputs of every layer have the same scale.",
        method=(
            f"An encoder of {layers} layers of width {width} before training, its weights as "
            "initialised and twice as large: the root mean square of what each layer's attention "
            "reads (from the second layer on: the first of post-norm reads embeddings), and of the "
            "residual stream after it. True if the largest, over layers and weights, is less than "
            "1.1 times the smallest. What a norm gives has that scale by construction as long as "
            "its gain is 1; so there are also the trained models of 4 layers of "
            "`configs/ablations/convergence_128.py`, whose gains have learned."
        ),
        checks=checks,
        data=series,
    )


def convergence(setting: Setting, *, processes: int = 5) -> Claim:
    """Layer norm against none and batch norm to the target, at two batch sizes."""
    found, times = {}, {}
    for name in ("convergence_4", "convergence_128"):
        found[name] = records(setting, name)
        variants = [each.variant for each in bests(found[name], target_of(name)).values()]
        times[name] = step_times(name, variants, setting.data_dir, processes)
    return judge_convergence(setting, found, times)


def judge_convergence(
    setting: Setting,
    found: Mapping[str, Mapping[str, list[Record]]],
    times: Mapping[str, Mapping[str, Sequence[float]]],
) -> Claim:
    """The same, from the records and each best variant's seconds a step."""
    races, panels, rows = [], [], []
    target = target_of(next(iter(found)))
    for sweep, each in found.items():
        best, batch = bests(each, target), f"batch {sweep.rpartition('_')[2]}"
        for kind, rival in best.items():
            norm, depth = kind.split(", ")
            if norm == "layer":
                continue
            ours = best[f"layer, {depth}"]
            ratio = np.log(times[sweep][rival.variant]) - np.log(times[sweep][ours.variant])
            case = f"{batch}, {depth}, against {'no' if norm == 'none' else norm} norm"
            races.append(Race(case, ours, rival, ratio.tolist()))
        for depth in dict.fromkeys(kind.split(", ")[1] for kind in best):
            chosen = {kind.split(", ")[0]: one for kind, one in best.items() if depth in kind}
            lines = {norm: curves(one.records) for norm, one in chosen.items()}
            seconds = {
                norm: in_seconds(lines[norm], times[sweep][one.variant])
                for norm, one in chosen.items()
            }
            title, y = f"{batch}, {depth}", "validation sequences right"
            panels.append(pictures.Panel(title, "step", y, lines, ""))
            panels.append(pictures.Panel(title, "seconds of training", y, seconds, ""))
        rows += [(batch, *row) for row in rates_table(each, target)]
    pictures.lines(panels, setting.folder / "convergence.png")
    columns = ("batch", "norm, layers, learning rate", "seeds that arrive", "steps", "")
    return Claim(
        name="convergence",
        title="Convergence with layer norm",
        says="With layer normalisation training converges faster than without, and than with batch "
        "normalisation.",
        method=(
            f"Pre-norm models trained on reverse until {target:.0%} of validation sequences are "
            "right, in batches of 4 and of 128, with 4 layers and with 1: "
            "`configs/ablations/convergence_4.py` and `convergence_128.py`. Every norm is taken at "
            f"the best of its five learning rates, chosen on {CHOOSING} seeds; the others put it "
            "to the test. A run arrives where its learning curve crosses the target, between "
            "evaluations; seconds are steps times those of a step, timed in turns in fresh "
            "processes. True if the logs of what the other norm needs and of what layer norm needs "
            "differ (paired t, Holm over all cases) in favour of layer norm. All clip gradients at "
            "a norm of 1. Batch norm sees later target positions in training and running averages "
            "in evaluation. Bands go from the lowest seed to the highest."
        ),
        checks=judge(races),
        tables=[table(columns, rows)],
        data={
            "seconds a step": times,
            "arrivals": {
                sweep: {
                    variant: [arrival(one, target) for one in each]
                    for variant, each in all_.items()
                }
                for sweep, all_ in found.items()
            },
        },
    )
