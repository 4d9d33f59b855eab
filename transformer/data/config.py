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
    """The dataset, its splits, the tokenizers, packing and text metrics."""

    dataset: str = "toy_strings"  # DATASETS in data/datasets.py, or a name in TFDS
    task: Annotated[str, Choice(TASKS)] = "reverse"  # for toy_strings; TASKS in data/toy.py
    size: Annotated[str, Choice(SIZES)] = "small"  # for toy_strings; SIZES in data/toy.py
    source: str = "source"  # the field of the source text
    target: str = "target"  # the field of the target text
    train: str = "train"  # TFDS split or slice, such as train[:10%]; for files, a file
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    tokenizer: Tokenizer = "characters"  # TOKENIZERS in data/tokenizer.py
    target_tokenizer: Tokenizer | None = None  # None: one for both sides
    vocab_size: Annotated[int, Range(264, 2**20)] = 8_000  # maximum, for words, bpe, unigram
    max_length: SizeOrZero = 0  # filters out longer training examples; 0: no filter
    metrics: Sequence[str] = ()  # for decoded text; TEXT_METRICS in inference/text_metrics.py
    bleu_tokenizer: str = "13a"  # sacrebleu's tokenizer; zh for Chinese, ja-mecab for Japanese
    num_workers: Annotated[int, Range(0, 1_000)] = 0  # to stream batches; 0: rows on devices
    pack_length: SizeOrZero = 0  # length of packed training rows; 0: one example per row

    def __post_init__(self):
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        validate(self, "data.")

    def fields(self) -> tuple[str, str]:
        """The dataset's field names of the two texts."""
        return self.source, self.target
