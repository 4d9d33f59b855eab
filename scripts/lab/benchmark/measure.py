"""What is measured: each part rotates over the processes of the contenders."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark import task
from lab.benchmark.contender import CONTENDERS, OURS, TUNED, Schedule, Setting
from lab.benchmark.page import comparison
from lab.benchmark.task import EOS, PAD
from lab.benchmark.worker import ContenderError, Remote
from lab.tables import spread
from lab.timing import rotate
from transformer.console import console
from transformer.inference.evaluation import exact_match

STRINGS = {128: 512, 1: 32}  # batch size of decoding → held-out strings in a turn
EVERY = 50  # steps between evaluations in training to the target
PAUSE = 0.3  # seconds between turns, until the threads of the last process sleep

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
        """A process for each."""
        with contextlib.ExitStack() as stack:
            folder = self.setting.folder
            remotes = {n: Remote(n, self.setting, folder / f"{n}.log") for n in names}
            yield {name: stack.enter_context(remote) for name, remote in remotes.items()}

    def ask(self, remote: Remote, method: str, **arguments: Any) -> Any:
        """The result; None, now and from now on, of a peer that fails.

        Raises:
          ContenderError: this library fails.
        """
        if remote.contender in self.failures:
            return None
        try:
            found = remote.ask(method, **arguments)
        except ContenderError as error:
            if remote.contender == OURS:
                raise
            self.failures[remote.contender] = str(error)
            console.print(f"{CONTENDERS[remote.contender].title} failed: {error}")
            return None
        return self.judge(found) if method == "decode" else found

    def judge(self, found: dict[str, Any]) -> dict[str, Any]:
        """What a worker has decoded as its exact match and its tokens per output."""
        outputs = np.array(found.pop("outputs"))
        # Some contenders repeat EOS.
        outputs[np.cumsum(outputs == EOS, axis=1) - (outputs == EOS) > 0] = PAD
        target = task.load(self.setting.folder, "test").target[: len(outputs)]
        exact = float(exact_match(outputs, target).mean())
        return {**found, "exact": exact, "tokens": float((outputs != PAD).sum(1).mean())}

    def rotate(
        self, remotes: Mapping[str, Remote], turns: Turns, rounds: int
    ) -> dict[str, list[Any]]:
        """The result of each turn in each round by its label, without those of failed peers."""
        calls = {
            key: partial(self.ask, remotes[key[0]], method, **arguments)
            for key, (method, arguments) in turns.items()
        }
        found = rotate(calls, rounds, PAUSE)
        return {label(*key): each for key, each in found.items() if key[0] not in self.failures}

    def training_of(self, name: str) -> dict[str, Any]:
        """The fields of its `Schedule`, and how its batches are made in training to the target."""
        size = self.setting.size
        default = (CONTENDERS[name].batchings[-1], size.learning_rate)
        batching, rate = TUNED.get(self.size, {}).get(name, default)
        schedule = Schedule(rate, size.warmup_steps, size.steps or 100_000)
        return {"schedule": dataclasses.asdict(schedule), "batching": batching}

    def learn(self, remote: Remote, seed: int) -> Any:
        """Trains until the exact match of greedy decoding reaches the target; saves parameters.

        It gives up where the schedule ends, or after `limit` seconds of training. Neither
        compilation nor evaluation counts.
        """
        own, decode = self.training_of(remote.contender), {"batch": 128, "beams": 1, "shortest": 0}
        curve, seconds, step, right = [], 0.0, 0, 0.0
        self.ask(remote, "start", seed=seed, schedule=own["schedule"])
        self.ask(remote, "train", steps=1, batching=own["batching"])  # compiles
        self.ask(remote, "start", seed=seed, schedule=own["schedule"])
        while step < own["schedule"]["steps"] and right < self.target and seconds < self.limit:
            steps = min(EVERY, own["schedule"]["steps"] - step)
            done = self.ask(remote, "train", steps=steps, batching=own["batching"])
            found = self.ask(remote, "decode", strings=task.HELD_OUT, **decode)
            if not found:
                return None
            step, seconds, right = step + steps, seconds + done["seconds"], found["exact"]
            curve.append([step, seconds, right, done["loss"]])
        self.ask(remote, "save", path=str(self.weights(remote.contender)))
        console.print(
            f"{CONTENDERS[remote.contender].title}, seed {seed}: {right:.1%} exact match after "
            f"{step:,} steps, {seconds:.1f} s"
        )
        return {"reached": right >= self.target, "steps": step, "seconds": seconds, "curve": curve}

    def weights(self, name: str) -> Path:
        """The file with a contender's trained parameters."""
        return (self.setting.folder / f"{name}.weights").resolve()


