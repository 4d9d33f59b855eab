"""Decoding: from a source to the model's own target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.model import Transformer
from transformer.recurrent import Recurrent


def greedy(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    length: int,
) -> Int[Array, "B {length}"]:
    """The likeliest token at each step, up to and with EOS, then padding.

    The encoder runs once, the memory's keys and values are projected once, and each
    step computes one target position against the cache. The loop stops when every
    row has ended, or at `length` tokens. A row without a source stays padding.
    """
    rows = source.shape[0]
    memory = model.encode(source, source_segments)
    cache = model.start_cache(memory, source_segments, length)
    tokens = jnp.full((rows, length), PAD, jnp.int32)
    last = jnp.full((rows, 1), BOS, jnp.int32)
    done = ~(source_segments > 0).any(-1)

    def going(carry):
        cache, _, _, done = carry
        return (cache.filled < length) & ~done.all()

    def step(carry):
        cache, tokens, last, done = carry
        logits, advanced = model.decode_step(last, cache)
        token = jnp.where(done, PAD, logits[:, 0].argmax(-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, cache.filled))
        return advanced, tokens, token[:, None], done | (token == EOS)

    return jax.lax.while_loop(going, step, (cache, tokens, last, done))[1]
