"""What a layer costs against the sequence's length n and the width d: n²·d or n·d²."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer.attention import MultiHeadAttention, einsum_attention
from transformer.experiments.claims import pictures
from transformer.experiments.claims.measuring import crossing, interleaved, slope, trip_counts
from transformer.experiments.claims.page import Check, Claim, Setting, table
from transformer.layers import INITIALIZERS
from transformer.recurrent import LSTM, run

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
CROSSED = (64, 128, 256)  # widths at which the meeting of attention and recurrence is looked for
TOLERANCE = {"FLOPs": 0.1, "time": 0.35, "memory": 0.2}
FITTED = 4  # largest sizes that the exponent of time is fitted to: small ones are overhead


class Layer(NamedTuple):
    """A layer's part as a function, and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def layer(part: str, n: int, d: int) -> Layer:
    """One of `PARTS` at length n and width d, float32, with one head as wide as the layer."""
    keys = jax.random.split(jax.random.key(0), 4)
    if part == "attention core":
        return Layer(
            einsum_attention, tuple(jax.random.normal(key, (ROWS, n, 1, d)) for key in keys[:3])
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
        init=INITIALIZERS["glorot_uniform"],
        backend="einsum",
        dtype=dtype,
        rngs=rngs,
    )
    structure, state = nnx.split(attention)

    def projections(state: Any, x: Any) -> Any:
        module = nnx.merge(structure, state)
        key_value = module.project(x)
        # The output projection reads what the core would give: here the values themselves.
        return module.query(x), key_value.key, module.out(key_value.value)

    return Layer(projections, (state, x))


class Measured(NamedTuple):
    """What a part came to at one size.

    flops: of the compiled program, by its compiler, loops as often as they run.
    memory: bytes of temporaries of the compiled program.
    seconds: in each round.
    """

    flops: float
    memory: float
    seconds: list[float]

    def median(self) -> float:
        return float(np.median(self.seconds))


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
    """By the compiler, which counts a loop's body once: what the other rounds add is added."""
    counted = float(program.cost_analysis()["flops"])
    if part != "recurrent layer":
        return counted
    (rounds,) = trip_counts(program.as_text())
    # A step's own product, h U, with its four parts.
    return counted + (rounds - 1) * 2 * ROWS * d * 4 * d


def all_sizes() -> list[tuple[str, int, int]]:
    """Against n, against d, and where attention and recurrence may meet."""
    sizes = [(part, n, WIDTH) for part in PARTS for n in LENGTHS]
    sizes += [(part, LENGTH, d) for part in PARTS for d in WIDTHS]
    meet = [(part, n, d) for part in PARTS for d in CROSSED for n in lengths_around(d)]
    return list(dict.fromkeys(sizes + meet))


