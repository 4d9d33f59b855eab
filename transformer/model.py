"""The encoder-decoder Transformer: the one place where the parts are put together."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer import masking
from transformer.attention import ATTENTION_BACKENDS, KeyValue, MultiHeadAttention
from transformer.errors import UserError, choose
from transformer.layers import (
    ACTIVATIONS,
    NORM_PLACEMENTS,
    Embedding,
    FeedForward,
    Residual,
    dropout,
)
from transformer.normalization import NORMS
from transformer.positions import POSITIONS

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}

# The attention weights [B, N, T, S] of each layer, under "encoder", "decoder", "cross".
Maps = dict[str, list[Array]]

# Name → array; or its ShapeDtypeStruct or sharding, where only those are known.
Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. `configs/base.py` explains each knob and holds its default.

    Raises:
      UserError: a name is unknown, or the numbers contradict each other.
    """

    layers: int
    width: int
    heads: int
    head_width: int | None
    ff_width: int
    activation: str
    dropout: float
    norm: str
    norm_placement: str
    norm_epsilon: float
    position: str
    max_length: int
    tie_embeddings: bool
    attention_bias: bool
    attention_backend: str
    dtype: str

    def __post_init__(self):
        choose(ACTIVATIONS, self.activation, "model.activation")
        choose(NORMS, self.norm, "model.norm")
        choose(
            {name: name for name in NORM_PLACEMENTS}, self.norm_placement, "model.norm_placement"
        )
        choose(POSITIONS, self.position, "model.position")
        choose(ATTENTION_BACKENDS, self.attention_backend, "model.attention_backend")
        choose(DTYPES, self.dtype, "model.dtype")
        for name in ("layers", "width", "heads", "ff_width", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: it must be at least 1")
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                "choose heads that do, or set model.head_width"
            )
        if self.head_width is not None and self.head_width < 1:
            raise UserError(f"model.head_width={self.head_width}: it must be at least 1")
        if self.position == "sinusoidal" and self.width % 2:
            raise UserError(
                f"model.width={self.width} is odd: sinusoidal positions come in pairs of sine and "
                "cosine; choose an even width or another model.position"
            )
        if not self.norm_epsilon > 0.0:
            raise UserError(f"model.norm_epsilon={self.norm_epsilon}: it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout={self.dropout}: it must be at least 0 and below 1")

    def reach(self, length: int) -> int:
        """`length`, or as many tokens as there are positions for."""
        return min(length, self.max_length) if POSITIONS[self.position].limited else length

    def check_length(self, length: int, what: str) -> None:
        """Raises a UserError if positions do not reach to `length` tokens."""
        if self.reach(length) < length:
            raise UserError(
                f"{what}: {length} tokens, and model.position={self.position} has "
                f"model.max_length={self.max_length}; raise it, or choose sinusoidal positions"
            )


