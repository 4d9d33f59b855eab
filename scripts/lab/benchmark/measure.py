"""What is measured of the contenders, each part with all of them taking turns."""

import contextlib
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.benchmark import task
from lab.benchmark.contender import CONTENDERS, OURS, Entry, Schedule, Setting
from lab.benchmark.rotation import ContenderError, Remote, rotate
from transformer.console import console
from transformer.training.workdir import write_json

PRODUCTS = (1024, 2048, 4096)  # sides of the square matrices whose product is timed
STRINGS = {128: 512, 1: 32}  # batch → held-out strings that are decoded in a turn
EVERY = 50  # steps between checks of accuracy
SEARCH_SEED = 1_000  # rates are chosen on another seed than they are judged on

# What the search tries with every contender, in each of its ways to make batches: which share of
# the size's steps a linear schedule takes, and its highest learning rate.
GRID = ((1.0, 2e-3), (1.0, 4e-3))


@dataclass
class Bench:
    """One size on one device, and how often everything is done.

    setting: what every contender is told.
    folder: takes logs and trained parameters.
    contenders: who takes part.
    rounds: turns of each.
    starts: processes of each whose first step is timed, from cold and again.
    seeds: of training to the target.
    target: the share of held-out strings that are right in every token.
    limit: seconds of training after which a seed is given up.
    settings: what the search has found: contender → as `training_of` has it.
    failures: contender → why it is not there.
    """

    setting: Setting
    folder: Path
    contenders: Sequence[str]
    rounds: int
    starts: int
    seeds: int
    target: float
    limit: float
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def those(self, able: Callable[[Entry], Any]) -> list[str]:
        """The contenders that can do something and have not failed."""
        return [
            name for name in self.contenders if able(CONTENDERS[name]) and name not in self.failures
        ]

    @contextlib.contextmanager
    def open(self, names: Sequence[str]) -> Iterator[dict[str, Remote]]:
        """A process for each."""
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(self.remote(name)) for name in names}

    def remote(self, name: str, **environment: str) -> Remote:
        return Remote(name, self.setting, self.folder / f"{name}.log", environment)

    def ask(self, remote: Remote, do: str, **arguments: Any) -> Any:
        """The result; None, now and from now on, of a peer that fails.

        Raises:
          ContenderError: it is this code that fails.
        """
        if remote.contender in self.failures:
            return None
        try:
            return remote.ask(do, **arguments)
        except ContenderError as error:
            if remote.contender == OURS:
                raise
            self.failures[remote.contender] = str(error)
            console.print(f"{CONTENDERS[remote.contender].title} failed: {error}")
            return None

    def complete(self, found: Mapping[Any, Any]) -> dict[Any, Any]:
        """What was found, but of those that failed on the way."""
        return {
            name: each
            for name, each in found.items()
            if (name[0] if isinstance(name, tuple) else name) not in self.failures
        }

    def training_of(self, name: str) -> dict[str, Any]:
        """How a contender is trained: as the search found, or as the size says.

        schedule: fields of `Schedule`.
        batching: one of `Entry.batchings`.
        """
        size = self.setting.size
        own = Schedule(
            learning_rate=size.learning_rate,
            warmup_steps=size.warmup_steps,
            name="linear",
            steps=size.steps or 100_000,
        )
        usual = {"schedule": dataclasses.asdict(own), "batching": CONTENDERS[name].batchings[-1]}
        return dict(self.settings.get(name, usual))


def nested(found: Mapping[tuple[Any, ...], Any]) -> dict[str, dict[str, Any]]:
    """(contender, what) → value as contender → what → value."""
    result: dict[str, dict[str, Any]] = {}
    for (name, *what), value in found.items():
        result.setdefault(name, {})["/".join(map(str, what))] = value
    return result


