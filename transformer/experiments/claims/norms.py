"""Layer normalisation: mean 0 and variance 1, the same scale at every layer, sooner there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from configs import base
from transformer.dropout import Training, streams
from transformer.experiments.claims import pictures
from transformer.experiments.claims.attention import model_of
from transformer.experiments.claims.page import Check, Claim, Setting, table
from transformer.experiments.claims.sweeps import (
    Race,
    bests,
    file_of,
    judge,
    rates_table,
    records,
    seconds_a_step,
)
from transformer.experiments.report import Record
from transformer.experiments.sweep import load_sweep
from transformer.model import Model, Params, relations
from transformer.normalization import BatchNorm, LayerNorm

FACTORS = (1.0, 2.0)  # of the weights, where scales are compared
EPSILON = base.get_config().model.norm_epsilon


def moments(setting: Setting, *, rows: int = 512, width: int = 64) -> Claim:
    """The mean and the variance of what a norm gives, whatever the weights before it."""
    inputs = jax.random.normal(jax.random.key(0), (rows // 8, 8, width))
    matrix = jax.random.normal(jax.random.key(1), (width, width)) * width**-0.5
    scales = [10.0**power for power in range(-4, 5)]
    layer, batch = LayerNorm(width, epsilon=EPSILON), BatchNorm(width, epsilon=EPSILON)
    batch.mean[...] = (inputs @ matrix).mean((0, 1))
    batch.variance[...] = (inputs @ matrix).var((0, 1))
    checks, variances = [], {"layer norm": [], "batch norm, averages of scale 1": []}
    for scale in scales:
        x = scale * (inputs @ matrix + 1.0)
        y = np.asarray(layer(x), np.float64)
        mean, variance = np.abs(y.mean(-1)).max(), y.var(-1)
        variances["layer norm"].append(float(variance.mean()))
        variances["batch norm, averages of scale 1"].append(float(batch(x).var(-1).mean()))
        checks.append(
            Check(
                f"weights × {scale:g}",
                f"means within ±{mean:.1g}; variance {variance.min():.4f} to {variance.max():.4f}",
                bool(mean < 1e-3 and np.abs(variance - 1.0).max() < 1e-2),
            )
        )
    others = inputs.at[1:].multiply(3.0)
    same = {
        name: bool((norm(inputs, training)[0] == norm(others, training)[0]).all())
        for name, norm, training in (
            ("layer", layer, None),
            ("batch", batch, in_training(inputs)),
        )
    }
    checks.append(
        Check(
            "one example's output, others of its batch changed",
            f"layer norm's is {'' if same['layer'] else 'not '}the same, bit for bit; "
            f"batch norm's in training is {'' if same['batch'] else 'not'}",
            same["layer"] and not same["batch"],
        )
    )
    pictures.lines(
        [
            pictures.Panel(
                "after the norm",
                "scale of the weights before it",
                "variance over the width",
                {name: (scales, values) for name, values in variances.items()},
            )
        ],
        setting.folder / "moments.png",
    )
    return Claim(
        title="Layer norm gives mean 0 and variance 1",
        says=(
            "Layer normalisation gives outputs of mean 0 and variance 1 whatever the weights, "
            "unlike batch normalisation."
        ),
        method=(
            f"{rows} vectors of width {width} through random weights of nine scales, with a mean "
            f"as large as their spread, then the norm (gain 1, bias 0, ε = {EPSILON:g}). True if "
            "no mean over the width is off 0 by 1e-3 and no variance off 1 by 1e-2. The picture "
            "has batch norm in use beside it, its running averages those of scale 1. ε keeps the "
            "division finite: where the variance comes near it, it shows."
        ),
        checks=checks,
        picture="moments.png",
        data={"scales": scales} | variances,
    )


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
    found: dict[str, list[float]] = {"stream": [], "read": []}
    for layer in module.encoder.layers:
        found["read"].append(rms(layer.residuals[0].input(x, None)))
        x = layer(x, related)
        found["stream"].append(rms(x))
    return found


def rms(x: Array) -> float:
    """Root mean square; in float64, for without norm it may be large."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def same_scale(setting: Setting, *, layers: int = 16, width: int = 64) -> Claim:
    """How activations grow through a deep stack before any training."""
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 3, 32)
    series: dict[tuple[str, str], dict[str, Any]] = {}
    checks = []
    for norm, placement in (
        ("layer", "post"),
        ("layer", "pre"),
        ("none", "pre"),
    ):
        model = model_of(
            32, layers=layers, width=width, ff_width=4 * width, norm=norm, norm_placement=placement
        )
        params = model.init(jax.random.key(1))
        for factor in FACTORS:
            larger = {
                name: factor * leaf if name.endswith("kernel") else leaf
                for name, leaf in params.items()
            }
            name = "no norm" if norm == "none" else f"{norm}, {placement}"
            found = scales_by_layer(model, larger, tokens)
            for what, values in found.items():
                series.setdefault((what, name), {})[f"{name}, weights × {factor:g}"] = values
    for what, words in (("read", "what sublayers read"), ("stream", "the residual stream")):
        for placement in ("post", "pre"):
            runs = series[what, f"layer, {placement}"]
            values = [value for each in runs.values() for value in each[what == "read" :]]
            grown = max(values) / min(values)
            none = [max(each) / min(each) for each in series[what, "no norm"].values()]
            checks.append(
                Check(
                    f"{words}, {placement}-norm",
                    f"largest scale {grown:.3g} times the smallest (without norm "
                    f"{none[0]:.3g} and, with larger weights, {none[1]:.3g})",
                    grown < 1.1,
                )
            )
    index = range(1, layers + 1)
    pictures.lines(
        [
            pictures.Panel(
                title,
                "layer",
                "root mean square",
                {
                    name: (index, values)
                    for (kind, _), runs in series.items()
                    if kind == what
                    for name, values in runs.items()
                },
                log="y",
            )
            for what, title in (("read", "what attention reads"), ("stream", "the residual stream"))
        ],
        setting.folder / "same_scale.png",
    )
    return Claim(
        title="The same scale at every layer",
        says="With layer normalisation the inputs of every layer have the same scale.",
        method=(
            f"An encoder of {layers} layers of width {width} before training, its weights as "
            "initialised and twice as large: the root mean square of what each layer's attention "
            "reads (from the second layer on: the first reads embeddings), and of the residual "
            "stream after it. True if the largest, over layers and weights, is less than 1.1 "
            "times the smallest."
        ),
        checks=checks,
        picture="same_scale.png",
        data={f"{what}: {name}": runs for (what, name), runs in series.items()},
    )