class Cache(NamedTuple):
    """What decoding carries from token to token; passed in and handed back, never stored.

    filled: int32 scalar, how many target positions have been decoded.
    decoded: each layer's self-attention keys and values, with room for the whole target.
    memory: each layer's cross-attention keys and values, computed once.
    source_segments: [B, S] int32.
    """

    filled: Int[Array, ""]
    decoded: tuple[KeyValue, ...]
    memory: tuple[KeyValue, ...]
    source_segments: Int[Array, "B S"]


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    """Multi-head attention of the model's sizes."""
    return MultiHeadAttention(
        config.width,
        config.heads,
        config.head_width or config.width // config.heads,
        use_bias=config.attention_bias,
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


def make_feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
    """The feed-forward sublayer of the model's sizes."""
    return FeedForward(
        config.width,
        config.ff_width,
        activation=config.activation,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


def make_residual(config: ModelConfig) -> Residual:
    """The connection around one sublayer."""
    return Residual(
        config.width,
        norm=config.norm,
        epsilon=config.norm_epsilon,
        placement=config.norm_placement,
        dropout=config.dropout,
    )


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward, each inside a residual connection."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.self_attention = make_attention(config, rngs)
        self.feed_forward = make_feed_forward(config, rngs)
        self.residuals = nnx.List([make_residual(config) for _ in range(2)])

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "#B 1 #S S"],
        rngs: nnx.Rngs | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B S D"]:
        attention, feed_forward = self.residuals
        h = attention.input(x)
        key_value = self.self_attention.project(h)
        x = attention.add(x, self.self_attention(h, key_value, mask, maps=maps), rngs)
        return feed_forward.add(x, self.feed_forward(feed_forward.input(x)), rngs)


class DecoderLayer(nnx.Module):
    """Masked self-attention, attention to the encoder's memory, feed-forward."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.self_attention = make_attention(config, rngs)
        self.cross_attention = make_attention(config, rngs)
        self.feed_forward = make_feed_forward(config, rngs)
        self.residuals = nnx.List([make_residual(config) for _ in range(3)])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B 1 T _"],
        memory: KeyValue,
        memory_mask: Bool[Array, "#B 1 T S"],
        cache: tuple[KeyValue, Int[Array, ""]] | None = None,
        rngs: nnx.Rngs | None = None,
        maps: Maps | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Returns the layer's output and its self-attention keys and values.

        Args:
          x: the target positions to compute.
          mask: among the target positions, or to the cache's.
          memory: keys and values that `cross_attention` projected from the memory.
          memory_mask: from target positions to source positions.
          cache: keys and values of earlier positions, and where x's are to be written.
          rngs: for dropout; None in evaluation.
          maps: takes the attention weights.
        """
        self_attention, cross_attention, feed_forward = self.residuals
        h = self_attention.input(x)
        key_value = self.self_attention.project(h)
        if cache is not None:
            earlier, index = cache
            key_value = earlier.write(key_value, index)
        y = self.self_attention(h, key_value, mask, maps=maps["decoder"] if maps else None)
        x = self_attention.add(x, y, rngs)
        h = cross_attention.input(x)
        y = self.cross_attention(h, memory, memory_mask, maps=maps["cross"] if maps else None)
        x = cross_attention.add(x, y, rngs)
        return feed_forward.add(x, self.feed_forward(feed_forward.input(x)), rngs), key_value


class Encoder(nnx.Module):
    """A stack of L encoder layers; with pre-norm, one more norm at its end."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = final_norm(config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "#B 1 #S S"],
        rngs: nnx.Rngs | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B S D"]:
        for layer in self.layers:
            x = layer(x, mask, rngs, maps)
        return self.final_norm(x) if self.final_norm is not None else x


class Decoder(nnx.Module):
    """A stack of L decoder layers; with pre-norm, one more norm at its end."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = final_norm(config)

    def project_memory(self, memory: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Each layer's cross-attention keys and values."""
        return tuple(layer.cross_attention.project(memory) for layer in self.layers)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B 1 T _"],
        memory: tuple[KeyValue, ...],
        memory_mask: Bool[Array, "#B 1 T S"],
        cache: tuple[tuple[KeyValue, ...], Int[Array, ""]] | None = None,
        rngs: nnx.Rngs | None = None,
        maps: Maps | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue, ...]]:
        """Returns the stack's output and each layer's self-attention keys and values."""
        decoded = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else (cache[0][i], cache[1])
            x, key_value = layer(x, mask, memory[i], memory_mask, layer_cache, rngs, maps)
            decoded.append(key_value)
        return (self.final_norm(x) if self.final_norm is not None else x), tuple(decoded)


def final_norm(config: ModelConfig) -> nnx.Module | None:
    """The norm after a pre-norm stack, whose stream nothing else has normalised."""
    if config.norm_placement == "post":
        return None
    return NORMS[config.norm](config.width, epsilon=config.norm_epsilon)


