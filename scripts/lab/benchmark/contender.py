"""The contenders, and the one interface that all of them implement."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lab.benchmark.task import Size


@dataclass(frozen=True)
class Setting:
    """What the process of a contender is started with."""

    size: Size
    folder: Path  # of the pairs (`task.save`), logs and parameters
    device: str  # cpu: everything is float32; gpu: matrix products are bfloat16
    threads: int  # of a CPU


@dataclass(frozen=True)
class Schedule:
    """Adam (0.9, 0.98, 1e-9), gradients clipped to norm 1, linear warmup, linear decay to 0."""

    learning_rate: float
    warmup_steps: int
    steps: int

    def factor(self, step: int) -> float:
        """The learning rate of the update after `step` others, as a fraction of its peak."""
        if step + 1 < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(self.steps - step - 1, 0) / max(self.steps - self.warmup_steps, 1)


class Contender(Protocol):
    """A model with its optimizer in one framework; its `Entry` says what it supports."""

    def start(self, seed: int, schedule: Schedule) -> None:
        """Initialises parameters and optimizer; the next step is the first."""

    def train(self, steps: int, batching: str) -> tuple[int, float]:
        """Takes steps and waits for them; their useful target tokens, and mean loss (nats)."""
        ...

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        """The outputs [n, length] for sources [n, S], in their order, `batch` at a time."""
        ...

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None:
        """Reads parameters that `save` of this contender, or of `Entry.weights`, has written."""


@dataclass(frozen=True)
class Entry:
    """Where a contender is found, and what it supports."""

    title: str  # its name in tables
    where: str  # its module in this package, and its class
    needs: tuple[str, ...] = ()  # packages that it imports
    batchings: tuple[str, ...] = ("padded", "bucketed")  # how batches are made; (): not trained
    beams: tuple[int, ...] = ()  # beam sizes of decoding; 1: greedy
    weights: str = ""  # the contender whose parameters it decodes with, if not its own
    threads: int | None = None  # of a CPU, if not the benchmark's

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


OURS = "ours"
MARIAN, X, SORTED = ("torch", "transformers"), ("torch", "x_transformers"), ("bucketed",)
CONTENDERS = {
    OURS: Entry("this library", "ours:Ours", (), ("packed",), (1, 4)),
    "pytorch": Entry("PyTorch", "torch_peers:PyTorch", ("torch",), beams=(1,)),
    "pytorch_compiled": Entry("PyTorch, compiled", "torch_peers:Compiled", ("torch",)),
    "marian": Entry("Hugging Face Marian", "torch_peers:Marian", MARIAN, beams=(1, 4)),
    "marian_compiled": Entry("Marian, compiled", "torch_peers:CompiledMarian", MARIAN, SORTED),
    "marian_one_thread": Entry("Marian, 1 thread", "torch_peers:Marian", MARIAN, SORTED, threads=1),
    "x_transformers": Entry("x-transformers", "torch_peers:XTransformers", X, beams=(1,)),
    "ctranslate2": Entry(
        "CTranslate2", "ctranslate2:CTranslate2", (*MARIAN, "ctranslate2"), (), (1, 4), "marian"
    ),
    "imported": Entry("this library, imported", "imported:Imported", MARIAN, (), (1, 4), "marian"),
    "same": Entry("the same, trained here", "imported:Same", MARIAN, (), (1, 4), "marian"),
}

IMPORTED = ("imported", "same")  # with the parameters of Marian, for a part of their own

# size → contender → (batching, peak learning rate) of training to the target, if not the default:
# the best of a grid that was the same for all (docs/results/benchmark_settings.json).
TUNED = {"tiny": {"pytorch": ("padded", 4e-3), "marian": ("padded", 2e-3)}}
