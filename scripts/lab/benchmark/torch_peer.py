"""What the peers in PyTorch share: the training loop, and decoding by length."""

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark import task
from lab.benchmark.batching import Batches, by_length
from lab.benchmark.contender import Contender, Schedule, Setting
from transformer.data.tokenizer import BOS, EOS, PAD

torch: Any = importlib.import_module("torch")  # an extra, of which the type checker is not to know


class TorchPeer(Contender):
    """A contender made of a `torch.nn.Module`; what it is, and how it decodes, its class says."""

    def __init__(self, setting: Setting):
        torch.set_num_threads(setting.threads)
        self.size = setting.size
        self.device = torch.device("cuda" if setting.device == "gpu" else "cpu")
        strings = task.load(setting.data, "train")
        self.lengths = strings.lengths()
        self.source, self.target = (
            torch.from_numpy(side).long().to(self.device)
            for side in (strings.source, strings.target)
        )
        self.summed, self.steps = torch.zeros((), device=self.device), 1

    def build(self) -> Any:
        """The module: (source [B, S], target_in [B, T]) → logits [B, T, V]."""
        raise NotImplementedError

    def outputs(self, source: Any, beams: int, length: int) -> Any:
        """The outputs [B, at most length] for a batch of sources on the device."""
        raise NotImplementedError

    def start(self, seed: int, schedule: Schedule) -> None:
        torch.manual_seed(seed)
        self.module = self.build().to(self.device)
        self.forward = self.module
        self.optimizer = torch.optim.Adam(
            self.module.parameters(),
            lr=schedule.learning_rate,
            betas=(0.9, 0.98),
            eps=1e-9,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule.factor)
        self.seed, self.step = seed, 0
        self.batches: dict[str, Batches] = {}

    def train(self, steps: int, batching: str) -> int:
        if batching not in self.batches:
            own = Batches(self.lengths, self.size.batch, self.seed, batching)
            self.batches[batching] = own
        self.module.train()
        self.summed, self.steps, tokens = torch.zeros((), device=self.device), steps, 0
        for step in range(self.step, self.step + steps):
            rows = self.batches[batching][step]
            tokens += int(self.lengths[rows].sum())
            self.summed += self.take_step(rows)
        self.step += steps
        self.wait()
        return tokens

    def take_step(self, rows: np.ndarray) -> Any:
        """One update from these strings, padded to the longest of them; the loss."""
        longest = int(self.lengths[rows].max())
        index = torch.from_numpy(rows).to(self.device)
        source, target = self.source[index, :longest], self.target[index, :longest]
        target_in = torch.nn.functional.pad(target[:, :-1], (1, 0), value=BOS)
        with self.precision():
            logits = self.forward(source, target_in)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=PAD
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def precision(self) -> Any:
        """float32 on a CPU, bfloat16 products on a GPU; parameters are float32 on both."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def loss(self) -> float:
        return float(self.summed) / self.steps

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        self.module.eval()
        lengths = (source != PAD).sum(1)
        decoded = np.full((len(source), length), PAD, source.dtype)
        with torch.inference_mode(), self.precision():
            for rows in by_length(lengths, batch):
                part = torch.from_numpy(source[rows, : lengths[rows].max()]).long()
                out = self.outputs(part.to(self.device), beams, length).cpu().numpy()
                decoded[rows, : out.shape[1]] = out
        return decoded

    def product(self, n: int) -> Callable[[], Any]:
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        left, right = (torch.randn(n, n, dtype=dtype, device=self.device) for _ in range(2))

        def call():
            torch.matmul(left, right)
            self.wait()

        return call

    def memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def save(self, path: Path) -> None:
        torch.save(self.module.state_dict(), path)

    def load(self, path: Path) -> None:
        self.module = self.build().to(self.device)
        self.module.load_state_dict(torch.load(path, map_location=self.device))
        self.forward = self.module


def greedy(step: Callable[[Any], Any], source: Any, length: int) -> Any:
    """The likeliest token after the whole target so far, until all rows have ended.

    Args:
      step: target_in [B, T] → logits of the next token [B, V].
      source: [B, S], which says how many rows there are and on what device.
      length: tokens at most.
    """
    rows = source.shape[0]
    tokens = torch.full((rows, 1), BOS, dtype=torch.long, device=source.device)
    done = torch.zeros(rows, dtype=torch.bool, device=source.device)
    for _ in range(length):
        token = step(tokens).argmax(-1).masked_fill(done, PAD)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        done |= token == EOS
        if done.all():
            break
    return tokens[:, 1:]
