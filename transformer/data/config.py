"""The data section of a config."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformer.data import toy
from transformer.data.tokenizer import TOKENIZERS
from transformer.errors import UserError, choose, within


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, which of its splits serve what, and as which tokens."""

    dataset: str = "toy_strings"  # transformer/data/datasets.py: DATASETS; or a name of TFDS
    task: str = "reverse"  # of toy_strings; transformer/data/toy.py: TASKS
    size: str = "small"  # of toy_strings; transformer/data/toy.py: SIZES
    source: str = "source"  # what the dataset calls the two texts of a pair
    target: str = "target"
    train: str = "train"  # TFDS splits, slices too: train[:10%]; of files, the file
    validation: str = "validation"
    test: str = "test"
    tokenizer: str = "characters"  # transformer/data/tokenizer.py: TOKENIZERS
    target_tokenizer: str | None = None  # None: one for both languages
    vocab_size: int = 8_000  # pieces to learn, at most, for bpe and unigram
    max_length: int = 0  # tokens; longer examples are left out of training; 0: none is
    metrics: Sequence[str] = ()  # of decoded text; transformer/inference/text_metrics.py
    bleu_tokenizer: str = "13a"  # sacrebleu's; of Chinese zh, of Japanese ja-mecab or char
    num_workers: int = 0  # processes that make batches on the host; 0: all rows lie on devices
    pack_length: int = 0  # tokens a row of training, with as many examples as fit; 0: one a row

    def __post_init__(self):
        choose(toy.TASKS, self.task, "data.task")
        choose(toy.SIZES, self.size, "data.size")
        choose(TOKENIZERS, self.tokenizer, "data.tokenizer")
        if self.target_tokenizer is not None:
            choose(TOKENIZERS, self.target_tokenizer, "data.target_tokenizer")
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        within("data.vocab_size", self.vocab_size, 264, 2**20)
        within("data.max_length", self.max_length, 0, 2**20)
        within("data.num_workers", self.num_workers, 0, 1_000)
        within("data.pack_length", self.pack_length, 0, 2**20)

    def fields(self) -> tuple[str, str]:
        """What the dataset calls a pair's texts."""
        return self.source, self.target
