"""Contenders in processes of their own that take turns."""

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lab.benchmark import worker
from lab.benchmark.contender import Setting

ROOT = Path(__file__).parents[3]
PAUSE = 0.3  # seconds between turns, until the threads of the last one have gone to sleep

Turn = TypeVar("Turn", bound=Hashable)


class ContenderError(Exception):
    """A contender's process said that it failed, or ended."""


class Remote:
    """A contender's process, seen from outside.

    Args:
      contender: its name in `CONTENDERS`.
      setting: what it is told.
      log: takes what it prints.
      environment: variables that it has beside this process's own.
    """

    def __init__(
        self,
        contender: str,
        setting: Setting,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.contender, self.log = contender, log
        quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                worker.command(contender, setting),
                cwd=ROOT / "scripts",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": str(setting.threads),
                    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the others need memory too
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                }
                | (quiet if setting.device == "cpu" else {})
                | dict(environment or {}),
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a request and waits for its result.

        Raises:
          ContenderError: it failed, or the process is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            status = self.process.wait()
            raise ContenderError(f"ended with status {status}: {' '.join(last)[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer["result"]

    def __enter__(self) -> "Remote":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.process.__exit__(kind, error, trace)  # without requests it ends


def rotate(
    turns: Mapping[Turn, Callable[[], Any]], rounds: int, pause: float = PAUSE
) -> dict[Turn, list[Any]]:
    """What each gives in each of several rounds, in every one of which each has its turn.

    What slows the machine for a while then slows all of them. The order is another in each
    round, so that none always follows the same one.
    """
    found: dict[Turn, list[Any]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in random.Random(number).sample(list(turns), len(turns)):
            time.sleep(pause)
            found[name].append(turns[name]())
    return found
