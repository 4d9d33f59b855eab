"""Races to a target accuracy: layer norm against other norms, attention against recurrence."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from lab import plots
from lab.claims.claim import Check, Claim, Setting, answer, log_ratio, shown, times
from lab.statistics import LEVEL, Difference, corrected, critical, mean_interval, paired, t_test
from lab.sweeps import runner
from lab.sweeps.report import CURVE, Record, Records, curve, read_all
from lab.sweeps.sweep import Program, Sweep, load_sweep, plan
from lab.timing import in_process, interleaved
from transformer.config import RunConfig
from transformer.run import Run

CHOOSING = 3  # seeds on which a learning rate is chosen; the others test it
STEPS, ROUNDS = 10, 5  # of training, in a timing; of timings, in a process
PROCESSES = 5  # fresh ones, each of which times the steps
REPLICAS = 8  # the default of scripts/sweep.py, so that both share runs


def sweep_of(name: str) -> Sweep:
    """A shipped sweep."""
    return load_sweep(str(runner.ROOT / "configs" / "ablations" / f"{name}.py"))


def records(setting: Setting, name: str) -> dict[str, list[Record]]:
    """Variant → records of a shipped sweep, which is run, or resumed, if it is not complete."""
    sweep, root = sweep_of(name), setting.root / name
    programs = plan(sweep, REPLICAS)
    runner.check(runner.run_all(programs, root, setting.data_dir, jobs=setting.jobs), root)
    return read_all(sweep, programs, root)


def seconds_per_step(name: str, variants: Sequence[str], data_dir: str | None) -> dict[str, float]:
    """Median seconds of a training step of each variant, as a single run on all cores, in turns."""
    sweep, calls = sweep_of(name), {}
    for variant in variants:
        overrides = {**sweep.overrides, **sweep.variants[variant]}
        config = Program(variant, sweep.config, overrides, ((variant, 0),)).resolved()
        run = Run(RunConfig.from_config_dict(config), data_dir=data_dir)
        with jax.set_mesh(run.mesh):
            states = [run.init(run.config.seeds(), run.config.hparams())]  # the newest
            sums, window = run.zero_sums(), run.feed.empty_window()
        calls[variant] = partial(_train, run, states, sums, window)
    found = interleaved(calls, ROUNDS)
    return {variant: float(np.median(each)) / STEPS for variant, each in found.items()}


def _train(run: Run, states: list[Any], sums: Any, window: Any) -> Any:
    with jax.set_mesh(run.mesh):
        state, found = run.train_steps(states.pop(), sums, window, np.int32(STEPS))
    states.append(state)
    return found


def step_times(name: str, variants: Sequence[str], data_dir: str | None) -> Mapping[str, Any]:
    """`seconds_per_step` in each of several fresh processes."""
    args = (None, seconds_per_step, name, variants, data_dir)
    found = [in_process(*args) for _ in range(PROCESSES)]
    return {variant: [each[variant] for each in found] for variant in variants}


def arrival(record: Record, target: float) -> float | None:
    """The step at which the learning curve crosses the target, interpolated, or None."""
    for (before, low), (step, high) in itertools.pairwise([(0, 0.0), *record.curve]):
        if high >= target:
            return before + (target - low) / (high - low) * (step - before)
    return None


@dataclass(frozen=True)
class Best:
    """A kind at the learning rate at which it reaches the target soonest."""

    variant: str
    rate: float
    at_end: bool  # whether the rate is the lowest or the highest of those tried
    records: Sequence[Record]  # of the seeds that it was not chosen on
    arrivals: Sequence[float | None]  # their steps to the target; None: not reached
    seconds: Sequence[float] = (1.0,)  # per step, of each process that measured them

    def log_steps(self) -> list[float]:
        """Logarithms of the arrivals, or of the last step: less than such a seed would need."""
        last = self.records[0].curve[-1][0]
        return [math.log(last if step is None else step) for step in self.arrivals]

    def text(self) -> str:
        """The mean of the arrivals, and how many there are if not all."""
        steps, number = [each for each in self.arrivals if each is not None], len(self.arrivals)
        if not steps:
            return f"none of {number} seeds"
        text = mean_interval(steps).text("{:.0f}".format)
        return text if len(steps) == number else f"{text} ({len(steps)} of {number} seeds)"


def bests(found: Records, target: float) -> dict[str, Best]:
    """Each kind of a sweep whose variants are called `kind, rate`, at its own best rate.

    The rate is the one at which most of the first `CHOOSING` seeds arrive; among those the one
    with the fewest steps or, if none arrives, the highest accuracy.
    """

    def order(variant: str) -> tuple[float, ...]:
        chosen = found[variant][:CHOOSING]
        steps = [step for each in chosen if (step := arrival(each, target)) is not None]
        accuracy = float(np.mean([each.outcomes["sequence_accuracy"] for each in chosen]))
        return -len(steps), float(np.mean(steps)) if steps else 0.0, -accuracy

    kinds: dict[str, dict[str, float]] = {}
    for variant in found:
        kind, _, rate = variant.rpartition(", ")
        kinds.setdefault(kind, {})[variant] = float(rate)
    best = {}
    for kind, rates in kinds.items():
        variant, ends = min(rates, key=order), (min(rates.values()), max(rates.values()))
        tested = found[variant][CHOOSING:]
        at_end = len(rates) > 1 and rates[variant] in ends
        arrivals = [arrival(each, target) for each in tested]
        best[kind] = Best(variant, rates[variant], at_end, tested, arrivals)
    return best


def timed_bests(setting: Setting, name: str) -> tuple[dict[str, Best], dict[str, Any]]:
    """The best of each kind with its seconds per step, and data for JSON."""
    found, target = records(setting, name), sweep_of(name).target
    best = bests(found, target)
    seconds = step_times(name, [each.variant for each in best.values()], setting.data_dir)
    best = {kind: replace(each, seconds=seconds[each.variant]) for kind, each in best.items()}
    arrivals = {k: [arrival(one, target) for one in each] for k, each in found.items()}
    return best, {"seconds per step": seconds, "arrivals": arrivals}


def in_steps(ours: Best, theirs: Best) -> Difference:
    """The test of log(their steps / ours), paired by seed."""
    return paired(theirs.log_steps(), ours.log_steps())


def in_seconds(ours: Best, theirs: Best) -> Difference:
    """The test of log(their seconds / ours): means and variances of steps and step times add."""
    terms = in_steps(ours, theirs), mean_interval(log_ratio(theirs.seconds, ours.seconds))
    errors = [(x.high - x.mean) / critical(x.n, LEVEL) if x.n > 1 else 0.0 for x in terms]
    return t_test(sum(each.mean for each in terms), math.hypot(*errors), terms[0].n)


def judge(races: Mapping[str, tuple[Best, Best]]) -> list[Check]:
    """Checks that the first of each pair arrives first, in steps and in seconds, after Holm.

    The winner must arrive on every seed. Nothing is decided if the loser's learning rate is at
    the end of those tried: another might have served it better.
    """
    units = {"steps": in_steps, "seconds": in_seconds}
    cases, checks = list(itertools.product(races, units)), []
    tests = corrected([units[unit](*races[case]) for case, unit in cases])
    for (case, unit), test in zip(cases, tests, strict=True):
        ours, theirs = races[case]
        holds = answer(test)
        winner, loser = (ours, theirs) if holds else (theirs, ours)
        if None in winner.arrivals:
            holds = None
        text = f"the other takes {times(test)} as {'many' if unit == 'steps' else 'long'}"
        text += shown(test, times)
        if unit == "steps":
            text = f"{ours.text()} against {theirs.text()}; {text}"
        if holds is not None and loser.at_end:
            text, holds = f"{text}; but {loser.rate:g} is the last learning rate tried", None
        checks.append(Check(f"{case}, {unit}", text, holds))
    return checks


def panels_of(title: str, best: Mapping[str, Best]) -> list[plots.Panel]:
    """Learning curves over steps and over seconds."""
    by_steps = {kind: curve(each.records) for kind, each in best.items()}
    by_time = {k: curve(each.records, float(np.median(each.seconds))) for k, each in best.items()}
    found = {"step": by_steps, "seconds of training": by_time}
    return [plots.Panel(title, x, **CURVE, series=series) for x, series in found.items()]


def method_text(sweep: str, ours: str) -> str:
    """How the races of a sweep are judged."""
    return f"""\