def label(name: str, batching: str = "") -> str:
    """The contender in tables: `PyTorch, padded`."""
    return ", ".join(filter(None, (CONTENDERS[name].title, batching)))


def training(bench: Bench) -> Part:
    """Steps and useful target tokens per second."""
    turns: Turns = {
        (name, batching): ("train", {"steps": bench.setting.size.round, "batching": batching})
        for name in bench.able("batchings")
        for batching in CONTENDERS[name].batchings
    }
    with bench.processes(bench.able("batchings")) as remotes:
        for name, remote in remotes.items():
            bench.ask(remote, "start", seed=0, schedule=bench.training_of(name)["schedule"])
        bench.rotate(remotes, turns, 1)  # compiles, and warms the caches
        found = bench.rotate(remotes, turns, bench.rounds)

    def rate(what: str) -> dict[str, list[float]]:
        return {key: [r[what] / r["seconds"] for r in each] for key, each in found.items()}

    steps = {key: spread(each, "{:.2f}".format) for key, each in rate("steps").items()}
    return [comparison("useful target tokens/s", rate("tokens"), {"steps/s": steps})], found


def time_to_accuracy(bench: Bench) -> Part:
    """Seconds and steps of training to the target, seed by seed."""
    names = bench.able("batchings")
    seeds = {name: itertools.count() for name in names}
    with bench.processes(names) as remotes:
        calls = {
            name: lambda name=name: bench.learn(remotes[name], next(seeds[name])) for name in names
        }
        results = rotate(calls, bench.seeds, PAUSE)
    found = {label(name): each for name, each in results.items() if name not in bench.failures}
    # Without a seed that gave up, the median of the others would flatter.
    done = {key: all(run["reached"] for run in runs) for key, runs in found.items()}
    seconds, steps = (
        {key: [run[what] for run in runs] if done[key] else [] for key, runs in found.items()}
        for what in ("seconds", "steps")
    )
    trained = {label(name): bench.training_of(name) for name in names}
    reached = {key: sum(run["reached"] for run in runs) for key, runs in found.items()}
    extra = {
        "batches": {key: own["batching"] for key, own in trained.items()},
        "learning rate": {k: f"{o['schedule']['learning_rate']:g}" for k, o in trained.items()},
        "seeds": {key: f"{reached[key]} of {len(runs)}" for key, runs in found.items()},
        "steps": {key: spread(each) if each else "" for key, each in steps.items()},
    }
    title = f"seconds to {bench.target:.1%}"
    return [comparison(title, seconds, extra, lower=True, write="{:.1f}".format)], found


def decoding(bench: Bench) -> Part:
    """Held-out strings per second, greedy and with beams, one at a time and in batches.

    With the parameters that an earlier part has trained; where there are none, trains them.
    """
    names = bench.able("beams")
    sources = {name: CONTENDERS[name].weights or name for name in names}
    untrained = {name for name in sources.values() if not bench.weights(name).exists()}
    with bench.processes(sorted(untrained)) as remotes:
        for remote in remotes.values():
            bench.learn(remote, 0)
    tables, rounds = [], {}
    with bench.processes(names) as remotes:
        for name, remote in remotes.items():
            schedule = bench.training_of(sources[name])["schedule"]
            bench.ask(remote, "start", seed=0, schedule=schedule)
            bench.ask(remote, "load", path=str(bench.weights(sources[name])))
        for beams, batch in itertools.product((1, 4), STRINGS):
            arguments = {"strings": STRINGS[batch], "batch": batch, "beams": beams}
            able = [name for name in names if beams in CONTENDERS[name].beams]
            turns: Turns = {(name, ""): ("decode", arguments) for name in able}
            bench.rotate(remotes, turns, 1)
            found = bench.rotate(remotes, turns, bench.rounds)
            title = f"{'greedy' if beams == 1 else f'beam {beams}'}, batch {batch}, strings/s"
            rates = {key: [r["strings"] / r["seconds"] for r in f] for key, f in found.items()}
            extra = {
                "exact match": {key: f"{each[-1]['exact']:.1%}" for key, each in found.items()},
                "tokens": {key: f"{each[-1]['tokens']:.1f}" for key, each in found.items()},
            }
            tables.append(comparison(title, rates, extra))
            rounds[title] = found
    return tables, rounds


PARTS: dict[str, Callable[[Bench], Part]] = {
    "training": training,
    "time_to_accuracy": time_to_accuracy,
    "decoding": decoding,
}
