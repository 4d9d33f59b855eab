"""What several test files share: small models, every variant of the tables, a batch of strings."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs import base
from transformer.attention import ATTENTION_BACKENDS
from transformer.data.batches import Batch, make_batch
from transformer.data.tokenizer import CharTokenizer
from transformer.data.toy import ALPHABET
from transformer.layers import ACTIVATIONS, NORM_PLACEMENTS
from transformer.model import Model, ModelConfig
from transformer.normalization import NORMS
from transformer.positions import POSITIONS

TOKENIZER = CharTokenizer(ALPHABET)

# One change each from the small model, over every entry of every table.
VARIANTS: dict[str, dict[str, Any]] = {
    f"{knob}={value}": {knob: value}
    for knob, values in {
        "norm": NORMS,
        "norm_placement": NORM_PLACEMENTS,
        "position": POSITIONS,
        "attention_backend": ATTENTION_BACKENDS,
        "activation": ACTIVATIONS,
        "tie_embeddings": [False],
        "attention_bias": [True],
        "heads": [1],
        "head_width": [3],
    }.items()
    for value in values
}


def small_model(**changes: Any) -> Model:
    """Two layers of width 16, so that a test takes seconds."""
    config: Any = base.get_config().model
    config.update({"layers": 2, "width": 16, "heads": 2, "ff_width": 32, "max_length": 32})
    config.update(changes)
    return Model(ModelConfig(**config), TOKENIZER.vocab_size)


def strings(*pairs: tuple[str, str], source_length: int = 0, target_length: int = 0) -> Batch:
    """A batch of (source, target) strings, padded to the longest or further."""
    columns = []
    for texts, length in zip(zip(*pairs, strict=True), (source_length, target_length), strict=True):
        rows = [TOKENIZER.encode(text) for text in texts]
        padded = itertools.zip_longest(*rows, fillvalue=0)
        tokens = np.array(list(padded), np.int32).T
        missing = max(0, length - tokens.shape[1])
        columns.append(jnp.asarray(np.pad(tokens, ((0, 0), (0, missing)))))
    return make_batch(*columns)
