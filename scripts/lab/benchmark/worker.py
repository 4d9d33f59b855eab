"""The process of one contender: it reads a request a line and writes a reply a line.

    python -m lab.benchmark.worker '{"contender": "marian", …}'

Only its turn makes it work; in between it waits for the next line. What the libraries print goes
to standard error.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark import task
from lab.benchmark.contender import CONTENDERS, Contender, Schedule, Setting
from lab.benchmark.task import Size
from transformer.data.tokenizer import EOS, PAD

SHORTEST = 0.5  # seconds that a timing takes at least, by repeating the call


class Worker:
    """The requests that a contender is sent, each a method; what they return is JSON's.

    Args:
      contender: one that `Entry.make` made.
      setting: what it was made with.
    """

    def __init__(self, contender: Contender, setting: Setting):
        self.contender, self.setting = contender, setting
        self.held_out = task.load(setting.data, "held_out")

    def start(self, seed: int, schedule: dict[str, Any]) -> None:
        self.contender.start(seed, Schedule(**schedule))

    def train(self, steps: int, batching: str) -> dict[str, Any]:
        """Seconds that so many steps take, and the useful target tokens in them."""
        started = time.perf_counter()
        tokens = self.contender.train(steps, batching)
        seconds = time.perf_counter() - started
        return {"steps": steps, "tokens": tokens, "seconds": seconds, "loss": self.contender.loss()}

    def decode(self, strings: int, batch: int, beams: int, shortest: float = SHORTEST) -> Any:
        """Seconds that decoding the first of the held-out strings takes, and how many are right."""
        held_out = self.held_out.head(strings)
        room = self.setting.size.room()
        passes, started, seconds = 0, time.perf_counter(), 0.0
        decoded = np.zeros((0, 0))
        while not passes or seconds < shortest:
            decoded = self.contender.decode(held_out.source, batch, beams, room)
            passes, seconds = passes + 1, time.perf_counter() - started
        decoded = ended(decoded)
        return {
            "sequences": strings,
            "seconds": seconds / passes,
            "exact": exact(decoded, held_out.target),
            "tokens": float((decoded != PAD).sum(1).mean()),
        }

    def learn(
        self,
        *,
        seed: int,
        schedule: dict[str, Any],
        batching: str,
        every: int,
        target: float,
        limit: float,
    ) -> dict[str, Any]:
        """Trains until so large a share of the held-out strings comes out right, greedily.

        Compilation is over when the clock starts, and it stands still during the checks.

        Args:
          seed: of everything.
          schedule: the fields of `Schedule`, at whose end training ends.
          batching: see `Entry`.
          every: steps between checks.
          target: the share of strings that are right in every token.
          limit: seconds of training after which it is given up.
        """
        self.start(seed, schedule)
        self.train(1, batching)  # compiles
        self.start(seed, schedule)
        curve, seconds, step, right = [], 0.0, 0, 0.0
        while step < schedule["steps"] and right < target and seconds < limit:
            done = self.train(min(every, schedule["steps"] - step), batching)
            step, seconds = step + done["steps"], seconds + done["seconds"]
            right = self.decode(len(self.held_out), 128, 1, shortest=0.0)["exact"]
            curve.append([step, seconds, right, done["loss"]])
        return {"reached": right >= target, "steps": step, "seconds": seconds, "curve": curve}

    def product(self, size: int) -> float:
        """FLOP/s of multiplying two square matrices."""
        call = self.contender.product(size)
        call()
        calls, started, seconds = 0, time.perf_counter(), 0.0
        while seconds < SHORTEST:
            call()
            calls, seconds = calls + 1, time.perf_counter() - started
        return 2.0 * size**3 * calls / seconds

    def memory(self) -> int:
        """The most bytes held so far: on the device, or on a CPU by this whole process."""
        held = self.contender.memory()
        return peak_resident() if held is None else held

    def flops(self) -> int | None:
        return self.contender.flops()

    def save(self, path: str) -> None:
        self.contender.save(Path(path))

    def load(self, path: str) -> None:
        self.contender.load(Path(path))


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    import resource  # not on every system, and only needed here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def ended(decoded: np.ndarray) -> np.ndarray:
    """Outputs with padding after their EOS, where some fill up with more of it."""
    before = np.cumsum(decoded == EOS, axis=1) - (decoded == EOS)
    return np.where(before > 0, PAD, decoded)


def exact(decoded: np.ndarray, target: np.ndarray) -> float:
    """The share of outputs that are their target, token for token, EOS included."""
    room = decoded.shape[1] - target.shape[1]
    target = np.pad(target, ((0, 0), (0, room)), constant_values=PAD)
    return float((decoded == target).all(1).mean())


def serve(requests: Any, reply: Callable[[Any], None], make: Callable[[], Worker]) -> None:
    """Answers each request, a JSON object of a method's name and its arguments, in order."""
    worker = make()
    for line in requests:
        request = json.loads(line)
        try:
            reply({"result": getattr(worker, request.pop("do"))(**request)})
        except Exception as error:  # whatever a framework may raise
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def main() -> None:
    """Takes its setting from the command line."""
    words = json.loads(sys.argv[1])
    setting = Setting(
        size=Size(**words["size"]),
        data=Path(words["data"]),
        device=words["device"],
        threads=words["threads"],
    )
    if setting.device == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: setting.threads])
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what is printed must not be taken for a reply
    entry = CONTENDERS[words["contender"]]
    serve(
        sys.stdin,
        lambda answer: print(json.dumps(answer), file=channel),
        lambda: Worker(entry.make(setting), setting),
    )


def command(contender: str, setting: Setting) -> list[str]:
    """The words that start such a process."""
    words = {**dataclasses.asdict(setting), "data": str(setting.data), "contender": contender}
    return [sys.executable, "-m", "lab.benchmark.worker", json.dumps(words)]


if __name__ == "__main__":
    main()
