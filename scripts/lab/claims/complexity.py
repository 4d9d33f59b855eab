"""The cost of a layer against the sequence's length n and the width d: n²·d or n·d²."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from flax import nnx

from lab import plots
from lab.claims.claim import Check, Claim, Setting, above_zero, band, log_ratio, shown, times
from lab.statistics import mean_interval
from lab.tables import markdown
from lab.timing import interleaved
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dot_product_attention import einsum_attention
from transformer.modules.linear import INITIALIZERS
from transformer.modules.recurrent import LSTM, run

ROWS = 4  # sequences at a time

# The exponents of n and of d that the text gives for each part of a layer.
PARTS = {"attention core": (2, 1), "attention projections": (1, 2), "recurrent layer": (1, 2)}
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # at width WIDTH
WIDTHS = (64, 128, 256, 512, 1024)  # at length LENGTH
WIDTH, LENGTH = 64, 256
TOLERANCE = {"FLOPs": 0.1, "time": 0.35, "memory": 0.2}
UNITS = {"FLOPs": "FLOPs", "time": "seconds", "memory": "bytes of temporaries"}
FITTED = 4  # largest sizes that exponents are fitted to: small ones are overhead

CROSSED = (64, 128, 256)  # widths at which attention and recurrence are compared
CONTENDERS = ("attention core", "attention layer")
Size = tuple[str, int, int]  # part, n, d


def layer(part: str, n: int, d: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A part at length n and width d as a function, float32 with one head, and its arguments.

    One of `PARTS`, or `attention layer`, which is the core with its projections.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    if part == "attention core":
        heads = tuple(jax.random.normal(key, (ROWS, 1, n, d)) for key in keys[:3])
        return einsum_attention, heads
    x, dtype = jax.random.normal(keys[0], (ROWS, n, d)), jnp.dtype("float32")
    if part == "recurrent layer":
        structure, state = nnx.split(LSTM(d, d, dtype=dtype, rngs=nnx.Rngs(0)))
        real = jnp.ones((ROWS, n), bool)
        return lambda s, x: run(nnx.merge(structure, s), x, real, reverse=False), (state, x)
    init = INITIALIZERS["glorot_uniform"]
    attention = MultiHeadAttention(1, d, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    structure, state = nnx.split(attention)

    def whole(state: Any, x: Any) -> Any:
        module = nnx.merge(structure, state)
        return module(x)

    def projections(state: Any, x: Any) -> Any:
        module = nnx.merge(structure, state)
        query, (key, value) = module.project(x, x, x)
        # The output projection reads the values in place of what the core would give.
        return query, key, module.out(value.swapaxes(1, 2))

    return whole if part == "attention layer" else projections, (state, x)


class Measured(NamedTuple):
    """The cost of a part at one size.

    flops: of the compiled program according to the compiler, loops counted as often as they run.
    memory: bytes of temporaries of the compiled program.
    seconds: in each round.
    """

    flops: float
    memory: float
    seconds: list[float]

    def of(self, quantity: str) -> float:
        """FLOPs, memory or median seconds."""
        values = {"FLOPs": self.flops, "memory": self.memory, "time": np.median(self.seconds)}
        return float(values[quantity])


def measure(sizes: Sequence[Size], rounds: int) -> dict[Size, Measured]:
    """The cost at all of the sizes, timed in turns."""
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
    """According to the compiler, which counts a loop's body once; the other rounds are added."""
    counted = float(program.cost_analysis()["flops"])
    if part != "recurrent layer":
        return counted
    (rounds,) = trip_counts(program.as_text())
    cell = LSTM(d, d, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    structure, weights = nnx.split(cell)
    step = jax.jit(lambda w, state, x: nnx.merge(structure, w).step(state, x))
    compiled = step.lower(weights, cell.start(ROWS), jnp.ones((ROWS, 4 * d))).compile()
    each: Any = compiled.cost_analysis()
    return counted + (rounds - 1) * float(each["flops"])


def trip_counts(program: str) -> list[int]:
    """The number of rounds of each loop in the HLO text of a compiled program, largest first.

    Raises:
      ValueError: the compiler does not know it for one of them.
    """
    loops = re.findall(r"^.* = .* while\(.*$", program, re.MULTILINE)
    counts = [re.search(r'"known_trip_count":\{"n":"(\d+)"', loop) for loop in loops]
    if None in counts:
        raise ValueError("a loop of the program has no known number of rounds")
    return sorted((int(count[1]) for count in counts if count), reverse=True)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of y ~ x^exponent, from a straight line through log y over log x."""
    fit: Any = scipy.stats.linregress(np.log(x), np.log(y))
    return float(fit.slope)


def growth_sizes() -> list[Size]:
    """Sizes along n, and along d."""
    sizes = [(part, n, WIDTH) for part in PARTS for n in LENGTHS]
    return list(dict.fromkeys(sizes + [(part, LENGTH, d) for part in PARTS for d in WIDTHS]))


def growth(setting: Setting, *, rounds: int = 9) -> Claim:
    """The exponents of FLOPs, time and memory."""
    found = measure(growth_sizes(), rounds)
    checks, panels = [], []
    for quantity, unit in UNITS.items():
        for axis, along in (("n", LENGTHS), ("d", WIDTHS)):
            series = {}
            for part, exponents in PARTS.items():
                sizes = [(part, *((x, WIDTH) if axis == "n" else (LENGTH, x))) for x in along]
                each = [found[size] for size in sizes]
                series[part] = line(along, each, quantity)
                # Memory is claimed, and has one law, for the core alone: its n² probabilities.
                if quantity != "memory" or (part, axis) == ("attention core", "n"):
                    name = f"{quantity} of the {part} against {axis}"
                    checks.append(exponent(name, quantity, along, each, exponents[axis == "d"]))
            fixed = f"d = {WIDTH}" if axis == "n" else f"n = {LENGTH}"
            panels.append(plots.Panel(f"{quantity}, {fixed}", axis, unit, series, log="xy"))
    plots.lines(panels, setting.folder / "growth.png", columns=2)
    return Claim(
        title="Cost against length and width",
        says="A self-attention layer costs n²·d, a recurrent layer n·d².",
        method="The attention core (scores, softmax, weighted sum; one head), its four "
        f"projections, and an LSTM layer, forward, float32, {ROWS} sequences: n from {LENGTHS[0]} "
        f"to {LENGTHS[-1]} at d = {WIDTH}, d from {WIDTHS[0]} to {WIDTHS[-1]} at n = {LENGTH}. "
        "FLOPs and temporary memory are the compiler's for the compiled program; times are of "
        f"rounds in which all sizes take turns. Exponents are fitted to the {FITTED} largest "
        f"sizes, for time in each round. True if within "
        f"{', '.join(f'{each} for {name}' for name, each in TOLERANCE.items())} of the text's, "
        "not if beyond, undecided if the interval lies across. (Softmax takes n² exponentials "
        "whatever d is, which the text leaves out.) Bands show all rounds.",
        checks=checks,
        data=as_json(found),
    )


def line(along: Sequence[int], each: Sequence[Measured], quantity: str) -> tuple:
    """One quantity of a part over its sizes, times with a band."""
    if quantity == "time":
        return along, *band([one.seconds for one in each])
    return along, [one.of(quantity) for one in each]


def exponent(
    name: str, quantity: str, along: Sequence[int], each: Sequence[Measured], expected: int
) -> Check:
    """Whether a quantity grows with the expected exponent."""
    x, each = along[-FITTED:], each[-FITTED:]
    if quantity == "time":
        fit = mean_interval([slope(x, y) for y in zip(*(one.seconds for one in each), strict=True)])
        low, high, text = fit.low, fit.high, shown(fit)
    else:
        low = high = slope(x, [one.of(quantity) for one in each])
        text = f"{low:.2f}"
    inside = [abs(end - expected) <= TOLERANCE[quantity] for end in (low, high)]
    across = any(inside) or low < expected < high
    holds = True if all(inside) else None if across else False
    return Check(name, f"exponent {text}, the text has {expected}", holds)


def lengths_around(d: int) -> list[int]:
    """Lengths from a quarter of the width to 8 times it."""
    return [d // 4, d // 2, d, 2 * d, 4 * d, 8 * d]


def meeting_sizes() -> list[Size]:
    """Attention and recurrence around n = d."""
    parts = (*CONTENDERS, "recurrent layer")
    return [(part, n, d) for part in parts for d in CROSSED for n in lengths_around(d)]


def meeting(setting: Setting, *, rounds: int = 9) -> Claim:
    """Whether attention is faster for n < d, and from which length it costs more."""
    found = measure(meeting_sizes(), rounds)
    cases, rows, panels = {}, [], []
    for d in CROSSED:
        along = lengths_around(d)
        costs = {
            part: [found[part, n, d] for n in along] for part in (*CONTENDERS, "recurrent layer")
        }
        series = {part: line(along, each, "time") for part, each in costs.items()}
        panels.append(
            plots.Panel(f"d = {d}", "n", "seconds", series, log="xy", vertical={"n = d": d})
        )
        other = costs["recurrent layer"]
        for part in CONTENDERS:
            for n, ours, theirs in zip(along, costs[part], other, strict=True):
                if n < d:
                    ratio = log_ratio(theirs.seconds, ours.seconds)
                    cases[f"{part}, d = {d}, n = {n}"] = ratio
            pairs = [
                [[one.seconds[k] for one in each] for each in (costs[part], other)]
                for k in range(len(other[0].seconds))
            ]
            crossings = [crossing(along, *pair) for pair in pairs]
            middle, low, high = (
                where(each, d) for each in np.quantile(crossings, [0.5, 0, 1], method="nearest")
            )
            flops = [[one.flops for one in each] for each in (costs[part], other)]
            rows.append((str(d), part, where(crossing(along, *flops), d), middle, low, high))
    plots.lines(panels, setting.folder / "meeting.png")
    columns = ("d", "attention", "by FLOPs", "by time: median round", "first", "last")
    return Claim(
        title="Attention against recurrence around n = d",
        says="Self-attention layers are faster than recurrent ones when the length n is smaller "
        "than the width d.",
        method="The attention core alone, the whole attention layer with its projections, and an "
        f"LSTM layer, forward, float32, {ROWS} sequences, at widths "
        f"{', '.join(map(str, CROSSED))} and lengths from d/4 to 8 d, in turns. True if attention "
        "takes less time (t-test of the log ratios over rounds, Holm). The table shows from which "
        "n attention costs more: n = d by the text's n²·d and n·d²; by the exact products (4 n²·d "
        "for the core, 8 n·d² for the projections, 16 n·d² for an LSTM) 4 d for the core and 2 d "
        "for the whole layer.",
        checks=above_zero(cases, lambda each: f"{times(each)} as fast as the LSTM layer"),
        tables=[markdown(columns, rows, align="llllll")],
        data=as_json(found),
    )


def crossing(x: Sequence[int], rising: Sequence[float], other: Sequence[float]) -> float:
    """The x from which `rising` exceeds `other` for good, interpolated between logarithms.

    0.0 if it does from the first x on, infinity if it does not at the last.
    """
    ahead = np.log(rising) - np.log(other)
    below = np.flatnonzero(ahead < 0.0)
    if below.size == 0:
        return 0.0
    i = below[-1]
    if i == len(x) - 1:
        return np.inf
    share = -ahead[i] / (ahead[i + 1] - ahead[i])
    return float(np.exp(np.log(x[i]) + share * (np.log(x[i + 1]) - np.log(x[i]))))


def where(n: float, d: int) -> str:
    """A crossing in widths."""
    if n == 0.0:
        return f"below {lengths_around(d)[0] / d:g} d"
    return f"beyond {lengths_around(d)[-1] / d:g} d" if np.isinf(n) else f"{n / d:.1f} d"


def as_json(found: Mapping[Size, Measured]) -> dict[str, Any]:
    """Measurements for a JSON file."""
    return {f"{part}, n {n}, d {d}": each._asdict() for (part, n, d), each in found.items()}