def training(bench: Bench) -> dict[str, Any]:
    """Steps and useful target tokens of each contender, and products of matrices."""
    names = bench.those(lambda entry: entry.batchings)
    round_ = bench.setting.size.round
    with bench.open(names) as remotes:
        turns: dict[Any, Callable[[], Any]] = {}
        for name, remote in remotes.items():
            bench.ask(remote, "start", seed=0, schedule=bench.training_of(name)["schedule"])
            for batching in CONTENDERS[name].batchings:

                def turn(remote=remote, batching=batching):
                    return bench.ask(remote, "train", steps=round_, batching=batching)

                turn()  # compiles, and warms the caches
                turns[name, batching] = turn
        memory = {name: bench.ask(remote, "memory") for name, remote in remotes.items()}
        for name, side in itertools.product(names, PRODUCTS):
            if CONTENDERS[name].products:
                turns[name, f"product {side}"] = lambda remote=remotes[name], side=side: bench.ask(
                    remote, "product", size=side
                )
        found = rotate(turns, bench.rounds)
        flops = {name: bench.ask(remote, "flops") for name, remote in remotes.items()}
    found = nested(bench.complete(found))
    strings = task.load(bench.setting.data, "train")
    lengths = strings.lengths()
    return {
        "rounds": {
            name: {what: each for what, each in own.items() if not what.startswith("product")}
            for name, own in found.items()
        },
        "best_product": max(
            rate
            for own in found.values()
            for what, rates in own.items()
            if what.startswith("product")
            for rate in rates
        ),
        "memory": bench.complete(memory),
        "flops_per_step": bench.complete(flops),
        "useful_flops_per_token": task.useful_flops(bench.setting.size, lengths, lengths)
        / float(lengths.sum()),
    }


def start(bench: Bench) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first training step.

    The first of two processes has no compilation cache, the second has what the first left.
    """

    def turn(name):
        with tempfile.TemporaryDirectory() as cache:
            return [first_step(bench, name, cache) for _ in ("cold", "again")]

    names = bench.those(lambda entry: entry.batchings)
    found = rotate({name: lambda name=name: turn(name) for name in names}, bench.starts)
    return {
        name: {"cold": [each[0] for each in pairs], "again": [each[1] for each in pairs]}
        for name, pairs in bench.complete(found).items()
    }


def first_step(bench: Bench, name: str, cache: str) -> float | None:
    """The seconds of one process."""
    places = {
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
    }
    started = time.perf_counter()
    with bench.remote(name, **places) as remote:
        bench.ask(remote, "start", seed=0, schedule=bench.training_of(name)["schedule"])
        bench.ask(remote, "train", steps=1, batching=CONTENDERS[name].batchings[0])
        return time.perf_counter() - started


def learn(
    bench: Bench, remote: Remote, seed: int, training: Mapping[str, Any], limit: float
) -> Any:
    """Trains a contender to the target; `training` is as `Bench.training_of` has it."""
    return bench.ask(
        remote,
        "learn",
        seed=seed,
        schedule=dict(training["schedule"]),
        batching=training["batching"],
        every=EVERY,
        target=bench.target,
        limit=limit,
    )


def time_to_accuracy(bench: Bench) -> dict[str, Any]:
    """Seconds and steps of training to the target, seed by seed."""
    names = bench.those(lambda entry: entry.learns)
    trainings = {name: bench.training_of(name) for name in names}
    seeds = dict.fromkeys(names, 0)
    with bench.open(names) as remotes:

        def turn(name):
            found = learn(bench, remotes[name], seeds[name], trainings[name], bench.limit)
            seeds[name] += 1
            bench.ask(remotes[name], "save", path=str(weights(bench, name)))
            if found:
                console.print(
                    f"{CONTENDERS[name].title}, seed {seeds[name] - 1}: {found['curve'][-1][2]:.1%}"
                    f" right after {found['steps']:,} steps, {found['seconds']:.1f} s"
                )
            return found

        found = rotate({name: lambda name=name: turn(name) for name in names}, bench.seeds)
    return {
        "target": bench.target,
        "seeds": bench.complete(found),
        "trainings": trainings,
        "searched": sorted(set(bench.settings) & set(names)),
    }


def search(bench: Bench) -> dict[str, Any]:
    """What makes each contender reach the target soonest, all of them tried on the same grid.

    A trial is given up once it is slower than the best so far of its contender. What has been
    tried is kept in `search.json` of the folder, so that a search that was cut off goes on.
    """
    names = bench.those(lambda entry: entry.learns)
    size = bench.setting.size
    file = bench.folder / "search.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    trials: dict[str, list[dict[str, Any]]] = {name: kept.get(name, []) for name in names}
    with bench.open(names) as remotes:
        each_way = [(name, way) for name in names for way in CONTENDERS[name].batchings]
        for (share, rate), (name, batching) in itertools.product(GRID, each_way):
            schedule = Schedule(
                learning_rate=rate,
                warmup_steps=size.warmup_steps,
                name="linear",
                steps=round(share * size.steps),
            )
            tried = {"schedule": dataclasses.asdict(schedule), "batching": batching}
            if any(trial | tried == trial for trial in trials[name]):
                continue
            limit = min([bench.limit, *(t["seconds"] for t in trials[name] if t["reached"])])
            found = learn(bench, remotes[name], SEARCH_SEED, tried, limit)
            if found:
                right = found.pop("curve")[-1][2]
                trials[name].append({**tried, "right": right, **found})
                write_json(file, kept | trials)
                console.print(
                    f"{CONTENDERS[name].title}, {batching}: {schedule.steps} steps, {rate:g}:"
                    f" {right:.1%} right after {found['seconds']:.1f} s"
                )
    return {
        name: {what: best(each)[what] for what in ("schedule", "batching")} | {"trials": each}
        for name, each in bench.complete(trials).items()
    }


def best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that reached the target soonest; if none did, the one that came nearest."""
    return min(
        trials,
        key=lambda t: (not t["reached"], t["seconds"] if t["reached"] else -t["right"]),
    )


