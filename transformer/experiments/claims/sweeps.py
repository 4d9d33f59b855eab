"""What the claims take from sweeps: their records, and each kind at its own best learning rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import RunConfig
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.experiments import report, runner
from transformer.experiments.claims.measuring import interleaved
from transformer.experiments.claims.page import Check, Setting
from transformer.experiments.report import Record
from transformer.experiments.statistics import holm, mean_interval, paired
from transformer.experiments.sweep import Program, Run, Sweep, all_runs, load_sweep, plan
from transformer.model import Model
from transformer.training import init_state, make_train_step, make_train_steps, zero_sums

REPLICAS = 8  # as `scripts/sweep.py` groups them unless told otherwise, so that both share runs


def file_of(name: str) -> str:
    """The path of a shipped sweep."""
    return str(runner.ROOT / "configs" / "ablations" / f"{name}.py")


def records(setting: Setting, name: str) -> dict[str, list[Record]]:
    """Every variant's seeds of a shipped sweep, which is carried out where it is not yet.

    Raises:
      UserError: one of its programs failed.
    """
    sweep = load_sweep(file_of(name))
    programs = plan(sweep, REPLICAS)
    root = setting.root / name
    outcomes = runner.run_all(
        programs, root, setting.data_dir, jobs=setting.jobs, cluster=None, cluster_parameters={}
    )
    failed = [each.program.name for each in outcomes if each.failure is not None]
    if failed:
        raise UserError(
            f"of the sweep {name} failed: {', '.join(failed)}; see log.txt in their folders "
            f"under {root}, and give the command again"
        )
    found: dict[str, list[Record]] = {variant: [] for variant in sweep.variants}
    for program, replica, run in all_runs(programs):
        found[run.variant].append(report.read(sweep, program, replica, run, root))
    return {name: sorted(each, key=lambda one: one.run.seed) for name, each in found.items()}


@dataclass(frozen=True)
class Best:
    """A kind at the learning rate at which it gets to the target soonest.

    variant: of the sweep.
    rate: the learning rate.
    records: its seeds.
    """

    variant: str
    rate: float
    records: Sequence[Record]

    def steps(self) -> list[int]:
        """To the target, of the seeds that reach it."""
        return [each.steps for each in self.records if each.steps is not None]


def bests(found: Mapping[str, Sequence[Record]]) -> dict[str, Best]:
    """Each kind of a sweep whose variants are called `kind, rate`, at its own best rate.

    The one at which most seeds reach the target; among those the one that takes the
    fewest steps, or, where none does, the most accurate one.
    """

    def order(best: Best) -> tuple[Any, ...]:
        steps, accuracy = best.steps(), [each.accuracy for each in best.records]
        return (-len(steps), float(np.mean(steps)) if steps else 0.0, -float(np.mean(accuracy)))

    kinds: dict[str, list[Best]] = {}
    for variant, each in found.items():
        kind, _, rate = variant.rpartition(", ")
        kinds.setdefault(kind, []).append(Best(variant, float(rate), each))
    return {kind: min(candidates, key=order) for kind, candidates in kinds.items()}


def trainer(sweep: Sweep, variant: str, data_dir: str | None, steps: int) -> Callable[[], Any]:
    """A call that takes so many training steps of a variant, as `train.py` does."""
    overrides = {**sweep.overrides, **sweep.variants[variant]}
    alone = Program(variant, sweep.config, overrides, (Run(variant, 0),), ())
    cfg = RunConfig.resolve(alone.resolved())
    corpus = open_corpus(cfg.data, data_dir)
    data = jax.device_put(corpus.load(cfg.data.train, cfg.batch_size))
    model, recipe = Model(cfg.model, corpus.tokenizer.vocab_size), cfg.recipe()
    state = jax.jit(partial(init_state, model, recipe))(np.uint32(0), {})
    train_steps = jax.jit(make_train_steps(make_train_step(model, recipe)))
    return lambda: train_steps(state, zero_sums(), data, jnp.int32(steps))


def seconds_a_step(
    sweep: Sweep, variants: Sequence[str], data_dir: str | None, *, rounds: int, steps: int = 10
) -> dict[str, list[float]]:
    """Of each variant in every round, one run on all cores, taken in turns."""
    calls = {variant: trainer(sweep, variant, data_dir, steps) for variant in variants}
    timings = interleaved(calls, rounds)
    return {variant: [each / steps for each in found] for variant, found in timings.items()}


@dataclass(frozen=True)
class Race:
    """One kind against another to the target.

    case: of the check.
    ours, theirs: at their best.
    ours_step, theirs_step: median seconds a step.
    """

    case: str
    ours: Best
    theirs: Best
    ours_step: float
    theirs_step: float


def judge(races: Sequence[Race]) -> list[Check]:
    """Ours gets there sooner, in steps and in seconds, corrected by Holm for all of them.

    Who reaches the target on every seed beats who does not. Where neither does, it cannot
    be told, which does not count for the claim.
    """
    tests, entries = [], []
    for race in races:
        for unit, own, other in (
            ("steps", 1.0, 1.0),
            ("seconds", race.ours_step, race.theirs_step),
        ):
            ours = [own * steps for steps in race.ours.steps()]
            theirs = [other * steps for steps in race.theirs.steps()]
            whole = [
                len(x) == len(b.records) for x, b in ((ours, race.ours), (theirs, race.theirs))
            ]
            test = paired(ours, theirs) if all(whole) else None
            entries.append((race, unit, ours, theirs, whole, test))
            tests.append(np.nan if test is None else test.p)
    checks = []
    for (race, unit, ours, theirs, whole, test), p in zip(entries, holm(tests), strict=True):
        text = f"{reach(ours, race.ours)} against {reach(theirs, race.theirs)} {unit}"
        if test is None:
            holds = whole[0] and not whole[1]
        else:
            text += f" (p {p:.2g})"
            holds = test.mean < 0.0 and p <= 0.05
        checks.append(Check(f"{race.case}, {unit}", text, holds))
    return checks


def reach(values: Sequence[float], best: Best) -> str:
    """The mean of those that arrive, with its interval, and how many where not all do."""
    if not values:
        return f"none of {len(best.records)} seeds arrives"
    each = mean_interval(values)
    text = f"{each.mean:.3g}"
    if each.n > 1:
        text += f" [{each.low:.3g}, {each.high:.3g}]"
    return text if each.n == len(best.records) else f"{text} ({each.n}/{len(best.records)} seeds)"


def rates_table(found: Mapping[str, Sequence[Record]]) -> list[tuple[str, str, str, str]]:
    """Rows (variant, seeds that arrive, steps, remark) of every rate that was tried."""
    rows, best = [], bests(found)
    rates: dict[str, list[float]] = {}
    for variant in found:
        kind, _, rate = variant.rpartition(", ")
        rates.setdefault(kind, []).append(float(rate))
    for variant, each in found.items():
        steps = [one.steps for one in each if one.steps is not None]
        mean = f"{np.mean(steps):,.0f}" if steps else ""
        kind, _, rate = variant.rpartition(", ")
        remark = ""
        if best[kind].variant == variant:
            end = float(rate) in (min(rates[kind]), max(rates[kind]))
            remark = "best, at the end of what was tried" if end else "best"
        rows.append((variant, f"{len(steps)}/{len(each)}", mean, remark))
    return rows
