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

    dataset: str = "toy_strings"  # of data/datasets.py, or a name of TFDS
    task: Annotated[str, Choice(TASKS)] = "reverse"  # of toy_strings; TASKS in data/toy.py
    size: Annotated[str, Choice(SIZES)] = "small"  # of toy_strings; SIZES in data/toy.py
    source: str = "source"  # the field of the source text
    target: str = "target"  # the field of the target text
    train: str = "train"  # TFDS split or slice, such as train[:10%]; for files, a file
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    tokenizer: Tokenizer = "characters"  # TOKENIZERS in data/tokenizer.py
    target_tokenizer: Tokenizer | None = None  # None: one for both sides
    vocab_size: Annotated[int, Range(264, 2**20)] = 8_000  # at most, of bpe and unigram
    max_length: SizeOrZero = 0  # filters out longer training examples; 0: no filter
    metrics: Sequence[str] = ()  # of decoded text; TEXT_METRICS in inference/text_metrics.py
    bleu_tokenizer: str = "13a"  # of sacrebleu; for Chinese zh, for Japanese ja-mecab or char
    num_workers: Annotated[int, Range(0, 1_000)] = 0  # that make batches; 0: rows on devices
    pack_length: SizeOrZero = 0  # tokens of a packed training row; 0: one example a row

    def __post_init__(self):
        if not isinstance(self.metrics, tuple | list):
            raise UserError(f"data.metrics={self.metrics}: names, such as ('bleu','chrf')")
        object.__setattr__(self, "metrics", tuple(self.metrics))  # JSON makes lists of tuples
        validate(self, "data.")

    def fields(self) -> tuple[str, str]:
        """The dataset's names of the two texts."""
        return self.source, self.target
