"""The encoder-decoder Transformer, assembled from the config."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules import masking
from transformer.modules.attention import KeyValue, MultiHeadAttention
from transformer.modules.config import DTYPES, ModelConfig
from transformer.modules.dot_product_attention import SHORT_MASK_BACKENDS
from transformer.modules.dropout import Dropout, Moded, set_rate, stream_of
from transformer.modules.linear import (
    INITIALIZERS,
    Embed,
    embed_scaled,
    logits_of,
    scaled_embedding,
)
from transformer.modules.normalization import RMSNorm
from transformer.modules.positions import POSITIONS, in_row
from transformer.modules.recurrent import Recurrent
from transformer.modules.stacks import Decoder, Encoder


class Cache(NamedTuple):
    """The state of decoding, passed to and returned by `decode_step`.

    Entry t · J + j of `decoded` was computed by hypothesis j of a source at position t. It stays
    there if another hypothesis continues from it: beam search permutes `own`, not keys and values.

    filled: int32 scalar, the number of decoded target positions.
    decoded: each layer's self-attention keys and values, with room for the whole target.
    own: which entries belong to the past of each hypothesis.
    memory: each layer's cross-attention keys and values.
    source_segments: [B, S] int32.
    """

    filled: Int[Array, ""]
    decoded: tuple[KeyValue, ...]
    own: Bool[Array, "B J entries"]
    memory: tuple[KeyValue, ...]
    source_segments: Int[Array, "B S"]

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache in which hypothesis j continues hypothesis parents[:, j]."""
        return self._replace(own=jnp.take_along_axis(self.own, parents[..., None], axis=1))