The target is a validation sequence accuracy of {sweep_of(sweep).target:.0%}. \
Each kind is taken at the best of the same five learning rates, chosen on {CHOOSING} seeds; the \
other seeds test it. A run arrives where its learning curve crosses the target, interpolated \
between evaluations; seconds are steps times the time of a step, measured in turns in fresh \
processes. A case is true if the logarithms of what the other kind and of what {ours} needs differ \
in favour of the latter (paired t-test, Holm over all cases). A loser whose best learning rate is \
at the end of those tried decides nothing. Bands go from the lowest to the highest seed."""


def convergence(setting: Setting, *, batches: Sequence[int] = (4, 128)) -> Claim:
    """Layer norm against none and batch norm to the target, at two batch sizes."""
    races, panels, data = {}, [], {}
    for size in batches:
        batch, name = f"batch {size}", f"convergence_{size}"
        best, data[name] = timed_bests(setting, name)
        depths: dict[str, dict[str, Best]] = {}
        for kind, rival in best.items():
            norm, depth = kind.split(", ")
            depths.setdefault(depth, {})[norm] = rival
            if norm != "layer":
                case = f"{batch}, {depth}, against {'no' if norm == 'none' else norm} norm"
                races[case] = best[f"layer, {depth}"], rival
        for depth, each in depths.items():
            panels += panels_of(f"{batch}, {depth}", each)
    plots.lines(panels, setting.folder / "convergence.png")
    return Claim(
        title="Convergence with layer norm",
        says="With layer normalisation training converges faster than without, and than with batch "
        "normalisation.",
        method="Pre-norm models with 4 layers and with 1, trained on reverse in batches of 4 and "
        "of 128: `configs/ablations/convergence_4.py` and `convergence_128.py`. "
        "All clip gradients at a norm of 1. Batch norm sees later target positions in "
        "training, and running averages in evaluation. "
        + method_text("convergence_4", "layer norm"),
        checks=judge(races),
        data=data,
    )


def learning(setting: Setting) -> Claim:
    """The Transformer against recurrent models to the target."""
    best, data = timed_bests(setting, "recurrence")
    rivals = {kind: each for kind, each in best.items() if kind != "transformer"}
    races = {f"against the {k.upper()}": (best["transformer"], x) for k, x in rivals.items()}
    plots.lines(panels_of("reverse", best), setting.folder / "learning.png")
    sizes = ", ".join(f"{kind} {each.records[0].parameters:,}" for kind, each in best.items())
    return Claim(
        title="Steps and seconds to learn",
        says="Recurrent networks need more steps to train.",
        method=f"Models of about equal parameters ({sizes}), trained on reverse: "
        "`configs/ablations/recurrence.py`. The recurrent decoder feeds its attended output back, "
        "as Luong et al. 2015 do, so attention is inside its loop. "
        + method_text("recurrence", "the Transformer"),
        checks=judge(races),
        data=data,
    )
