"""What several test files share: small models, every variant of the tables, a batch of strings."""

import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from configs import base
from transformer.attention import ATTENTION_BACKENDS
from transformer.data.batches import Batch, make_batch
from transformer.data.tokenizer import CharTokenizer
from transformer.data.toy import ALPHABET
from transformer.layers import ACTIVATIONS, NORM_PLACEMENTS
from transformer.model import Model, ModelConfig, Params
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
        "layers": [2],
        "heads": [1],
        "head_width": [3],
    }.items()
    for value in values
}


@cache
def small_model(**changes: Any) -> Model:
    """One layer of width 16, so that a test takes a second."""
    config: Any = base.get_config().model
    config.update({"layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_length": 32})
    config.update(changes)
    return Model(ModelConfig(**config), TOKENIZER.vocab_size)


def random_params(model: Model, seed: int) -> Params:
    """Parameters that are all random, biases and gains too, and quicker to make than `init`'s."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith(("gain", "bias")):
            values = name.endswith("gain") + 0.1 * rng.normal(size=shape)
        else:
            values = rng.normal(size=shape) * model.config.width**-0.5
        return jnp.asarray(values, jnp.float32)

    return {name: draw(name, leaf.shape) for name, leaf in model.shapes.items()}


@partial(jax.jit, static_argnums=0)
def logits_of(
    model: Model, params: Params, batch: Batch, dropout: Array | None = None
) -> Float[Array, "B T V"]:
    """The model's logits for a batch, with dropout if a key is given."""
    return model.bind(params)(
        batch.source,
        batch.source_segments,
        batch.target_in,
        batch.target_segments,
        rngs=None if dropout is None else nnx.Rngs(dropout=dropout),
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
