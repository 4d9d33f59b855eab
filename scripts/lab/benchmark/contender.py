"""The contenders, and the one interface that all of them implement."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.benchmark.task import Size


@dataclass(frozen=True)
class Setting:
    """What the process of a contender is started with.

    folder: where `task.save` has written the strings; for logs and parameters too.
    device: cpu or gpu. On a CPU everything is float32; on a GPU matrix products are bfloat16.
    threads: of a CPU.
    """

    size: Size
    folder: Path
    device: str
    threads: int


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


class Contender:
    """A model with its optimizer in one framework; its `Entry` says what it supports."""

    def start(self, seed: int, schedule: Schedule) -> None:
        """Initialises parameters and optimizer; the next step is the first."""

    def train(self, steps: int, batching: str) -> tuple[int, float]:
        """Takes steps and waits for them; their useful target tokens, and mean loss (nats)."""
        raise NotImplementedError

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        """The outputs [n, length] for sources [n, S], in their order.

        Args:
          source: symbols, EOS, then padding.
          batch: sources at a time.
          beams: beam size; 1: greedy.
          length: tokens of an output at most, EOS included.
        """
        raise NotImplementedError

    def memory(self) -> int | None:
        """Peak bytes on the device; None on a CPU."""
        return None

    def save(self, path: Path) -> None:
        """Writes the parameters."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        """Reads parameters that `save` of this contender, or of `Entry.weights`, has written."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entry:
    """Where a contender is found, and what it supports.

    title: its name in tables.
    where: its module in this package, and its class.
    needs: the packages that it imports.
    batchings: ways to make its batches; (): it is not trained. Training to the target uses that
      of `TUNED`, or else the last one.
    beams: beam sizes of decoding; 1: greedy.
    weights: the contender whose parameters it decodes with; "": its own.
    """

    title: str
    where: str
    needs: tuple[str, ...] = ()
    batchings: tuple[str, ...] = ("padded", "bucketed")
    beams: tuple[int, ...] = ()
    weights: str = ""

    def make(self, setting: Setting) -> Contender:
        """The contender."""
        module, name = self.where.split(":")
        return getattr(importlib.import_module(f"lab.benchmark.{module}"), name)(setting)

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


OURS = "ours"
CONTENDERS = {
    OURS: Entry("this library", "ours:Ours", (), ("packed",), (1, 4)),
    "pytorch": Entry("PyTorch", "torch_peers:PyTorch", ("torch",), beams=(1,)),
    "pytorch_compiled": Entry("PyTorch, compiled", "torch_peers:Compiled", ("torch",)),
    "marian": Entry(
        "Hugging Face Marian", "torch_peers:Marian", ("torch", "transformers"), beams=(1, 4)
    ),
    "x_transformers": Entry(
        "x-transformers", "torch_peers:XTransformers", ("torch", "x_transformers"), beams=(1,)
    ),
    "ctranslate2": Entry(
        "CTranslate2",
        "ctranslate2:CTranslate2",
        ("torch", "transformers", "ctranslate2"),
        batchings=(),
        beams=(1, 4),
        weights="marian",
    ),
}

# size → contender → (batching, peak learning rate) where they are not the default: the best of a
# grid, the same for all contenders, by `scripts/benchmark.py --what=search` of commit 71c91fa
# (docs/results/benchmark_settings.json).
TUNED = {"tiny": {"pytorch": ("padded", 4e-3), "marian": ("padded", 2e-3)}}
