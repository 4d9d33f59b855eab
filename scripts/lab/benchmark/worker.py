"""The process of one contender, and the connection to it: one JSON request or reply per line.

python -m lab.benchmark.worker '{"contender": "marian", …}'
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark import task
from lab.benchmark.contender import CONTENDERS, Contender, Schedule, Setting
from lab.benchmark.task import EOS, PAD, Size

ROOT = Path(__file__).parents[3]
SHORTEST = 0.5  # seconds that a timing of decoding takes at least, by repeating it


class ContenderError(Exception):
    """A contender failed, or its process ended."""


class Worker:
    """The requests that measure; the others are the contender's own methods. Results are JSON."""

    def __init__(self, contender: Contender, setting: Setting):
        self.contender, self.setting = contender, setting
        self.held_out = task.load(setting.folder, "test")

    def start(self, seed: int, schedule: dict[str, Any]) -> None:
        self.contender.start(seed, Schedule(**schedule))

    def train(self, steps: int, batching: str) -> dict[str, Any]:
        started, used = time.perf_counter(), time.process_time()
        tokens, loss = self.contender.train(steps, batching)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB, on Linux
        done = {"steps": steps, "tokens": tokens, "loss": loss, "seconds": seconds}
        return done | {"cpu_ms": 1e3 * cpu, "gib": gib}

    def decode(self, strings: int, batch: int, beams: int, shortest: float = SHORTEST) -> Any:
        """Decodes the first held-out strings: seconds, exact match, and tokens per output."""
        source, target = (side[:strings] for side in self.held_out)
        passes, seconds, found, started = 0, 0.0, source, time.perf_counter()
        while not passes or seconds < shortest:
            found = self.contender.decode(source, batch, beams, self.setting.size.room)
            passes, seconds = passes + 1, time.perf_counter() - started
        found[np.cumsum(found == EOS, 1) - (found == EOS) > 0] = PAD  # some repeat EOS
        target = np.pad(target, ((0, 0), (0, found.shape[1] - target.shape[1])))
        exact, tokens = (found == target).all(1).mean(), (found != PAD).sum(1).mean()
        own = {"strings": strings, "seconds": seconds / passes}
        return own | {"exact": float(exact), "tokens": float(tokens)}


class Remote:
    """The other end: starts the process of a contender, which prints into `log`; asks it."""

    def __init__(self, contender: str, setting: Setting, log: Path):
        self.contender, self.log = contender, log
        folder = str(setting.folder.resolve())
        threads = CONTENDERS[contender].threads or setting.threads
        own = {"folder": folder, "contender": contender, "threads": threads}
        words = dataclasses.asdict(setting) | own
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": str(threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the other processes need memory too
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if setting.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "lab.benchmark.worker", json.dumps(words)]
        with log.open("a", encoding="utf-8") as errors:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process: Any = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, method: str, **arguments: Any) -> Any:
        """The result of a method of `Worker`; a ContenderError if it or the process fails."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            raise ContenderError(f"exited with status {self.process.wait()}: {last[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer["result"]

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.__exit__(None, None, None)  # without requests it ends


def main() -> None:
    """Answers requests from standard input until it is closed."""
    words = json.loads(sys.argv[1])
    module, name = CONTENDERS[words.pop("contender")].where.split(":")
    setting = Setting(Size(**words.pop("size")), Path(words.pop("folder")), **words)
    if setting.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not be taken for a reply
    contender = getattr(importlib.import_module(f"lab.benchmark.{module}"), name)
    worker = Worker(contender(setting), setting)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            owner = worker if hasattr(worker, method) else worker.contender
            reply = {"result": getattr(owner, method)(**arguments)}
        except Exception as error:  # whatever a framework raises
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
