"""The data section of a config."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformer.data import toy
from transformer.data.tokenizer import TOKENIZERS
from transformer.errors import UserError, choose, within
from transformer.text_metrics import BLEU_TOKENIZERS, METRICS


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, which of its splits serve what, and as which tokens.

    `configs/base.py` explains each knob.
    """

    dataset: str
    task: str
    size: str
    source: str
    target: str
    train: str
    validation: str
    test: str
    tokenizer: str
    target_tokenizer: str | None
    vocab_size: int
    longest: int
    metrics: Sequence[str]
    bleu_tokenizer: str
    workers: int
    pack: int

    def __post_init__(self):
        choose(toy.TASKS, self.task, "data.task")
        choose(toy.SIZES, self.size, "data.size")
        choose(TOKENIZERS, self.tokenizer, "data.tokenizer")
        if self.target_tokenizer is not None:
            choose(TOKENIZERS, self.target_tokenizer, "data.target_tokenizer")
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        for name in self.metrics:
            choose(METRICS, str(name), "data.metrics")
        choose(dict.fromkeys(BLEU_TOKENIZERS), self.bleu_tokenizer, "data.bleu_tokenizer")
        within("data.vocab_size", self.vocab_size, 264, 2**20)
        within("data.longest", self.longest, 0, 2**20)
        within("data.workers", self.workers, 0, 1_000)
        within("data.pack", self.pack, 0, 2**20)

    def fields(self) -> tuple[str, str]:
        """What the dataset calls a pair's texts."""
        return self.source, self.target
