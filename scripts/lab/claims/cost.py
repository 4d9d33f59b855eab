"""What attention and recurrence cost: FLOPs, time, memory, sequential operations, use of cores."""

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab import plots
from lab.claims.claim import Check, Claim, Setting, above_zero, band, log_ratio, times
from lab.claims.learning import sweep_of
from lab.statistics import mean_interval
from lab.timing import in_process, interleaved
from transformer.config import load_config
from transformer.data.batches import make_batch
from transformer.loss import cross_entropy
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.cells import LSTM, run
from transformer.modules.config import ModelConfig
from transformer.modules.dot_product_attention import einsum
from transformer.modules.linear import INITIALIZERS
from transformer.modules.model import Model
from transformer.parallel.mesh import cpu_cores
from transformer.training.costs import matmul_flops

# Parts of a layer → the exponents of n and of d that the text gives.
PARTS = {"attention core": (2, 1), "attention projections": (1, 2), "recurrent layer": (1, 2)}
ROWS = 4  # sequences at a time
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # at width WIDTH
WIDTHS = (64, 128, 256, 512, 1024)  # at length LENGTH
WIDTH, LENGTH = 64, 256
TOLERANCE = {"FLOPs": 0.1, "time": 0.35, "memory": 0.2}
UNITS = {"FLOPs": "FLOPs", "time": "seconds", "memory": "bytes of temporaries"}
FITTED = 4  # largest sizes that exponents are fitted to: small ones are overhead
CROSSED = (64, 128, 256)  # widths at which attention and recurrence are compared
Size = tuple[str, int, int]  # part, n, d
Cost = Mapping[str, Sequence[float]]  # `UNITS` → one value, or for time one per round

KINDS = ("transformer", "lstm", "gru")  # of whole models
VOCABULARY, STRINGS = 32, 16
PROCESSES, ROUNDS = 5, 5  # fresh processes; timings in each
Seconds = dict[tuple[str, int, int | None], list[float]]  # kind, n, cores → one per process