class Transformer(Moded):
    """Vaswani et al. 2017, figure 1: tokens in, logits over the next target token out.

    Args:
      config: the architecture.
      vocab_size: V of the source.
      target_vocab_size: V of the target and the logits; None: the same.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        target_vocab_size: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        target_vocab_size = target_vocab_size or vocab_size
        dtype = DTYPES[config.dtype]

        def make_embedding(size: int) -> Embed:
            return scaled_embedding(size, config.d_model, dtype, rngs)

        def make_position(causal: bool) -> Any:
            return POSITIONS[config.position_encoding](
                config.d_model,
                num_heads=config.num_heads,
                max_length=config.random_positions or config.max_length,
                causal=causal,
                rngs=rngs,
            )

        self.config = config
        self.embedding = make_embedding(vocab_size)
        # If tied, `embedding` serves source, target and logits.
        tied = config.tie_embeddings
        self.target_embedding = nnx.data(None if tied else make_embedding(target_vocab_size))
        self.output_embedding = nnx.data(None if tied else make_embedding(target_vocab_size))
        self.source_position, self.target_position = make_position(False), make_position(True)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.encoder = Encoder(**stack_arguments(config), rngs=rngs)
        self.decoder = Decoder(**stack_arguments(config), rngs=rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        target_in: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        source_positions: Int[Array, "B S"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for each target position, given the source and the target before it.

        Args:
          source: tokens that the encoder reads.
          target_in: BOS and the target's tokens.
          source_segments: 0 = padding; in packed rows, the number of a token's example in its
            row. None: 1 where the token is not 0.
          target_segments: likewise; attention does not cross segments.
          source_positions: position of each token in its segment; None: in its row.
          target_positions: likewise.
          deterministic: whether to disable dropout; None: as set by `train()` and `eval()`.
          rngs: random keys for training; see `dropout.training_rngs`.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        source_segments = masking.segments_of(source, source_segments)
        target_segments = masking.segments_of(target_in, target_segments)
        memory = self.encode(source, source_segments, positions=source_positions, **mode)
        positions = self.positions(in_row(target_in, target_positions), **mode)
        mask = self.mask(target_segments, target_segments, causal=True, window=self.config.window)
        memory_mask = self.mask(target_segments, source_segments)
        x = self.decoder(
            self.embed_target(target_in, positions, **mode),
            memory,
            mask=mask,
            memory_mask=memory_mask,
            token_mask=target_segments > 0,
            **attention_positions(self.target_position, positions, positions),
            **mode,
        )
        return self.logits(x)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"] | None = None,
        *,
        positions: Int[Array, "B S"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the encoder's output, the memory; the arguments are those of `__call__`."""
        mode = {"deterministic": deterministic, "rngs": rngs}
        source_segments = masking.segments_of(source, source_segments)
        positions = self.positions(in_row(source, positions), **mode)
        x = self.source_position(embed_scaled(self.embedding, source), positions)
        x = self.dropout(x, **mode)
        return self.encoder(
            x,
            mask=self.mask(source_segments, source_segments, window=self.config.window),
            token_mask=source_segments > 0,
            **attention_positions(self.source_position, positions, positions),
            **mode,
        )

    def positions(
        self,
        index: Int[Array, "#B T"],
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Int[Array, "#B T"]:
        """Returns the positions of tokens, given their index in their sequences.

        With `random_positions` L, the positions of a training batch are drawn from 0 … L - 1
        without replacement and sorted (Ruoss et al. 2023, section 3). In evaluation, where the
        paper draws again, they are deterministic: multiples of L / `max_length`.
        """
        reach = self.config.random_positions
        if not reach:
            return index
        if self.is_deterministic(deterministic):
            return index * (reach // self.config.max_length)
        # The longest possible example; a packed row may be longer.
        length = self.config.max_length
        length = min(index.shape[1], length) if index.shape[0] == 1 else length
        stream = stream_of("positions", rngs, self.dropout.rngs)
        if stream is None:
            raise ValueError("random positions need random keys in training: pass rngs=")
        drawn = jax.random.choice(stream(), reach, (length,), replace=False)
        return jnp.sort(drawn)[index]

    def mask(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"], **structure: Any
    ) -> masking.Mask | Bool[Array, "B 1 T S"]:
        """Returns the mask between segments, as a `Mask` if the attention backend takes one."""
        mask = masking.Mask(queries, keys, **structure)
        short = self.config.attention_backend in SHORT_MASK_BACKENDS
        return mask if short else mask.array()

    def embed_target(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"], **mode: Any
    ) -> Float[Array, "B T D"]:
        """Returns the decoder's input: embedded target tokens with positions, after dropout."""
        x = embed_scaled(self.target_embedding or self.embedding, tokens)
        return self.dropout(self.target_position(x, positions), **mode)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of the next target token, float32."""
        return logits_of(self.output_embedding or self.embedding, x)

    def start_cache(
        self,
        memory: Float[Array, "B S D"],
        source_segments: Int[Array, "B S"],
        length: int,
        hypotheses: int = 1,
    ) -> Cache:
        """Returns an empty cache for up to `length` target positions per hypothesis."""
        heads, entries = self.config.num_kv_heads or self.config.num_heads, length * hypotheses
        widths = self.config.attention_width(), self.config.values_width()
        shape = (len(memory), heads, entries)
        empty = KeyValue(*(jnp.zeros((*shape, width), memory.dtype) for width in widths))
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            decoded=(empty,) * self.config.num_layers,
            own=jnp.zeros((len(memory), hypotheses, entries), bool),
            memory=self.decoder.project_memory(memory),
            source_segments=source_segments,
        )

    def decode_step(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Returns the logits after each of the next T target tokens, and the updated cache.

        The logits equal those of a call with the whole target at positions `cache.filled …
        cache.filled + T - 1`. With J > 1 hypotheses T = J: the next token of each. Logits past the
        length of the cache are NaN.
        """
        filled, (hypotheses, entries) = cache.filled, cache.own.shape[1:]
        steps, room = tokens.shape[1] // hypotheses, entries // hypotheses
        index = jnp.full(tokens.shape, filled)
        if hypotheses == 1:
            index = filled + jnp.arange(steps)[None]
            mask = masking.causal(steps, room, filled)
        else:
            new = jnp.eye(hypotheses, dtype=bool)[None].repeat(len(tokens), axis=0)
            own = jax.lax.dynamic_update_slice_in_dim(cache.own, new, filled * hypotheses, axis=2)
            cache, mask = cache._replace(own=own), own[:, None]
        if self.config.window is not None:
            near = masking.window(steps, room, self.config.window, filled)
            mask = mask & jnp.repeat(near, hypotheses, axis=3)
        positions = self.positions(index, True)
        keys = self.positions(jnp.arange(entries)[None] // hypotheses, True)
        x, decoded = self.decoder.decode_step(
            self.embed_target(tokens, positions, deterministic=True),
            cache.memory,
            cache.decoded,
            filled * hypotheses,
            mask=mask,
            memory_mask=masking.padding(cache.source_segments > 0),
            **attention_positions(self.target_position, positions, keys),
        )
        logits = jnp.where(filled + steps <= room, self.logits(x), jnp.nan)
        return logits, cache._replace(filled=filled + steps, decoded=decoded)


def stack_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of `Encoder` and `Decoder`, except `rngs`."""
    qk_epsilon = config.qk_norm_epsilon or config.norm_epsilon
    return {
        "num_layers": config.num_layers,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "d_ff": config.d_ff,
        "scan_layers": config.scan_layers,
        "remat": config.remat,
        "dropout_rate": config.dropout_rate,
        "attention_dropout_rate": config.attention_dropout_rate,
        "norm": config.norm,
        "norm_placement": config.norm_placement,
        "norm_epsilon": config.norm_epsilon,
        "feed_forward": config.feed_forward,
        "kernel_init": INITIALIZERS[config.kernel_init],
        "dtype": DTYPES[config.dtype],
        "param_dtype": jnp.float32,
        "qkv_features": config.num_heads * config.attention_width(),
        "value_features": config.num_heads * config.values_width(),
        "num_kv_heads": config.num_kv_heads,
        "use_bias": config.attention_bias,
        "normalize_qk": config.normalize_qk,
        "qk_norm": partial(RMSNorm, epsilon=qk_epsilon),
        "backend": config.attention_backend,
    }


def attention_positions(
    position: Any, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
) -> dict[str, Any]:
    """Returns the arguments `rotate` and `bias` of self-attention for a position encoding."""
    rotate = partial(position.rotate, positions=queries)
    return {"rotate": rotate, "bias": position.bias(queries, keys)}


def make_recurrent(
    config: ModelConfig,
    vocab_size: int,
    target_vocab_size: int | None = None,
    *,
    rngs: nnx.Rngs,
) -> Recurrent:
    """Returns the recurrent baseline; it ignores options that do not apply."""
    return Recurrent(
        vocab_size,
        target_vocab_size,
        d_model=config.d_model,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        cell=config.cell,
        dropout_rate=config.dropout_rate,
        tie_embeddings=config.tie_embeddings,
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


# The entries of `config.ARCHITECTURES`.
MODULES: dict[str, Callable[..., Any]] = {"transformer": Transformer, "recurrent": make_recurrent}


def set_dropout_rates(module: nnx.Module, dropout_rate: Any, attention_dropout_rate: Any) -> None:
    """Sets the dropout rates of a model to numbers or traced scalars."""
    set_rate(module, Dropout, rate=dropout_rate)
    set_rate(module, MultiHeadAttention, dropout_rate=attention_dropout_rate)
