"""The cost of a layer against the sequence's length n and the width d: n²·d or n·d²."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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
Cost = Mapping[str, Sequence[float]]  # `UNITS` → one value, or for time one per round


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
        query, (key, value) = module.project_query(x), module.project_kv(x)
        # The output projection reads the values in place of what the core would give.
        return query, key, module.out(value.swapaxes(1, 2))

    return whole if part == "attention layer" else projections, (state, x)


def measure(sizes: Sequence[Size], rounds: int) -> dict[Size, Cost]:
    """The cost at all of the sizes, timed in turns; FLOPs and memory are the compiler's."""
    programs, calls = {}, {}
    for size in sizes:
        function, args = layer(*size)
        programs[size] = jax.jit(function).lower(*args).compile()
        calls[size] = partial(programs[size], *args)
    seconds = interleaved(calls, rounds)
    return {
        size: {
            "FLOPs": [compiled_flops(program, *size)],
            "memory": [float(program.memory_analysis().temp_size_in_bytes)],
            "time": seconds[size],
        }
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
                series[part] = (along, *band([cost[quantity] for cost in each]))
                # Memory is claimed, and has one law, for the core alone: its n² probabilities.
                if quantity != "memory" or (part, axis) == ("attention core", "n"):
                    name = f"{quantity} of the {part} against {axis}"
                    checks.append(exponent(name, along, each, quantity, exponents[axis == "d"]))
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


def exponent(
    name: str, along: Sequence[int], each: Sequence[Cost], quantity: str, expected: int
) -> Check:
    """Whether a quantity grows with the expected exponent."""
    values = zip(*(cost[quantity] for cost in each[-FITTED:]), strict=True)
    fit = mean_interval([slope(along[-FITTED:], y) for y in values])
    low, high = (fit.low, fit.high) if fit.n > 1 else (fit.mean, fit.mean)
    inside = [abs(end - expected) <= TOLERANCE[quantity] for end in (low, high)]
    across = any(inside) or low < expected < high
    holds = True if all(inside) else None if across else False
    text = shown(fit) if fit.n > 1 else f"{fit.mean:.2f}"
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
        costs = {k: [found[k, n, d] for n in along] for k in (*CONTENDERS, "recurrent layer")}
        series = {
            part: (along, *band([one["time"] for one in each])) for part, each in costs.items()
        }
        labels = f"d = {d}", "n", "seconds"
        panels.append(plots.Panel(*labels, series, log="xy", vertical={"n = d": d}))
        other = costs["recurrent layer"]
        for part in CONTENDERS:
            for n, ours, theirs in zip(along, costs[part], other, strict=True):
                if n < d:
                    ratio = log_ratio(theirs["time"], ours["time"])
                    cases[f"{part}, d = {d}, n = {n}"] = ratio
            flops, *_ = crossings(along, costs[part], other, "FLOPs")
            by_time = np.quantile(
                crossings(along, costs[part], other, "time"), [0.5, 0, 1], method="nearest"
            )
            rows.append((str(d), part, *(where(each, d) for each in (flops, *by_time))))
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


def crossings(
    x: Sequence[int], rising: Sequence[Cost], other: Sequence[Cost], quantity: str
) -> list[float]:
    """The x from which `rising` costs more than `other` for good, interpolated, of each round.

    0.0 if it does from the first x on, infinity if it does not at the last.
    """
    costs = [np.log([cost[quantity] for cost in each]) for each in (rising, other)]
    found = []
    for ahead in (costs[0] - costs[1]).T:
        below = np.flatnonzero(ahead < 0.0)
        if below.size == 0 or below[-1] == len(x) - 1:
            found.append(np.inf if below.size else 0.0)
        else:
            ends = slice(below[-1], below[-1] + 2)
            found.append(float(np.exp(np.interp(0.0, ahead[ends], np.log(x[ends])))))
    return found


def where(n: float, d: int) -> str:
    """A crossing in widths."""
    if n == 0.0:
        return f"below {lengths_around(d)[0] / d:g} d"
    return f"beyond {lengths_around(d)[-1] / d:g} d" if np.isinf(n) else f"{n / d:.1f} d"


def as_json(found: Mapping[Size, Cost]) -> dict[str, Any]:
    """Measurements for a JSON file."""
    return {f"{part}, n {n}, d {d}": dict(each) for (part, n, d), each in found.items()}