def weights(bench: Bench, name: str) -> Path:
    """The file with a contender's trained parameters."""
    return bench.folder / f"{name}.weights"


def decoding(bench: Bench) -> dict[str, Any]:
    """Held-out strings a second, greedy and with beams, one at a time and many.

    With parameters trained to the target, or as near as the schedule comes: what is not there
    of an earlier part is trained first.
    """
    names = bench.those(lambda entry: entry.beams)
    owners = dict.fromkeys(CONTENDERS[name].weights or name for name in names)
    untrained = [name for name in owners if not weights(bench, name).exists()]
    with bench.open(untrained) as remotes:
        for name, remote in remotes.items():
            console.print(f"training {CONTENDERS[name].title}")
            learn(bench, remote, 0, bench.training_of(name), bench.limit)
            bench.ask(remote, "save", path=str(weights(bench, name)))
    with bench.open(names) as remotes:
        turns: dict[Any, Callable[[], Any]] = {}
        for name, remote in remotes.items():
            path = weights(bench, CONTENDERS[name].weights or name)
            bench.ask(
                remote,
                "start",
                seed=0,
                schedule=bench.training_of(CONTENDERS[name].weights or name)["schedule"],
            )
            bench.ask(remote, "load", path=str(path))
            for beams, batch in itertools.product(CONTENDERS[name].beams, STRINGS):

                def turn(remote=remote, beams=beams, batch=batch):
                    return bench.ask(
                        remote, "decode", strings=STRINGS[batch], batch=batch, beams=beams
                    )

                turn()
                turns[name, beams, batch] = turn
        found = rotate(turns, bench.rounds)
    return nested(bench.complete(found))


PARTS: dict[str, Callable[[Bench], Any]] = {
    "training": training,
    "start": start,
    "time_to_accuracy": time_to_accuracy,
    "decoding": decoding,
    "search": search,
}

# Those that need a model trained to its end.
TRAINED = ("time_to_accuracy", "decoding", "search")
