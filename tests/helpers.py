"""What several test files share: small models, every variant of the tables, a batch of strings."""

import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs import base
from transformer.data.batches import Batch, make_batch
from transformer.data.data_config import DataConfig
from transformer.data.tokenizer import SymbolTokenizer
from transformer.data.toy import ALPHABET
from transformer.dot_product_attention import ATTENTION_BACKENDS, BFLOAT16_BACKENDS
from transformer.dropout import Training, streams
from transformer.layers import FEED_FORWARDS, NORM_PLACEMENTS
from transformer.model import Model, Params
from transformer.model_config import ModelConfig
from transformer.normalization import NORMS
from transformer.positions import POSITIONS
from transformer.recurrent import CELLS

TOKENIZER = SymbolTokenizer(ALPHABET)

# The environment of a program that compiles as a user's does (conftest.py).
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def data_config(**changes: Any) -> DataConfig:
    """The data section of `configs/base.py` at its smallest size, but for `changes`."""
    return DataConfig(**dict(base.get_config().data) | {"size": "tiny"} | changes)


# Every entry of every table, one at a time: the small model but for that. (`init` is not among
# them, for these tests draw their own parameters: test_layers.py has one over `INITIALIZERS`.)
ENTRIES: list[dict[str, Any]] = [
    {knob: value}
    for knob, values in {
        "norm": NORMS,
        "norm_placement": NORM_PLACEMENTS,
        "position": POSITIONS,
        "attention_backend": [name for name in ATTENTION_BACKENDS if name not in BFLOAT16_BACKENDS],
        "feed_forward": FEED_FORWARDS,
    }.items()
    for value in values
    if base.get_config().model[knob] != value
]

# Other knobs, and knobs that meet.
OTHERS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False},
    {"attention_bias": True},
    {"qk_norm": True},
    {"layers": 2},
    {"heads": 1},
    {"head_width": 3},
    {"value_width": 5},
    {"kv_heads": 1},
    {"heads": 4, "kv_heads": 2},
    {"window": 2},
    {"fused_qkv": True, "attention_bias": True},
    {"layers": 2, "scan_layers": True, "remat": "full"},
    {"layers": 2, "scan_layers": True, "norm": "batch"},
    {"layers": 2, "remat": "dots", "norm": "batch"},
    {"norm": "batch", "norm_placement": "both"},
    *({"random_positions": 64, "position": name} for name in POSITIONS if name != "none"),
    *({"architecture": "recurrent", "cell": name} for name in CELLS),
    {"architecture": "recurrent", "layers": 2, "tie_embeddings": False},
]

VARIANTS: dict[str, dict[str, Any]] = {
    ",".join(f"{knob}={value}" for knob, value in changes.items()) or "small": changes
    for changes in ENTRIES + OTHERS
}


@cache
def small_model(**changes: Any) -> Model:
    """One layer of width 16, so that a test takes a second."""
    config: Any = base.get_config().model
    config.update({"layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_length": 32})
    config.update(changes)
    return Model(ModelConfig(**config), TOKENIZER.vocab_size)


def random_params(model: Model, seed: int) -> Params:
    """Variables that are all random, biases and gains too, and quicker to make than `init`'s."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        noise = rng.normal(size=shape)
        special = {
            "gain": 1.0 + 0.1 * noise,
            "bias": 0.1 * noise,
            "mean": 0.3 * noise,
            "variance": np.exp(0.3 * noise),
        }
        values = special.get(name.split("/")[-1], noise * model.config.width**-0.5)
        return jnp.asarray(values, jnp.float32)

    return {name: draw(name, leaf.shape) for name, leaf in model.shapes.items()}


def training_of(model: Model, key: Array) -> Training:
    """What a call of `model` gets in training."""
    config = model.config
    return Training(streams(key), config.dropout, config.attention_dropout)


@partial(jax.jit, static_argnums=0)
def logits_of(
    model: Model, params: Params, batch: Batch, dropout: Array | None = None
) -> Float[Array, "B T V"]:
    """The model's logits for a batch, those of training if a key is given."""
    return model.bind(params)(
        batch.source,
        batch.source_segments,
        batch.target_in,
        batch.target_segments,
        source_positions=batch.source_positions,
        target_positions=batch.target_positions,
        training=None if dropout is None else training_of(model, dropout),
    )


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