class Transformer(nnx.Module):
    """Vaswani et al. 2017, figure 1: tokens in, logits over the next target token out."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
        def make_embedding():
            return Embedding(vocab_size, config.width, dtype=DTYPES[config.dtype], rngs=rngs)

        def make_position():
            return POSITIONS[config.position](config.width, max_length=config.max_length, rngs=rngs)

        self.config = config
        self.embedding = make_embedding()
        # Tied, one table reads the source, reads the target and scores the output.
        self.target_embedding = None if config.tie_embeddings else make_embedding()
        self.output_embedding = None if config.tie_embeddings else make_embedding()
        self.source_position, self.target_position = make_position(), make_position()
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        target_in: Int[Array, "B T"],
        target_segments: Int[Array, "B T"],
        *,
        rngs: nnx.Rngs | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for each target position, given the source and the target before it.

        Args:
          source: tokens that the encoder reads.
          source_segments: 0 = padding.
          target_in: BOS and the target's tokens.
          target_segments: 0 = padding.
          rngs: stream `dropout` in training; None in evaluation.
          maps: `{"encoder": [], "decoder": [], "cross": []}`, to be filled with the
            attention weights of each layer; None costs nothing.
        """
        memory = self.encode(source, source_segments, rngs=rngs, maps=maps)
        length = target_in.shape[1]
        x = self.embed_target(target_in, jnp.arange(length)[None], rngs)
        mask = masking.causal(length) & masking.segment(target_segments, target_segments)
        memory_mask = masking.segment(target_segments, source_segments)
        memory = self.decoder.project_memory(memory)
        x, _ = self.decoder(x, mask, memory, memory_mask, rngs=rngs, maps=maps)
        return self.logits(x)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        *,
        rngs: nnx.Rngs | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's memory of `source`."""
        x = self.source_position.embed(self.embedding(source), jnp.arange(source.shape[1])[None])
        x = dropout(x, self.config.dropout, rngs)
        mask = masking.segment(source_segments, source_segments)
        return self.encoder(x, mask, rngs, maps["encoder"] if maps else None)

    def embed_target(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "1 T"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B T D"]:
        embedding = self.target_embedding or self.embedding
        x = self.target_position.embed(embedding(tokens), positions)
        return dropout(x, self.config.dropout, rngs)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return (self.output_embedding or self.embedding).logits(x)

    def start_cache(
        self, memory: Float[Array, "B S D"], source_segments: Int[Array, "B S"], length: int
    ) -> Cache:
        """An empty cache for decoding up to `length` target positions."""
        batch = memory.shape[0]
        heads = self.config.heads
        head_width = self.config.head_width or self.config.width // heads
        empty = jnp.zeros((batch, length, heads, head_width), memory.dtype)
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            decoded=(KeyValue(empty, empty),) * self.config.layers,
            memory=self.decoder.project_memory(memory),
            source_segments=source_segments,
        )

    def decode_step(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits after each of the next T target tokens, and the cache with them in it.

        The same as the positions `cache.filled … cache.filled + T - 1` of a call with
        the whole target. Past the cache's length the logits are NaN.
        """
        steps, room = tokens.shape[1], cache.decoded[0].key.shape[1]
        x = self.embed_target(tokens, cache.filled + jnp.arange(steps)[None], None)
        mask = masking.causal(steps, room, cache.filled)
        ones = jnp.ones(tokens.shape, jnp.int32)
        memory_mask = masking.segment(ones, cache.source_segments)
        x, decoded = self.decoder(x, mask, cache.memory, memory_mask, (cache.decoded, cache.filled))
        logits = jnp.where(cache.filled + steps <= room, self.logits(x), jnp.nan)
        return logits, cache._replace(filled=cache.filled + steps, decoded=decoded)


class Model:
    """The Transformer as pure functions of its parameters, a flat dict name → array.

    Holds the module's structure without its arrays, and what is known of the
    parameters before there are any: their shapes and the logical axes of each.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size
        self.structure, state = nnx.split(self.build(None))
        self.shapes = flatten(state)
        self.axes = {
            "/".join(map(str, path)): leaf.get_metadata("axes")
            for path, leaf in nnx.to_flat_state(state)
        }

    def build(self, key: Array | None) -> Transformer:
        """The module with parameters from `key`; without one, with their shapes alone."""
        if key is None:
            return nnx.eval_shape(lambda: self.build(jax.random.key(0)))
        return Transformer(self.config, self.vocab_size, rngs=nnx.Rngs(key))

    def init(self, key: Array) -> Params:
        """Fresh parameters, float32, the same for the same key on any mesh."""
        return flatten(nnx.state(self.build(key)))

    def bind(self, params: Params) -> Transformer:
        """The module with these parameters, to be called inside a traced function."""
        paths = {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf
            for name, leaf in params.items()
        }
        return nnx.merge(self.structure, nnx.traversals.unflatten_mapping(paths))

    def count_parameters(self) -> int:
        """The exact number of parameters, from shapes alone."""
        return sum(math.prod(shape.shape) for shape in self.shapes.values())


def flatten(state: nnx.State) -> Params:
    """A module's state as one flat dict, `encoder/layers/0/self_attention/query/kernel` → array."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