def convergence(setting: Setting, *, rounds: int = 5) -> Claim:
    """Layer norm against none and batch norm to the target, at two batch sizes."""
    names = ("convergence_4", "convergence_128")
    found = {name: records(setting, name) for name in names}
    steps: dict[str, Mapping[str, Sequence[float]]] = {}
    for name in names:
        variants = [best.variant for best in bests(found[name]).values()]
        steps[name] = seconds_a_step(
            load_sweep(file_of(name)), variants, setting.data_dir, rounds=rounds
        )
    return judge_convergence(setting, found, steps)


def judge_convergence(
    setting: Setting,
    found: Mapping[str, Mapping[str, list[Record]]],
    step_seconds: Mapping[str, Mapping[str, Sequence[float]]],
) -> Claim:
    """The same, from the records and each best variant's seconds a step."""
    races, panels, rows = [], [], []
    for sweep, each in found.items():
        best, batch = bests(each), f"batch {sweep.rpartition('_')[2]}"
        medians = {
            kind: float(np.median(step_seconds[sweep][b.variant])) for kind, b in best.items()
        }
        for kind in best:
            norm, depth = kind.split(", ")
            ours = f"layer, {depth}"
            if norm in ("none", "batch"):
                case = f"{batch}, {depth}, against {'no' if norm == 'none' else norm} norm"
                races.append(Race(case, best[ours], best[kind], medians[ours], medians[kind]))
        for depth in dict.fromkeys(kind.split(", ")[1] for kind in best):
            series = {}
            for kind, one in best.items():
                if kind.endswith(depth):
                    curves = np.array([[y for _, y in seed.curve] for seed in one.records])
                    series[f"{kind.split(', ')[0]}, {one.rate:g}"] = (
                        [x for x, _ in one.records[0].curve],
                        curves.mean(0),
                        curves.min(0),
                        curves.max(0),
                    )
            panels.append(
                pictures.Panel(
                    f"{batch}, {depth}", "step", "validation sequences right", series, ""
                )
            )
        rows += [(batch, *row) for row in rates_table(each)]
    pictures.lines(panels, setting.folder / "convergence.png")
    target = load_sweep(file_of(next(iter(found)))).target
    return Claim(
        title="Layer norm converges faster",
        says="With layer normalisation training converges faster than without, and than with batch "
        "normalisation.",
        method=(
            f"Pre-norm models trained on reverse until {target:.0%} of validation sequences are "
            "right, in batches of 4 and of 128, with 4 layers and with 1: "
            "`configs/ablations/convergence_4.py` and `convergence_128.py`. Every norm is taken at "
            "the best of its five learning rates. Seconds are steps times the median seconds a "
            "step, timed in turns. True if layer norm needs fewer at p ≤ 0.05 (paired t over "
            "seeds, Holm over all these cases), or if it arrives on every seed and the other does "
            "not. In the picture bands go from the lowest seed to the highest, and a norm's "
            "learning rate stands beside it."
        ),
        checks=judge(races),
        picture="convergence.png",
        tables=[
            table(("batch", "norm, layers, learning rate", "seeds that arrive", "steps", ""), rows)
        ],
        data={"seconds a step": step_seconds},
    )