def layer(part: str, n: int, d: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One of `PARTS`, or the whole attention layer: a float32 function and its arguments."""
    keys = jax.random.split(jax.random.key(0), 4)
    if part == "attention core":
        return einsum, tuple(jax.random.normal(k, (ROWS, 1, n, d)) for k in keys[:3])
    x, real = jax.random.normal(keys[0], (ROWS, n, d)), jnp.ones((ROWS, n), bool)
    if part == "recurrent layer":
        module = LSTM(d, d, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    else:
        init = INITIALIZERS["glorot_uniform"]
        module = MultiHeadAttention(1, d, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    structure, state = nnx.split(module)

    def call(state: Any, x: Any) -> Any:
        module: Any = nnx.merge(structure, state)
        if part == "recurrent layer":
            return run(module, x, real, reverse=False)
        if part == "attention layer":
            return module(x)
        query, (key, value) = module.project_query(x), module.project_kv(x)
        # The output projection reads the values in place of what the core would give.
        return query, key, module.out(value.swapaxes(1, 2))

    return call, (state, x)


def measure(sizes: Sequence[Size], rounds: int) -> dict[Size, Cost]:
    """The cost at all of the sizes: FLOPs, temporaries, time in turns."""
    found, calls = {}, {}
    for size in sizes:
        function, args = layer(*size)
        program: Any = jax.jit(function).lower(*args).compile()
        memory = float(program.memory_analysis().temp_size_in_bytes)
        flops = program.cost_analysis()["flops"]
        if size[0] == "recurrent layer":  # the compiler counts a loop once
            flops = matmul_flops(function, *args)
        found[size] = {"FLOPs": [float(flops)], "memory": [memory]}
        calls[size] = partial(program, *args)
    return {size: found[size] | {"time": each} for size, each in interleaved(calls, rounds).items()}


def trip_counts(program: str) -> list[int]:
    """The number of rounds of each loop in the HLO text of a compiled program, largest first."""
    loops = re.findall(r"^.* = .* while\(.*$", program, re.MULTILINE)
    counts = [re.search(r'"known_trip_count":\{"n":"(\d+)"', loop) for loop in loops]
    if None in counts:
        raise ValueError("a loop of the program has no known number of rounds")
    return sorted((int(count[1]) for count in counts if count), reverse=True)


def growth(setting: Setting, *, rounds: int = 9) -> Claim:
    """The exponents of FLOPs, time and memory."""
    sizes: dict[tuple[str, str], list[Size]] = {  # part and axis → those along it
        **{(part, "n"): [(part, n, WIDTH) for n in LENGTHS] for part in PARTS},
        **{(part, "d"): [(part, LENGTH, d) for d in WIDTHS] for part in PARTS},
    }
    found = measure(list(dict.fromkeys(itertools.chain(*sizes.values()))), rounds)
    checks, panels = [], []
    for quantity, unit in UNITS.items():
        for axis, x, fixed in (("n", LENGTHS, f"d = {WIDTH}"), ("d", WIDTHS, f"n = {LENGTH}")):
            series = {}
            for part, exponents in PARTS.items():
                values = [found[size][quantity] for size in sizes[part, axis]]
                series[part] = (x, *band(values))
                # Memory is claimed, and has one law, for the core alone: its n² probabilities.
                if quantity != "memory" or (part, axis) == ("attention core", "n"):
                    holds, text = exponent(x, values, exponents[axis == "d"], TOLERANCE[quantity])
                    checks.append(Check(f"{quantity} of the {part} against {axis}", text, holds))
            panels.append(plots.Panel(f"{quantity}, {fixed}", axis, unit, series, log="xy"))
    plots.lines(panels, setting.folder / "growth.png", columns=2)
    return Claim(
        title="Cost against length and width",
        says="A self-attention layer costs n²·d, a recurrent layer n·d².",
        method="The attention core (scores, softmax, weighted sum; one head), its four "
        f"projections, and an LSTM layer, forward, float32, {ROWS} sequences: n from {LENGTHS[0]} "
        f"to {LENGTHS[-1]} at d = {WIDTH}, d from {WIDTHS[0]} to {WIDTHS[-1]} at n = {LENGTH}. "
        "FLOPs and temporary memory are from the compiler. It counts a loop once, so FLOPs of the "
        "LSTM are of its matrix products. All sizes take turns in each round of timing. Exponents "
        f"are fitted to the {FITTED} largest sizes, for time in each round. True if within "
        f"{', '.join(f'{each} for {name}' for name, each in TOLERANCE.items())} of those expected, "
        "not if beyond, undecided if the interval lies across. Bands show all rounds.",
        checks=checks,
        data=_as_json(found),
    )


def exponent(
    x: Sequence[int], values: Sequence[Sequence[float]], expected: int, tolerance: float
) -> tuple[bool | None, str]:
    """Whether values [sizes, rounds] grow with the expected exponent of x, and the exponent."""
    fit = mean_interval(np.polyfit(np.log(x[-FITTED:]), np.log(values[-FITTED:]), 1)[0])
    low, high = (fit.low, fit.high) if fit.n > 1 else (fit.mean, fit.mean)
    inside = [abs(end - expected) <= tolerance for end in (low, high)]
    holds = True if all(inside) else None if any(inside) or low < expected < high else False
    return holds, f"exponent {fit.text()}, expected {expected}"


def meeting(setting: Setting, *, rounds: int = 9) -> Claim:
    """Whether attention is faster for n < d."""
    lengths = {d: [d // 4, d // 2, d, 2 * d, 4 * d, 8 * d] for d in CROSSED}
    parts = ("attention core", "attention layer", "recurrent layer")
    found = measure([(part, n, d) for part in parts for d in CROSSED for n in lengths[d]], rounds)
    cases, panels, crossings = {}, [], []
    for d, along in lengths.items():
        seconds = {part: [found[part, n, d]["time"] for n in along] for part in parts}
        for part in parts[:2]:
            for k, n in enumerate(along[:2]):  # those below d
                ratio = log_ratio(seconds["recurrent layer"][k], seconds[part][k])
                cases[f"{part}, d = {d}, n = {n}"] = ratio
            where = crossing(along, seconds[part], seconds["recurrent layer"])
            crossings.append(f"{where} ({part}, d = {d})")
        series = {part: (along, *band(each)) for part, each in seconds.items()}
        panels.append(plots.Panel(f"d = {d}", "n", "seconds", series, log="xy"))
    plots.lines(panels, setting.folder / "meeting.png")
    return Claim(
        title="Attention against recurrence around n = d",
        says="Self-attention layers are faster than recurrent ones when the length n is smaller "
        "than the width d.",
        method="The attention core alone, the whole attention layer with its projections, and an "
        f"LSTM layer, forward, float32, {ROWS} sequences, at widths "
        f"{', '.join(map(str, CROSSED))} and lengths from d/4 to 8 d, in turns. True if attention "
        "takes less time (t-test of the log ratios over rounds, Holm). By n²·d and n·d² "
        "both cost the same at n = d; by the exact products (4 n²·d for the core, 8 n·d² "
        "for the projections, 16 n·d² for an LSTM) at 4 d, and at 2 d for the whole layer. By the "
        f"median of the measured rounds attention costs more at n {', '.join(crossings)}.",
        checks=above_zero(cases, lambda each: f"{times(each)} as fast as the LSTM layer"),
        data=_as_json(found),
    )


def crossing(
    x: Sequence[int], ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> str:
    """Where `ours` costs more: `> 300`, interpolated; values are [sizes, rounds]."""
    behind = -np.median([log_ratio(*each) for each in zip(theirs, ours, strict=True)], axis=1)
    faster = np.flatnonzero(behind < 0.0)
    if not faster.size or (last := faster[-1]) == len(x) - 1:
        return f"> {x[-1]}" if faster.size else f"≥ {x[0]}"
    ends = slice(last, last + 2)
    return f"> {np.exp(np.interp(0.0, behind[ends], np.log(x[ends]))):.0f}"


def _as_json(found: Mapping[Size, Cost]) -> dict[str, Any]:
    return {f"{part}, n {n}, d {d}": dict(each) for (part, n, d), each in found.items()}


@cache
def model_of(kind: str) -> Model:
    """The model of one of `KINDS` in the sweep, all of about as many parameters."""
    sweep = sweep_of("recurrence")
    overrides = next(each for name, each in sweep.variants.items() if name.startswith(kind))
    config = load_config(sweep.config)
    config.update_from_flattened_dict({**sweep.overrides, **overrides, "model.max_length": 1024})
    return Model(ModelConfig(**config.model), VOCABULARY)


def gradient_call(kind: str, n: int) -> Callable[[], Any]:
    """The jit-compiled gradient of the loss on strings of n tokens, with its arguments."""
    model = model_of(kind)
    params, statistics = model.split(model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, STRINGS, n), 3, VOCABULARY)

    def loss(params: Any, batch: Any) -> Any:
        logits = model.bind(params | statistics)(**batch.inputs())
        return cross_entropy(logits, batch.target_out).nll.mean()

    return partial(jax.jit(jax.grad(loss)), params, make_batch(tokens[0], tokens[1]))


def compiled(kind: str, n: int) -> str:
    """The HLO text of the compiled gradient."""
    call: Any = gradient_call(kind, n)
    return str(call.func.lower(*call.args).compile().as_text())


def sequential(setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128)) -> Claim:
    """The rounds of the loops of the compiled training gradient."""
    checks, series, data = [], {}, {}
    for kind in KINDS:
        texts = [compiled(kind, n) for n in lengths]
        loops = [trip_counts(text) for text in texts]
        size = [len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.M)) for text in texts]
        if kind == "transformer":
            holds = not any(loops) and max(size) < 1.5 * min(size)
        else:
            holds = all(each and set(each) == {n} for n, each in zip(lengths, loops, strict=True))
        number = len(loops[-1])
        text = f"{number} loops, of n rounds each" if number and holds else f"{number} loops"
        text += f"; {size[0]} instructions at n = {lengths[0]}, {size[-1]} at n = {lengths[-1]}"
        checks.append(Check(kind, text, bool(holds)))
        data |= {kind: loops, f"{kind}, instructions": size}
        series[kind] = (lengths, [max(sum(each), 1) for each in loops])
    labels = "rounds of all loops", "n", "sequential rounds (1: no loop)"
    plots.lines([plots.Panel(*labels, series, log="xy")], setting.folder / "sequential.png")
    return Claim(
        title="Sequential operations",
        says="A recurrent layer needs as many sequential operations as there are tokens, "
        "self-attention a constant number.",
        method="The loops of the compiled gradient of the loss on strings of n tokens. True of a "
        "recurrent model if every loop runs n times; of the Transformer if there is no loop at any "
        "n, and none is unrolled: over all n the number of instructions grows by less than half.",
        checks=checks,
        data=data | {"lengths": list(lengths)},
    )


def gradient_seconds(lengths: Sequence[int]) -> dict[tuple[str, int], float]:
    """Median seconds of the gradient of each kind at each length, in turns."""
    calls = {(kind, n): gradient_call(kind, n) for kind in KINDS for n in lengths}
    return {each: float(np.median(found)) for each, found in interleaved(calls, ROUNDS).items()}


def in_processes(cores: Sequence[int | None], lengths: Sequence[int]) -> Seconds:
    """`gradient_seconds` on so many cores (None: all), in fresh processes that take turns."""
    found: Seconds = {}
    for _ in range(PROCESSES):
        for number in cores:
            for each, seconds in in_process(number, gradient_seconds, lengths).items():
                found.setdefault((*each, number), []).append(seconds)
    return found


def wall_time(setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128, 256)) -> Claim:
    """The time of a training gradient against the length."""
    found = in_processes([None], lengths)
    cases = {
        f"{kind}, n = {n}": log_ratio(found[kind, n, None], found["transformer", n, None])
        for kind in KINDS[1:]
        for n in lengths
    }
    series = {kind: (lengths, *band([found[kind, n, None] for n in lengths])) for kind in KINDS}
    panel = plots.Panel(f"gradient, {STRINGS} strings", "n", "seconds", series, log="xy")
    plots.lines([panel], setting.folder / "wall_time.png")
    return Claim(
        title="Time against recurrence",
        says="Recurrence is slower, since its steps follow one another.",
        method=f"The gradient of the loss on {STRINGS} strings of n tokens, models of about equal "
        "parameters, all cores, in turns in each of several fresh processes. True if the "
        "Transformer is faster (t-test of the log ratios over processes, Holm). The recurrent "
        "decoder has its attention inside its loop. Bands show all processes.",
        checks=above_zero(cases, lambda each: f"the Transformer is {times(each)} as fast"),
        data={f"{kind}, n {n}": each for (kind, n, _), each in found.items()},
    )


def parallel(setting: Setting, *, length: int = 64) -> Claim:
    """The speedup of each kind from more cores."""
    # Without processor affinity there is nothing to compare.
    available = cpu_cores() if hasattr(os, "sched_setaffinity") else 0
    numbers = [each for each in (1, 2, 4, 8, 16) if each <= available]
    found = in_processes(numbers, [length])
    gains = {
        kind: [log_ratio(found[kind, length, 1], found[kind, length, number]) for number in numbers]
        for kind in KINDS
    }
    cases = {
        f"{number} cores, against the {kind.upper()}": gains["transformer"][k] - gains[kind][k]
        for kind in KINDS[1:]
        for k, number in enumerate(numbers)
        if number > 1
    }
    if cases:
        series = {kind: (numbers, *band(np.exp(each))) for kind, each in gains.items()}
        panel = plots.Panel(f"n = {length}", "cores", "speedup over one core", series, log="x")
        plots.lines([panel], setting.folder / "parallel.png")
    return Claim(
        title="Gain from more cores",
        says="Recurrence leaves less to run in parallel.",
        method=f"The gradient of the loss on {STRINGS} strings of {length} tokens in fresh "
        "processes with one core or several, in turns. True if the Transformer gains more from the "
        "cores (t-test of the log ratio of the two gains over processes, Holm). Bands show all "
        "processes.",
        checks=above_zero(cases, lambda each: f"its gain is {times(each)} the other's"),
        data={f"{kind}, {number} cores": each for (kind, _, number), each in found.items()},
    )