def lengths_around(d: int) -> list[int]:
    """Lengths from a quarter of the width to 8 times it."""
    return [d // 4, d // 2, d, 2 * d, 4 * d, 8 * d]


def cost(setting: Setting, *, rounds: int = 7) -> list[Claim]:
    """The three claims about what a layer costs, from one set of measurements."""
    found = measure(all_sizes(), rounds)
    return [growth(setting, found), meeting(setting, found)]


def growth(setting: Setting, found: Sizes) -> Claim:
    """The exponents of FLOPs, time and memory."""
    values: dict[str, Callable[[Measured], float]] = {
        "FLOPs": lambda each: each.flops,
        "time": Measured.median,
        "memory": lambda each: each.memory,
    }
    checks, panels = [], []
    for quantity, value in values.items():
        for axis, along, where in (
            ("n", LENGTHS, lambda n: (n, WIDTH)),
            ("d", WIDTHS, lambda d: (LENGTH, d)),
        ):
            series = {}
            for part, exponents in PARTS.items():
                y = [value(found[part, *where(size)]) for size in along]
                series[part] = (along, y)
                # Memory is claimed, and has one law, for the core alone: its n² probabilities.
                if quantity == "memory" and (part, axis) != ("attention core", "n"):
                    continue
                fit = slope(along[-FITTED:], y[-FITTED:])
                expected = exponents[axis == "d"]
                checks.append(
                    Check(
                        f"{quantity} of the {part} against {axis}",
                        f"~ {axis}^{fit}, the text has {expected}",
                        abs(fit.exponent - expected) <= TOLERANCE[quantity],
                    )
                )
            units = {"FLOPs": "FLOPs", "time": "seconds", "memory": "bytes of temporaries"}
            fixed = f"d = {WIDTH}" if axis == "n" else f"n = {LENGTH}"
            panels.append(pictures.Panel(f"{quantity}, {fixed}", axis, units[quantity], series))
    pictures.lines(panels, setting.folder / "growth.png", columns=2)
    tolerances = ", ".join(f"{each} for {name}" for name, each in TOLERANCE.items())
    return Claim(
        title="Self-attention costs n²·d",
        says="A self-attention layer costs n²·d, a recurrent layer n·d².",
        method=(
            f"The attention core (scores, softmax, weighted sum; one head), its four projections, "
            f"and an LSTM layer, forward, float32, {ROWS} sequences: n from {LENGTHS[0]} to "
            f"{LENGTHS[-1]} at d = {WIDTH}, d from {WIDTHS[0]} to {WIDTHS[-1]} at n = {LENGTH}. "
            "FLOPs and temporary memory are the compiler's for the compiled program (it counts the "
            "loop of the LSTM once; the other rounds are added), time is the median of rounds in "
            f"which all sizes take turns. Exponents are fitted to the {FITTED} largest sizes. True "
            f"if within {tolerances} of the text's. (Softmax takes n² exponentials whatever d is, "
            "which the text leaves out.)"
        ),
        checks=checks,
        picture="growth.png",
        data=record(found),
    )


def meeting(setting: Setting, found: Sizes) -> Claim:
    """Where attention begins to cost more than recurrence, and which is faster for n < d."""

    def total(n: int, d: int, value: Callable[[Measured], float], *parts: str) -> float:
        return sum(value(found[part, n, d]) for part in parts)

    contenders = {
        "attention core": ("attention core",),
        "whole attention layer": ("attention core", "attention projections"),
    }
    values: dict[str, Callable[[Measured], float]] = {
        "FLOPs": lambda each: each.flops,
        "time": Measured.median,
    }
    checks, rows, panels = [], [], []
    for d in CROSSED:
        along = lengths_around(d)
        series = {}
        for quantity, value in values.items():
            other = [total(n, d, value, "recurrent layer") for n in along]
            for name, parts in contenders.items():
                rising = [total(n, d, value, *parts) for n in along]
                where = crossing(along, rising, other)
                text = (
                    f"n = {where / d:.1f} d"
                    if where
                    else f"not for n from {along[0]} to {along[-1]}"
                )
                rows.append((str(d), name, quantity, text))
                if quantity == "time":
                    series[name] = (along, rising)
                    gains = [b / a for n, a, b in zip(along, rising, other, strict=True) if n < d]
                    checks.append(
                        Check(
                            f"d = {d}, n < d, {name}",
                            f"{min(gains):.2g} to {max(gains):.2g} times as fast as the LSTM layer",
                            min(gains) > 1.0,
                        )
                    )
            if quantity == "time":
                series["LSTM layer"] = (along, other)
        panels.append(pictures.Panel(f"d = {d}", "n", "seconds", series, marks={"n = d": d}))
    pictures.lines(panels, setting.folder / "meeting.png")
    return Claim(
        title="Self-attention is the faster one where n < d",
        says="Self-attention layers are faster than recurrent ones when the length n is smaller "
        "than the width d.",
        method=(
            f"The same layers, forward, at widths {', '.join(map(str, CROSSED))} and lengths from "
            "d/4 to 8 d. True if attention takes less time at every length below d. The table says "
            "where it begins to cost more; by the text's n²·d and n·d² that would be at n = d, by "
            "its exact products (4 n²·d for the core, 8 n·d² for the projections, 16 n·d² for an "
            "LSTM) at 4 d for the core and at 2 d for the whole layer."
        ),
        checks=checks,
        picture="meeting.png",
        tables=[table(("d", "attention", "of", "costs more than the LSTM layer from"), rows)],
    )


def record(found: Sizes) -> dict[str, Any]:
    """For JSON."""
    return {
        f"{part}, n {n}, d {d}": {
            "flops": each.flops,
            "memory": each.memory,
            "seconds": each.seconds,
        }
        for (part, n, d), each in found.items()
    }
