"""What takes part in the benchmark, and what each of them can be asked to do."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark.task import Size


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a contender's process is told when it starts.

    size: of the model and its task.
    data: the file with the strings; see `task.save`.
    device: cpu or gpu. On a CPU all is float32; on a GPU products are bfloat16.
    threads: of a CPU.
    """

    size: Size
    data: Path
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a model is trained: Adam (0.9, 0.98, 1e-9), gradients clipped to norm 1.

    learning_rate: its highest value.
    warmup_steps: in which it climbs in a straight line.
    name: what follows, one of `SCHEDULES`.
    steps: where it ends.
    """

    learning_rate: float
    warmup_steps: int
    name: str
    steps: int

    def factor(self, step: int) -> float:
        """What the learning rate is times at the update after `step` others."""
        if step + 1 < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        since = (step + 1 - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return SCHEDULES[self.name](min(since, 1.0))


# As `transformer.training.optimizer` has them, of the part that is over; the peers do without JAX.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda since: 1.0 - since,
    "cosine": lambda since: (1.0 + math.cos(math.pi * since)) / 2.0,
    "constant": lambda since: 1.0,
}


class Contender:
    """A model with its optimizer, in one framework; it has of these what its `Entry` says."""

    def start(self, seed: int, schedule: Schedule) -> None:
        """Draws fresh parameters; the next step is the first."""

    def train(self, steps: int, batching: str) -> int:
        """Takes the next steps and waits for them; the useful target tokens in them."""
        raise NotImplementedError

    def loss(self) -> float:
        """Nats a token: the mean over the steps of the last call of `train`."""
        raise NotImplementedError

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        """The outputs [n, length] for the sources [n, S], in their order, padded at their end.

        Args:
          source: ends with EOS, then padding.
          batch: sources at a time.
          beams: 1: greedy.
          length: tokens of an output at most, EOS included.
        """
        raise NotImplementedError

    def product(self, n: int) -> Callable[[], Any]:
        """A call that multiplies two n × n matrices and waits for the result."""
        raise NotImplementedError

    def memory(self) -> int | None:
        """The most bytes held on the device so far; None on a CPU."""
        return None

    def flops(self) -> int | None:
        """Of the matrix products that a training step carries out; None: not known."""
        return None

    def save(self, path: Path) -> None:
        """Writes the parameters."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        """After `start`: reads parameters that `save` wrote, its own or `Entry.weights`'s."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How a contender is found and what it can do.

    title: as tables show it.
    where: its module and class in this package.
    needs: packages.
    batchings: how its batches can be made; none: it is not trained. The last one serves where
      it is trained to its end.
    beams: how wide its decoding can be; 1: greedy.
    learns: whether it is trained to its end.
    weights: whose parameters it decodes with; empty: its own.
    products: whether it also multiplies matrices, for the rate that the device can reach.
    """

    title: str
    where: str
    needs: tuple[str, ...] = ()
    batchings: tuple[str, ...] = ("padded", "bucketed")
    beams: tuple[int, ...] = ()
    learns: bool = True
    weights: str = ""
    products: bool = False

    def make(self, setting: Setting) -> Contender:
        """The contender, its packages imported and its model built, without parameters yet."""
        module, name = self.where.split(":")
        package = importlib.import_module(f"lab.benchmark.{module}")
        return getattr(package, name)(setting)

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


OURS = "ours"

CONTENDERS: dict[str, Entry] = {
    OURS: Entry(
        title="this code",
        where="ours:Ours",
        batchings=("packed",),
        beams=(1, 4),
        products=True,
    ),
    "pytorch": Entry(
        title="PyTorch",
        where="pytorch:PyTorch",
        needs=("torch",),
        beams=(1,),
        products=True,
    ),
    "pytorch_compiled": Entry(
        title="PyTorch, compiled",
        where="pytorch:Compiled",
        needs=("torch",),
        learns=False,
    ),
    "marian": Entry(
        title="Hugging Face Marian",
        where="marian:Marian",
        needs=("torch", "transformers"),
        beams=(1, 4),
    ),
    "x_transformers": Entry(
        title="x-transformers",
        where="x_transformers:XTransformers",
        needs=("torch", "x_transformers"),
        beams=(1,),
    ),
    "ctranslate2": Entry(
        title="CTranslate2, all threads on a batch",
        where="ctranslate2:OneWorker",
        needs=("torch", "transformers", "ctranslate2"),
        batchings=(),
        beams=(1, 4),
        learns=False,
        weights="marian",
    ),
    "ctranslate2_workers": Entry(
        title="CTranslate2, a worker a thread",
        where="ctranslate2:WorkerAThread",
        needs=("torch", "transformers", "ctranslate2"),
        batchings=(),
        beams=(1, 4),
        learns=False,
        weights="marian",
    ),
}
