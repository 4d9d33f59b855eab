"""What is measured: each part rotates over the processes of the contenders."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lab.benchmark import task
from lab.benchmark.contender import CONTENDERS, IMPORTED, OURS, TUNED, Setting
from lab.benchmark.page import comparison
from lab.benchmark.worker import ContenderError, Remote
from lab.tables import spread
from lab.timing import rotate
from transformer.console import console

# Batch size of decoding → held-out strings in a turn: of own models, and of an imported one.
STRINGS, IMPORTED_STRINGS = {128: 512, 1: 32}, {32: 32, 1: 8}
EVERY = 50  # steps between evaluations in training to the target
PAUSE = 0.3  # seconds between turns, until the threads of the last process sleep

Found = dict[str, list[Any]]  # contender in tables → the result of each round
Part = tuple[list[dict[str, Any]], Any]  # tables of `page.comparison`; the result of every turn
# (contender, batching or "") → (method of `Worker`, its arguments)
Turns = Mapping[tuple[str, str], tuple[str, dict[str, Any]]]


@dataclass
class Bench:
    """One size on one device, and how often everything is measured."""

    size: str
    setting: Setting
    contenders: Sequence[str]
    rounds: int  # turns of each contender
    seeds: int  # of training to the target
    target: float  # exact match on the held-out strings
    limit: float  # seconds of training after which a seed gives up
    failures: dict[str, str] = field(default_factory=dict)  # contender → why it is missing

    def able(self, support: str) -> list[str]:
        """The contenders whose `Entry` has this field set and that have not failed."""
        able = [name for name in self.contenders if getattr(CONTENDERS[name], support)]
        return [name for name in able if name not in self.failures]

    @contextlib.contextmanager
    def processes(self, names: Sequence[str]) -> Iterator[dict[str, Remote]]:
        with contextlib.ExitStack() as stack:
            logs = {name: self.setting.folder / f"{name}.log" for name in names}
            remotes = {name: Remote(name, self.setting, log) for name, log in logs.items()}
            yield {name: stack.enter_context(remote) for name, remote in remotes.items()}

    def ask(self, remote: Remote, method: str, **arguments: Any) -> Any:
        """The result; None, now and from now on, of a peer that fails."""
        if remote.contender in self.failures:
            return None
        try:
            return remote.ask(method, **arguments)
        except ContenderError as error:
            if remote.contender == OURS:
                raise
            self.failures[remote.contender] = str(error)
            console.print(f"{label(remote.contender)} failed: {error}")
            return None

    def rotate(self, remotes: Mapping[str, Remote], turns: Turns) -> Found:
        """The result of each turn in each round, without those of failed peers."""
        calls = {
            key: partial(self.ask, remotes[key[0]], method, **arguments)
            for key, (method, arguments) in turns.items()
        }
        rotate(calls, 1, PAUSE)  # compiles, and warms the caches
        found = rotate(calls, self.rounds, PAUSE)
        return {label(*key): each for key, each in found.items() if key[0] not in self.failures}

    def training_of(self, name: str) -> tuple[dict[str, Any], str]:
        """The fields of its `Schedule`, and how its batches are made in training to the target."""
        size = self.setting.size
        default = (CONTENDERS[name].batchings[-1], size.learning_rate)
        batching, rate = TUNED.get(self.size, {}).get(name, default)
        schedule = {"learning_rate": rate, "warmup_steps": size.warmup_steps}
        return schedule | {"steps": size.steps or 100_000}, batching

    def learn(self, remote: Remote, seed: int, every: int = EVERY) -> Any:
        """Trains until greedy decoding reaches the target, or to the schedule's end or `limit`.

        Both are checked every `every` steps.
        """
        name = remote.contender
        schedule, batching = self.training_of(name)
        held_out = {"strings": task.HELD_OUT, "batch": 128, "beams": 1, "shortest": 0}
        curve, seconds, step, exact = [], 0.0, 0, 0.0
        self.ask(remote, "start", seed=seed, schedule=schedule)
        self.ask(remote, "train", steps=1, batching=batching)  # compiles
        self.ask(remote, "start", seed=seed, schedule=schedule)
        while step < schedule["steps"] and exact < self.target and seconds < self.limit:
            steps = min(every, schedule["steps"] - step)
            done = self.ask(remote, "train", steps=steps, batching=batching)
            found = self.ask(remote, "decode", **held_out)
            if not found:
                return None
            step, seconds, exact = step + steps, seconds + done["seconds"], found["exact"]
            curve.append([step, seconds, exact, done["loss"]])
        self.ask(remote, "save", path=str(self.weights(name)))
        outcome = f"{exact:.1%} exact match after {step:,} steps, {seconds:.1f} s"
        console.print(f"{label(name)}, seed {seed}: {outcome}")
        return {"reached": exact >= self.target, "steps": step, "seconds": seconds, "curve": curve}

    def weights(self, name: str) -> Path:
        return (self.setting.folder / f"{name}.weights").resolve()


def label(name: str, batching: str = "") -> str:
    """The contender in tables: `PyTorch, padded`."""
    return ", ".join(filter(None, (CONTENDERS[name].title, batching)))


def rates(found: Found, what: str, per: str = "seconds") -> dict[str, list[float]]:
    """What each turn has done or used per second, or per another quantity."""
    return {key: [done[what] / done[per] for done in each] for key, each in found.items()}


def training(bench: Bench) -> Part:
    """Useful target tokens per second, what they cost, and the use of the device."""
    names, steps = bench.able("batchings"), bench.setting.size.round
    turns: Turns = {
        (name, batching): ("train", {"steps": steps, "batching": batching})
        for name in names
        for batching in CONTENDERS[name].batchings
    }
    with bench.processes(names) as remotes:
        for name, remote in remotes.items():
            bench.ask(remote, "start", seed=0, schedule=bench.training_of(name)[0])
        found = bench.rotate(remotes, turns)
        step_flops, peak = bench.ask(remotes[OURS], "flops")  # afterwards: it takes memory
    speeds, ours = rates(found, "tokens"), found[label(OURS, "packed")]
    flops = step_flops * sum(each["steps"] for each in ours) / sum(each["tokens"] for each in ours)
    used = {key: [flops * speed / peak for speed in each] for key, each in speeds.items()}
    columns = {
        "steps/s": (rates(found, "steps"), "{:.2f}"),
        "CPU ms/token": (rates(found, "cpu_ms", "tokens"), "{:.3f}"),
        f"of {peak / 1e9:,.0f} GFLOP/s": (used, "{:.1%}"),
    }
    extra = {
        title: {key: spread(each, write.format) for key, each in values.items()}
        for title, (values, write) in columns.items()
    }
    extra["memory"] = {k: f"{max(x['gib'] for x in each):.2f} GiB" for k, each in found.items()}
    return [comparison("useful target tokens/s", speeds, extra)], found


def time_to_accuracy(bench: Bench) -> Part:
    """Seconds and steps of training to the target, seed by seed."""
    names = bench.able("batchings")
    with bench.processes(names) as remotes:
        seeds = {name: itertools.count() for name in names}
        calls = {n: lambda n=n: bench.learn(remotes[n], next(seeds[n])) for n in names}
        results = rotate(calls, bench.seeds, PAUSE)
    results = {name: runs for name, runs in results.items() if name not in bench.failures}
    seconds, extra = {}, {name: {} for name in ("batches", "learning rate", "seeds", "steps")}
    for name, runs in results.items():
        schedule, batching = bench.training_of(name)
        key, reached = label(name), sum(run["reached"] for run in runs)
        # Without a seed that gave up, the median of the others would flatter.
        done = runs if reached == len(runs) else []
        seconds[key] = [run["seconds"] for run in done]
        extra["batches"][key] = batching
        extra["learning rate"][key] = f"{schedule['learning_rate']:g}"
        extra["seeds"][key] = f"{reached} of {len(runs)}"
        extra["steps"][key] = spread([run["steps"] for run in done]) if done else ""
    title = f"seconds to {bench.target:.1%}"
    table = comparison(title, seconds, extra, lower=True, write="{:.1f}".format)
    return [table], {label(name): runs for name, runs in results.items()}


def decoding(bench: Bench) -> Part:
    """Held-out strings per second of models that were trained by the contenders."""
    names = [name for name in bench.able("beams") if name not in IMPORTED]
    return _decoding(bench, names, STRINGS)


def imported(bench: Bench) -> Part:
    """Held-out strings per second of a Marian: imported, as if trained here, by `generate`."""
    names = [name for name in (*IMPORTED, "marian") if name in bench.able("beams")]
    return _decoding(bench, names, IMPORTED_STRINGS)


def _decoding(bench: Bench, names: Sequence[str], strings: Mapping[int, int]) -> Part:
    """Trains first where an earlier part has left no parameters."""
    sources = {name: CONTENDERS[name].weights or name for name in names}
    untrained = {name for name in sources.values() if not bench.weights(name).exists()}
    with bench.processes(sorted(untrained)) as remotes:
        for remote in remotes.values():
            bench.learn(remote, 0, every=bench.setting.size.steps)
    tables, rounds = [], {}
    with bench.processes(names) as remotes:
        for name, remote in remotes.items():
            bench.ask(remote, "start", seed=0, schedule=bench.training_of(sources[name])[0])
            bench.ask(remote, "load", path=str(bench.weights(sources[name])))
        for beams, batch in itertools.product((1, 4), strings):
            call = "decode", {"strings": strings[batch], "batch": batch, "beams": beams}
            turns = {(name, ""): call for name in names if beams in CONTENDERS[name].beams}
            found = bench.rotate(remotes, turns)
            title = f"{'greedy' if beams == 1 else f'beam {beams}'}, batch {batch}, strings/s"
            extra = {
                "exact match": {key: f"{each[-1]['exact']:.1%}" for key, each in found.items()},
                "tokens": {key: f"{each[-1]['tokens']:.1f}" for key, each in found.items()},
            }
            speeds = rates(found, "strings")
            few = min(min(each) for each in speeds.values()) < 10
            write = ("{:.2f}" if few else "{:,.0f}").format
            tables.append(comparison(title, speeds, extra, write=write))
            rounds[title] = found
    return tables, rounds


PARTS = {each.__name__: each for each in (training, time_to_accuracy, decoding, imported)}
