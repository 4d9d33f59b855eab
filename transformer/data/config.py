"""The data section of a config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from transformer.data.tokenizer import TOKENIZERS
from transformer.data.toy import SIZES, TASKS
from transformer.errors import UserError
from transformer.knobs import Choice, Range, SizeOrZero, validate

Tokenizer = Annotated[str, Choice(TOKENIZERS)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, which of its splits serve what, and as which tokens."""

    dataset: str = "toy_strings"  # in data/datasets.py, or a name of TFDS
    task: Annotated[str, Choice(TASKS)] = "reverse"  # of toy_strings
    size: Annotated[str, Choice(SIZES)] = "small"  # of toy_strings
    source: str = "source"  # what the dataset calls the two texts of a pair
    target: str = "target"
    train: str = "train"  # TFDS splits, slices too: train[:10%]; of files, the file
    validation: str = "validation"
    test: str = "test"
    tokenizer: Tokenizer = "characters"  # in data/tokenizer.py
    target_tokenizer: Tokenizer | None = None  # None: one for both languages
    vocab_size: Annotated[int, Range(264, 2**20)] = 8_000  # at most; bpe, unigram
    max_length: SizeOrZero = 0  # tokens; longer examples are left out of training; 0: none is
    metrics: Sequence[str] = ()  # of decoded text; transformer/inference/text_metrics.py
    bleu_tokenizer: str = "13a"  # sacrebleu's; of Chinese zh, of Japanese ja-mecab or char
    num_workers: Annotated[int, Range(0, 1_000)] = 0  # that batch on the host; 0: on devices
    pack_length: SizeOrZero = 0  # tokens of a packed training row; 0: one example a row

    def __post_init__(self):
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        validate(self, "data.")

    def fields(self) -> tuple[str, str]:
        """What the dataset calls a pair's texts."""
        return self.source, self.target
