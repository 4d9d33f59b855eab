"""What a layer costs against the sequence's length n and the width d: n²·d or n·d²."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.claims import pictures
from lab.claims.judging import above_zero, shown, times
from lab.claims.measuring import crossing, slope, trip_counts
from lab.claims.page import Check, Claim, Setting, table
from lab.sweeps.statistics import mean_interval
from lab.timing import interleaved
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dot_product_attention import einsum_attention
from transformer.modules.layers import INITIALIZERS
from transformer.modules.recurrent import LSTM, run

ROWS = 4  # sequences at a time

# What the text says that each part grows with: the exponents of n and of d.
PARTS = {
    "attention core": (2, 1),
    "attention projections": (1, 2),
    "recurrent layer": (1, 2),
}
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # at width WIDTH
WIDTHS = (64, 128, 256, 512, 1024)  # at length LENGTH
WIDTH, LENGTH = 64, 256
TOLERANCE = {"FLOPs": 0.1, "time": 0.35, "memory": 0.2}
FITTED = 4  # largest sizes that exponents are fitted to: small ones are overhead

CROSSED = (64, 128, 256)  # widths at which the meeting of attention and recurrence is looked for
CONTENDERS = ("attention core", "attention layer")


class Layer(NamedTuple):
    """A layer's part as a function, and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def layer(part: str, n: int, d: int) -> Layer:
    """A part at length n and width d, float32, with one head as wide as the layer.

    One of `PARTS`, or `attention layer`, the core with its projections.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    if part == "attention core":
        return Layer(
            einsum_attention, tuple(jax.random.normal(key, (ROWS, 1, n, d)) for key in keys[:3])
        )
    x = jax.random.normal(keys[0], (ROWS, n, d))
    rngs, dtype = nnx.Rngs(0), jnp.dtype("float32")
    if part == "recurrent layer":
        cell = LSTM(d, d, dtype=dtype, rngs=rngs)
        structure, state = nnx.split(cell)
        real = jnp.ones((ROWS, n), bool)
        return Layer(lambda s, x: run(nnx.merge(structure, s), x, real, reverse=False), (state, x))
    attention = MultiHeadAttention(
        d,
        1,
        d,
        value_width=d,
        kv_heads=1,
        use_bias=False,
        qk_norm=False,
        fused=False,
        init=INITIALIZERS["glorot_uniform"],
        backend="einsum",
        dtype=dtype,
        rngs=rngs,
    )
    structure, state = nnx.split(attention)

    def whole(state: Any, x: Any) -> Any:
        module = nnx.merge(structure, state)
        return module(*module.project_all(x))

    def projections(state: Any, x: Any) -> Any:
        module = nnx.merge(structure, state)
        query, (key, value) = module.project_all(x)
        # The output projection reads what the core would give: here the values themselves.
        return query, key, module.out(value.swapaxes(1, 2))

    return Layer(whole if part == "attention layer" else projections, (state, x))


class Measured(NamedTuple):
    """What a part came to at one size.

    flops: of the compiled program, by its compiler, loops as often as they run.
    memory: bytes of temporaries of the compiled program.
    seconds: in each round.
    """

    flops: float
    memory: float
    seconds: list[float]


Sizes = Mapping[tuple[str, int, int], Measured]


def measure(sizes: Sequence[tuple[str, int, int]], rounds: int) -> dict[Any, Measured]:
    """All of the sizes (part, n, d), timed in turns."""
    programs, calls = {}, {}
    for size in sizes:
        function, args = layer(*size)
        programs[size] = jax.jit(function).lower(*args).compile()
        calls[size] = partial(programs[size], *args)
    seconds = interleaved(calls, rounds)
    return {
        size: Measured(
            compiled_flops(program, *size),
            float(program.memory_analysis().temp_size_in_bytes),
            seconds[size],
        )
        for size, program in programs.items()
    }


def compiled_flops(program: Any, part: str, n: int, d: int) -> float:
    """By the compiler. It counts a loop's body once; the other rounds are counted as a step is."""
    counted = float(program.cost_analysis()["flops"])
    if part != "recurrent layer":
        return counted
    (rounds,) = trip_counts(program.as_text())
    cell = LSTM(d, d, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    structure, weights = nnx.split(cell)
    inputs = weights, cell.start(ROWS), jnp.ones((ROWS, 4 * d))
    step = jax.jit(lambda w, state, x: nnx.merge(structure, w).step(state, x))
    each: Any = step.lower(*inputs).compile().cost_analysis()
    return counted + (rounds - 1) * float(each["flops"])


def growth_sizes() -> list[tuple[str, int, int]]:
    """Against n, and against d."""
    sizes = [(part, n, WIDTH) for part in PARTS for n in LENGTHS]
    return list(dict.fromkeys(sizes + [(part, LENGTH, d) for part in PARTS for d in WIDTHS]))


def growth(setting: Setting, *, rounds: int = 9) -> Claim:
    """The exponents of FLOPs, time and memory."""
    return judge_growth(setting, measure(growth_sizes(), rounds))


def judge_growth(setting: Setting, found: Sizes) -> Claim:
    """The same, from the measurements."""
    units = {"FLOPs": "FLOPs", "time": "seconds", "memory": "bytes of temporaries"}
    checks, panels = [], []
    for quantity, unit in units.items():
        for axis, along in (("n", LENGTHS), ("d", WIDTHS)):
            series = {}
            for part, exponents in PARTS.items():
                each = [
                    found[(part, size, WIDTH) if axis == "n" else (part, LENGTH, size)]
                    for size in along
                ]
                series[part] = line(along, each, quantity)
                # Memory is claimed, and has one law, for the core alone: its n² probabilities.
                if quantity != "memory" or (part, axis) == ("attention core", "n"):
                    expected = exponents[axis == "d"]
                    name = f"{quantity} of the {part} against {axis}"
                    checks.append(exponent(name, quantity, along, each, expected))
            fixed = f"d = {WIDTH}" if axis == "n" else f"n = {LENGTH}"
            panels.append(pictures.Panel(f"{quantity}, {fixed}", axis, unit, series))
    pictures.lines(panels, setting.folder / "growth.png", columns=2)
    tolerances = ", ".join(f"{each} for {name}" for name, each in TOLERANCE.items())
    return Claim(
        name="growth",
        title="Cost against length and width",
        says="A self-attention layer costs n²·d, a recurrent layer n·d².",
        method=(
            f"The attention core (scores, softmax, weighted sum; one head), its four projections, "
            f"and an LSTM layer, forward, float32, {ROWS} sequences: n from {LENGTHS[0]} to "
            f"{LENGTHS[-1]} at d = {WIDTH}, d from {WIDTHS[0]} to {WIDTHS[-1]} at n = {LENGTH}. "
            "FLOPs and temporary memory are the compiler's for the compiled program (it counts the "
            "loop of the LSTM once; the other rounds are counted as a compiled step is), times are "
            f"of rounds in which all sizes take turns. Exponents are fitted to the {FITTED} "
            f"largest sizes, for time in each round. True if within {tolerances} of the text's, "
            "not if beyond, undecided if the interval lies across. (Softmax takes n² exponentials "
            "whatever d is, which the text leaves out.) In the picture bands go from the quickest "
            "round to the slowest."
        ),
        checks=checks,
        data=record(found),
    )


def line(along: Sequence[int], each: Sequence[Measured], quantity: str) -> tuple:
    """One quantity of a part over its sizes, times with a band."""
    if quantity == "time":
        seconds = np.array([one.seconds for one in each])
        return along, np.median(seconds, 1), seconds.min(1), seconds.max(1)
    return along, [one.flops if quantity == "FLOPs" else one.memory for one in each]


def exponent(
    name: str, quantity: str, along: Sequence[int], each: Sequence[Measured], expected: int
) -> Check:
    """Whether a quantity grows with the expected exponent."""
    x, each = along[-FITTED:], each[-FITTED:]
    if quantity == "time":
        fit = mean_interval([slope(x, y) for y in zip(*(one.seconds for one in each), strict=True)])
        text = shown(fit)
    else:
        fit = mean_interval([slope(x, line(x, each, quantity)[1])])
        text = f"{fit.mean:.2f}"
    low, high = (fit.low, fit.high) if fit.n > 1 else (fit.mean, fit.mean)
    inside = [abs(end - expected) <= TOLERANCE[quantity] for end in (low, high)]
    across = any(inside) or low < expected < high
    holds = True if all(inside) else None if across else False
    return Check(name, f"exponent {text}, the text has {expected}", holds)


def lengths_around(d: int) -> list[int]:
    """Lengths from a quarter of the width to 8 times it."""
    return [d // 4, d // 2, d, 2 * d, 4 * d, 8 * d]


def meeting_sizes() -> list[tuple[str, int, int]]:
    """Attention and recurrence around n = d."""
    parts = (*CONTENDERS, "recurrent layer")
    return [(part, n, d) for part in parts for d in CROSSED for n in lengths_around(d)]


def meeting(setting: Setting, *, rounds: int = 9) -> Claim:
    """Where attention begins to cost more than recurrence, and which is faster for n < d."""
    return judge_meeting(setting, measure(meeting_sizes(), rounds))


def judge_meeting(setting: Setting, found: Sizes) -> Claim:
    """The same, from the measurements."""
    cases, rows, panels = {}, [], []
    for d in CROSSED:
        along = lengths_around(d)
        by_part = {
            part: [found[part, n, d] for n in along] for part in (*CONTENDERS, "recurrent layer")
        }
        series = {part: line(along, each, "time") for part, each in by_part.items()}
        other = by_part["recurrent layer"]
        for part in CONTENDERS:
            for n, ours, theirs in zip(along, by_part[part], other, strict=True):
                if n < d:
                    ratio = np.log(theirs.seconds) - np.log(ours.seconds)
                    cases[f"{part}, d = {d}, n = {n}"] = ratio.tolist()
            flops = [[one.flops for one in each] for each in (by_part[part], other)]
            seconds = [np.array([one.seconds for one in each]).T for each in (by_part[part], other)]
            crossings = [crossing(along, *pair) for pair in zip(*seconds, strict=True)]
            low, middle, high = (
                where(each, d) for each in np.quantile(crossings, [0, 0.5, 1], method="nearest")
            )
            rows.append((str(d), part, where(crossing(along, *flops), d), middle, low, high))
        marks = {"n = d": d}
        panels.append(pictures.Panel(f"d = {d}", "n", "seconds", series, marks=marks))
    pictures.lines(panels, setting.folder / "meeting.png")
    columns = ("d", "attention", "by FLOPs", "by time: median round", "first", "last")
    return Claim(
        name="meeting",
        title="Attention against recurrence around n = d",
        says="Self-attention layers are faster than recurrent ones when the length n is smaller "
        "than the width d.",
        method=(
            "The attention core alone, the whole attention layer with its projections, and an LSTM "
            f"layer, forward, float32, {ROWS} sequences, at widths {', '.join(map(str, CROSSED))} "
            "and lengths from d/4 to 8 d, in turns. True if attention takes less time (t-test of "
            "the log ratios over rounds, Holm). The table says from which n attention costs more; "
            "by the text's n²·d and n·d² that would be n = d, by the exact products (4 n²·d for "
            "the core, 8 n·d² for the projections, 16 n·d² for an LSTM) 4 d for the core and 2 d "
            "for the whole layer."
        ),
        checks=above_zero(cases, lambda each: f"{times(each)} as fast as the LSTM layer"),
        tables=[table(columns, rows)],
        data=record(found),
    )


def where(n: float, d: int) -> str:
    """A crossing in widths."""
    if n == 0.0:
        return f"below {lengths_around(d)[0] / d:g} d"
    return f"beyond {lengths_around(d)[-1] / d:g} d" if np.isinf(n) else f"{n / d:.1f} d"


def record(found: Sizes) -> dict[str, Any]:
    """For JSON."""
    return {f"{part}, n {n}, d {d}": each._asdict() for (part, n, d), each in found.items()}
