"""Races to a target accuracy: layer norm against other norms, attention against recurrence."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lab import plots
from lab.claims.claim import Check, Claim, Setting, answer, log_ratio, shown, times
from lab.statistics import LEVEL, Difference, critical, holm, mean_interval, p_text, paired, t_test
from lab.sweeps import runner
from lab.sweeps.records import Record, curve, read_all
from lab.sweeps.report import learning_panel
from lab.sweeps.sweep import Program, Sweep, load_sweep, plan
from lab.tables import markdown
from lab.timing import in_process, interleaved
from transformer.config import RunConfig
from transformer.errors import UserError
from transformer.run import Run

CHOOSING = 3  # seeds on which a learning rate is chosen; the others test it
STEPS, ROUNDS = 10, 5  # of training, in a timing; of timings, in a process
REPLICAS = 8  # the default of scripts/sweep.py, so that both share runs

Records = Mapping[str, Sequence[Record]]
METHOD = """\
Each kind is taken at the best of the same five learning rates, chosen on {choosing} seeds; the \
other seeds test it. A run arrives where its learning curve crosses the target, interpolated \
between evaluations; seconds are steps times the time of a step, measured in turns in fresh \
processes. A case is true if the logarithms of what the other kind and of what {ours} needs differ \
in favour of the latter (paired t-test, Holm over all cases). A loser whose best learning rate is \
at the end of those tried decides nothing. Bands go from the lowest to the highest seed."""


def sweep_of(name: str) -> Sweep:
    """A shipped sweep."""
    return load_sweep(str(runner.ROOT / "configs" / "ablations" / f"{name}.py"))


def records(setting: Setting, name: str) -> dict[str, list[Record]]:
    """Variant → records of a shipped sweep, which is run, or resumed, if it is not complete.

    Raises:
      UserError: a program failed.
    """
    sweep, root = sweep_of(name), setting.root / name
    programs = plan(sweep, REPLICAS)
    failures = runner.run_all(programs, root, setting.data_dir, jobs=setting.jobs)
    if failures:
        raise UserError(
            f"programs of the sweep {name} failed: {', '.join(failures)}; see log.txt in their "
            f"folders under {root}, and give the command again"
        )
    return read_all(sweep, programs, root)


def seconds_per_step(name: str, variants: Sequence[str], data_dir: str | None) -> dict[str, float]:
    """Median seconds of a training step of each variant, as a single run on all cores, in turns."""
    sweep = sweep_of(name)
    calls = {variant: trainer(sweep, variant, data_dir) for variant in variants}
    found = interleaved(calls, ROUNDS)
    return {variant: float(np.median(each)) / STEPS for variant, each in found.items()}


def trainer(sweep: Sweep, variant: str, data_dir: str | None) -> Callable[[], Any]:
    """A call that takes `STEPS` training steps of a variant."""
    overrides = {**sweep.overrides, **sweep.variants[variant]}
    config = Program(variant, sweep.config, overrides, ((variant, 0),)).resolved()
    run = Run(RunConfig.from_config_dict(config), data_dir=data_dir)
    state = run.initial_state()

    def call() -> Any:
        nonlocal state
        with jax.set_mesh(run.mesh):
            state, sums = run.train_steps(
                state, run.zero_sums(), run.feed.empty_window(), np.int32(STEPS)
            )
        return sums

    return call


def step_times(
    setting: Setting, name: str, variants: Sequence[str], processes: int
) -> dict[str, list[float]]:
    """`seconds_per_step` in each of several fresh processes."""
    args = (name, variants, setting.data_dir)
    found = [in_process(None, seconds_per_step, *args) for _ in range(processes)]
    return {variant: [each[variant] for each in found] for variant in variants}


def arrival(record: Record, target: float) -> float | None:
    """The step at which the learning curve crosses the target, interpolated, or None."""
    before = (0, 0.0)
    for step, accuracy in record.curve:
        if accuracy >= target:
            share = (target - before[1]) / (accuracy - before[1])
            return before[0] + share * (step - before[0])
        before = (step, accuracy)
    return None


@dataclass(frozen=True)
class Best:
    """A kind at the learning rate at which it reaches the target soonest.

    at_end: whether it is the lowest or the highest of those tried.
    records: the seeds that it was not chosen on.
    arrivals: the step at which each of them reaches the target; None: it does not.
    """

    variant: str
    rate: float
    at_end: bool
    records: Sequence[Record]
    arrivals: Sequence[float | None]

    @property
    def arrived(self) -> list[float]:
        """The arrivals of the seeds that reach the target."""
        return [step for step in self.arrivals if step is not None]

    @property
    def log_steps(self) -> list[float]:
        """Logarithms of the arrivals, or of the last step: less than such a seed would need."""
        last = self.records[0].curve[-1][0]
        return [math.log(last if step is None else step) for step in self.arrivals]

    def text(self) -> str:
        """The mean of the arrivals, and how many there are if not all."""
        steps, number = self.arrived, len(self.arrivals)
        if not steps:
            return f"none of {number} seeds"
        text = shown(mean_interval(steps), ".0f") if len(steps) > 1 else f"{steps[0]:.0f}"
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
        return (-len(steps), float(np.mean(steps)) if steps else 0.0, -accuracy)

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


@dataclass(frozen=True)
class Race:
    """One kind against another to the target.

    step_times: log(their seconds per step / ours), of each process that measured them.
    """

    case: str
    ours: Best
    theirs: Best
    step_times: Sequence[float]

    def in_steps(self) -> Difference:
        """The test of log(their steps / ours), paired by seed."""
        return paired(self.theirs.log_steps, self.ours.log_steps)

    def in_seconds(self) -> Difference:
        """The test of log(their seconds / ours): means and variances of steps and times add."""
        steps, time = self.in_steps(), mean_interval(self.step_times)
        errors = [
            (each.high - each.mean) / critical(each.n, LEVEL) if each.n > 1 else 0.0
            for each in (steps, time)
        ]
        return t_test(steps.mean + time.mean, float(math.hypot(*errors)), steps.n)


def judge(races: Sequence[Race]) -> list[Check]:
    """Checks that ours arrives first, in steps and in seconds, corrected by Holm for all of them.

    The winner must arrive on every seed. Nothing is decided if the loser's learning rate is at
    the end of those tried: another might have served it better.
    """
    tests = [
        (race, unit, test)
        for race in races
        for unit, test in (("steps", race.in_steps()), ("seconds", race.in_seconds()))
    ]
    checks, adjusted = [], holm([test.p for _, _, test in tests])
    for (race, unit, test), p in zip(tests, adjusted, strict=True):
        holds = answer(test.mean, p)
        winner, loser = (race.ours, race.theirs) if holds else (race.theirs, race.ours)
        if None in winner.arrivals:
            holds = None
        text = f"the other takes {times(test)} as {'many' if unit == 'steps' else 'long'}"
        text += f" ({p_text(p)})"
        if unit == "steps":
            text = f"{race.ours.text()} against {race.theirs.text()}; {text}"
        if holds is not None and loser.at_end:
            text, holds = f"{text}; but {loser.rate:g} is the last learning rate tried", None
        checks.append(Check(f"{race.case}, {unit}", text, holds))
    return checks


def rates_rows(found: Records, target: float) -> list[tuple[str, ...]]:
    """Rows (variant, seeds that arrive, mean steps, whether best) of every rate tried."""
    best = {each.variant for each in bests(found, target).values()}
    rows = []
    for variant, each in arrivals_of(found, target).items():
        steps = [step for step in each if step is not None]
        mean = f"{np.mean(steps):,.0f}" if steps else ""
        rows.append((variant, f"{len(steps)}/{len(each)}", mean, "best" * (variant in best)))
    return rows


def panels_of(
    title: str, best: Mapping[str, Best], seconds: Mapping[str, Sequence[float]]
) -> list[plots.Panel]:
    """Learning curves over steps and over seconds."""
    by_steps = {kind: curve(each.records) for kind, each in best.items()}
    by_time = {
        kind: curve(each.records, float(np.median(seconds[each.variant])))
        for kind, each in best.items()
    }
    found = {"step": by_steps, "seconds of training": by_time}
    return [learning_panel(title, x, series) for x, series in found.items()]


def arrivals_of(found: Records, target: float) -> dict[str, list[float | None]]:
    """Variant → the arrival of each seed."""
    return {variant: [arrival(one, target) for one in each] for variant, each in found.items()}


def convergence(
    setting: Setting,
    *,
    sweeps: Sequence[str] = ("convergence_4", "convergence_128"),
    processes: int = 5,
) -> Claim:
    """Layer norm against none and batch norm to the target, at two batch sizes."""
    races, panels, rows, data, target = [], [], [], {}, sweep_of(sweeps[0]).target
    for name in sweeps:
        found, batch = records(setting, name), f"batch {name.rpartition('_')[2]}"
        best = bests(found, target)
        seconds = step_times(setting, name, [each.variant for each in best.values()], processes)
        for kind, rival in best.items():
            norm, depth = kind.split(", ")
            ours = best[f"layer, {depth}"]
            if rival is not ours:
                case = f"{batch}, {depth}, against {'no' if norm == 'none' else norm} norm"
                ratio = log_ratio(seconds[rival.variant], seconds[ours.variant])
                races.append(Race(case, ours, rival, ratio))
        for depth in dict.fromkeys(kind.split(", ")[1] for kind in best):
            chosen = {kind.split(", ")[0]: one for kind, one in best.items() if depth in kind}
            panels += panels_of(f"{batch}, {depth}", chosen, seconds)
        rows += [(batch, *row) for row in rates_rows(found, target)]
        data[name] = {"seconds per step": seconds, "arrivals": arrivals_of(found, target)}
    plots.lines(panels, setting.folder / "convergence.png")
    columns = ("batch", "norm, layers, learning rate", "seeds that arrive", "steps", "")
    return Claim(
        title="Convergence with layer norm",
        says="With layer normalisation training converges faster than without, and than with batch "
        "normalisation.",
        method=f"Pre-norm models with 4 layers and with 1, trained on reverse to a validation "
        f"sequence accuracy of {target:.0%}, in batches of 4 and of 128: `configs/ablations/"
        "convergence_4.py` and `convergence_128.py`. All clip gradients at a norm of 1. Batch norm "
        "sees later target positions in training, and running averages in evaluation. "
        + METHOD.format(choosing=CHOOSING, ours="layer norm"),
        checks=judge(races),
        tables=[markdown(columns, rows, align="lllll")],
        data=data,
    )


def learning(setting: Setting, *, sweep: str = "recurrence", processes: int = 5) -> Claim:
    """The Transformer against recurrent models to the target."""
    found, target = records(setting, sweep), sweep_of(sweep).target
    best = bests(found, target)
    seconds = step_times(setting, sweep, [each.variant for each in best.values()], processes)
    ours = best["transformer"]
    races = [
        Race(
            f"against the {kind.upper()}",
            ours,
            each,
            log_ratio(seconds[each.variant], seconds[ours.variant]),
        )
        for kind, each in best.items()
        if each is not ours
    ]
    plots.lines(panels_of("reverse", best, seconds), setting.folder / "learning.png")
    sizes = ", ".join(f"{kind} {each.records[0].parameters:,}" for kind, each in best.items())
    milliseconds = [
        (kind, shown(mean_interval([1e3 * one for one in seconds[each.variant]])))
        for kind, each in best.items()
    ]
    columns = ("kind, learning rate", "seeds that arrive", "steps", "")
    return Claim(
        title="Steps and seconds to learn",
        says="Recurrent networks need more steps to train.",
        method=f"Models of about equal parameters ({sizes}), trained on reverse to a validation "
        f"sequence accuracy of {target:.0%}: `configs/ablations/recurrence.py`. The recurrent "
        "decoder feeds its attended output back, as Luong et al. 2015 do, so attention is inside "
        "its loop. " + METHOD.format(choosing=CHOOSING, ours="the Transformer"),
        checks=judge(races),
        tables=[
            markdown(columns, rates_rows(found, target), align="llll"),
            markdown(("kind", "milliseconds per step"), milliseconds),
        ],
        data={"seconds per step": seconds, "arrivals": arrivals_of(found, target)},
    )
