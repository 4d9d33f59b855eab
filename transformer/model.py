"""The encoder-decoder Transformer: the one place where the parts are put together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer import masking
from transformer.attention import (
    ATTENTION_BACKENDS,
    BFLOAT16_BACKENDS,
    FLEXIBLE_BACKENDS,
    SHORT_MASK_BACKENDS,
    KeyValue,
    MultiHeadAttention,
    Relations,
    pick,
)
from transformer.dropout import Training, drop
from transformer.errors import UserError, choose
from transformer.layers import (
    FEED_FORWARDS,
    INITIALIZERS,
    NORM_PLACEMENTS,
    Embedding,
    FeedForward,
    Residual,
)
from transformer.normalization import NORMS, Statistic
from transformer.positions import POSITIONS, Position
from transformer.recurrent import CELLS, Recurrent

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

    architecture: str
    layers: int
    width: int
    heads: int
    head_width: int | None
    value_width: int | None
    kv_heads: int | None
    ff_width: int
    feed_forward: str
    cell: str
    init: str
    dropout: float
    attention_dropout: float
    norm: str
    norm_placement: str
    norm_epsilon: float
    position: str
    max_length: int
    random_positions: int
    window: int | None
    tie_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    fused_qkv: bool
    attention_backend: str
    scan_layers: bool
    remat: str
    dtype: str

    def __post_init__(self):
        tables: dict[str, dict[str, Any]] = {
            "architecture": ARCHITECTURES,
            "feed_forward": FEED_FORWARDS,
            "cell": CELLS,
            "init": INITIALIZERS,
            "norm": NORMS,
            "norm_placement": {name: name for name in NORM_PLACEMENTS},
            "position": POSITIONS,
            "attention_backend": ATTENTION_BACKENDS,
            "remat": REMATS,
            "dtype": DTYPES,
        }
        for name, entries in tables.items():
            choose(entries, getattr(self, name), f"model.{name}")
        for name in ("layers", "width", "heads", "ff_width", "max_length"):
            self.require(name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("head_width", "value_width", "kv_heads", "window"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "it must be at least 1, or None")
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            self.require(name, 0.0 <= rate < 1.0, "it must be at least 0 and below 1")
        self.require("norm_epsilon", self.norm_epsilon > 0.0, "it must be above 0")
        self.check_attention()
        self.check_positions()
        if self.architecture == "recurrent":
            even = "each direction of the encoder takes half: choose an even one"
            self.require("width", self.width % 2 == 0, even)

    def require(self, name: str, holds: bool, remedy: str) -> None:
        """Raises a UserError about a knob unless a condition holds."""
        if not holds:
            raise UserError(f"model.{name}={getattr(self, name)}: {remedy}")

    def check_attention(self) -> None:
        """Raises a UserError if heads and what goes with them do not fit each other."""
        if (self.head_width is None or self.architecture == "recurrent") and (
            self.width % self.heads
        ):
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                "choose heads that do, or set model.head_width"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; "
                "choose one that does"
            )
        if self.attention_dropout > 0.0 and (
            self.attention_backend not in FLEXIBLE_BACKENDS or self.architecture == "recurrent"
        ):
            raise UserError(
                f"model.attention_dropout={self.attention_dropout}: only the Transformer with "
                f"model.attention_backend={' or '.join(FLEXIBLE_BACKENDS)} drops attention "
                "weights; choose it, or set the rate to 0"
            )

        if self.attention_backend in BFLOAT16_BACKENDS and self.dtype != "bfloat16":
            raise UserError(
                f"model.attention_backend={self.attention_backend} computes in bfloat16 alone; set "
                "model.dtype=bfloat16, or choose another"
            )
        if self.values_width() != self.attention_width() and (
            self.attention_backend not in FLEXIBLE_BACKENDS
        ):
            raise UserError(
                f"model.value_width={self.value_width} is not model.head_width, which only "
                f"model.attention_backend={' or '.join(FLEXIBLE_BACKENDS)} can do; choose it"
            )

    def check_positions(self) -> None:
        """Raises a UserError if positions do not fit the widths or their range."""
        for knob, size, kind in (
            ("width", self.width, "sinusoidal"),
            ("head_width", self.attention_width(), "rotary"),
        ):
            if self.position == kind and size % 2:
                raise UserError(
                    f"model.{knob}={size} is odd: {kind} positions come in pairs of sine and "
                    f"cosine; choose an even one or another model.position"
                )
        if self.random_positions and not (
            self.max_length <= self.random_positions and self.position != "none"
        ):
            raise UserError(
                f"model.random_positions={self.random_positions}: positions are drawn from so "
                f"many, at least model.max_length={self.max_length}, and need a model.position "
                "other than none; 0 draws none"
            )

    def attention_width(self) -> int:
        """H, the width of a head's queries and keys."""
        return self.head_width or self.width // self.heads

    def values_width(self) -> int:
        """E, the width of a head's values."""
        return self.value_width or self.attention_width()

    def backend_at(self, length: int) -> str:
        """The attention backend in training at this length, on this platform; `auto`'s choice."""
        if self.attention_backend != "auto":
            return self.attention_backend
        return pick(
            jax.default_backend(),
            DTYPES[self.dtype],
            self.attention_width(),
            (length, length),
            biased=POSITIONS[self.position].bias is not Position.bias,
            flexible=self.attention_dropout > 0.0 or self.values_width() != self.attention_width(),
        )

    def attention_widths(self) -> tuple[int, int]:
        """H and E."""
        return self.attention_width(), self.values_width()

    def reach(self, length: int) -> int:
        """`length`, or as many tokens as there are positions for."""
        limited = POSITIONS[self.position].limited or self.random_positions > 0
        return min(length, self.max_length) if limited else length

    def check_length(self, length: int, what: str) -> None:
        """Raises a UserError if positions do not reach to `length` tokens."""
        if self.reach(length) < length:
            raise UserError(
                f"{what}: {length} tokens, and model.position={self.position} reaches to "
                f"model.max_length={self.max_length}; raise it, or choose sinusoidal positions"
            )


class Cache(NamedTuple):
    """What decoding carries from token to token; passed in and handed back, never stored.

    The J hypotheses of a source share it: what hypothesis j computed at position t is the entry
    t · J + j of `decoded`, and stays there when another goes on from it. What changes hands is
    `writers`, some integers, and the keys and values are never moved.

    filled: int32 scalar, how many target positions have been decoded.
    decoded: each layer's self-attention keys and values, with room for the whole target.
    writers: [B, J, positions] int32, whose entry a hypothesis has at each position.
    memory: each layer's cross-attention keys and values, computed once.
    source_segments: [B, S] int32.
    """

    filled: Int[Array, ""]
    decoded: tuple[KeyValue, ...]
    writers: Int[Array, "B J room"]
    memory: tuple[KeyValue, ...]
    source_segments: Int[Array, "B S"]

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache whose hypotheses go on from these."""
        return self._replace(writers=jnp.take_along_axis(self.writers, parents[..., None], axis=1))


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    """Multi-head attention of the model's sizes."""
    return MultiHeadAttention(
        config.width,
        config.heads,
        config.attention_width(),
        value_width=config.values_width(),
        kv_heads=config.kv_heads or config.heads,
        use_bias=config.attention_bias,
        qk_norm=config.qk_norm,
        fused=config.fused_qkv,
        init=INITIALIZERS[config.init],
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


def make_feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
    """The feed-forward sublayer of the model's sizes."""
    return FeedForward(
        config.width,
        config.ff_width,
        kind=config.feed_forward,
        init=INITIALIZERS[config.init],
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
        relations: Relations,
        training: Training | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B S D"]:
        attention, feed_forward = self.residuals
        h = attention.input(x, training)
        query, key_value = self.self_attention.project_all(h, relations.rotate)
        y = self.self_attention(
            query, key_value, relations.mask, relations.bias, training=training, maps=maps
        )
        x = attention.add(x, y, training)
        return feed_forward.add(x, self.feed_forward(feed_forward.input(x, training)), training)


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
        relations: Relations,
        memory: KeyValue,
        memory_mask: masking.Mask | Bool[Array, "#B 1 #T S"],
        cache: tuple[KeyValue, Int[Array, ""]] | None = None,
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Returns the layer's output and its self-attention keys and values.

        Args:
          x: the target positions to compute.
          relations: among the target positions, or of them to the cache's.
          memory: keys and values that `cross_attention` projected from the memory.
          memory_mask: from target positions to source positions.
          cache: keys and values of earlier positions, and where x's are to be written.
          training: for dropout and batch norm; None in evaluation.
          maps: takes the attention weights.
        """
        self_attention, cross_attention, feed_forward = self.residuals
        h = self_attention.input(x, training)
        query, key_value = self.self_attention.project_all(h, relations.rotate)
        if cache is not None:
            earlier, index = cache
            key_value = earlier.write(key_value, index)
        into = maps["decoder"] if maps else None
        y = self.self_attention(
            query, key_value, relations.mask, relations.bias, training=training, maps=into
        )
        x = self_attention.add(x, y, training)
        h = cross_attention.input(x, training)
        into = maps["cross"] if maps else None
        query = self.cross_attention.project_query(h)
        y = self.cross_attention(query, memory, memory_mask, training=training, maps=into)
        x = cross_attention.add(x, y, training)
        y = self.feed_forward(feed_forward.input(x, training))
        return feed_forward.add(x, y, training), key_value


# What a layer keeps for its gradient; all else is computed anew there.
REMATS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not those of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(
    layers: Sequence[Any],
    call: Callable[..., Array],
    x: Float[Array, "B T D"],
    config: ModelConfig,
    training: Training | None,
) -> Float[Array, "B T D"]:
    """A stack of layers alike, one after another, as `scan_layers` and `remat` say.

    Scanned, a layer is compiled once for all of them, whose variables are put side by side
    for it: as much memory again as the parameters take.

    Args:
      layers: modules of one structure.
      call: (layer, x, training) → x.
      x: what goes in.
      config: the model's.
      training: what training brings.
    """
    structure, _ = nnx.split(layers[0])
    states = [nnx.split(layer)[1] for layer in layers]
    keys = None if training is None else training.of_each_layer(len(layers))

    def step(x, inputs):
        state, key = inputs
        layer = nnx.merge(structure, state)
        x = call(layer, x, training and training.of_layer(key))
        return x, nnx.state(layer, Statistic)

    if config.remat != "none":
        # Inside a scan nothing can be shared with the forward pass by accident.
        step = jax.checkpoint(step, policy=REMATS[config.remat], prevent_cse=not config.scan_layers)
    if config.scan_layers:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        x, seen = jax.lax.scan(step, x, (stacked, keys))
        statistics = [jax.tree.map(lambda leaf, i=i: leaf[i], seen) for i in range(len(layers))]
    else:
        statistics = []
        for i, state in enumerate(states):
            x, seen = step(x, (state, None if keys is None else keys[i]))
            statistics.append(seen)
    if training is not None:
        for layer, seen in zip(layers, statistics, strict=True):
            nnx.update(layer, seen)
    return x


class Encoder(nnx.Module):
    """A stack of L encoder layers; unless post-norm, with one more norm at its end."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = final_norm(config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        relations: Relations,
        training: Training | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B S D"]:
        if maps is None:
            x = run_layers(
                self.layers,
                lambda layer, x, training: layer(x, relations, training),
                *(x, self.config, training),
            )
        else:
            for layer in self.layers:
                x = layer(x, relations, training, maps)
        return x if self.final_norm is None else self.final_norm(x, training)


class Decoder(nnx.Module):
    """A stack of L decoder layers; unless post-norm, with one more norm at its end."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = final_norm(config)

    def project_memory(self, memory: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Each layer's cross-attention keys and values."""
        return tuple(layer.cross_attention.project(memory) for layer in self.layers)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        relations: Relations,
        memory: Float[Array, "B S D"],
        memory_mask: masking.Mask | Bool[Array, "B 1 #T S"],
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B T D"]:
        """The stack's output for a whole target, given the encoder's memory."""

        def call(layer, x, training, maps=None):
            read = layer.cross_attention.project(memory)
            return layer(x, relations, read, memory_mask, training=training, maps=maps)[0]

        if maps is None:
            x = run_layers(self.layers, call, x, self.config, training)
        else:
            for layer in self.layers:
                x = call(layer, x, training, maps)
        return x if self.final_norm is None else self.final_norm(x, training)

    def step(
        self,
        x: Float[Array, "B T D"],
        relations: Relations,
        memory: tuple[KeyValue, ...],
        memory_mask: Bool[Array, "B 1 #T S"],
        cache: tuple[KeyValue, ...],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue, ...]]:
        """The next positions' output, given what `project_memory` made, and the cache with them.

        Args:
          x: the target positions to compute.
          relations: of them to the cache's.
          memory: keys and values for each layer's cross-attention.
          memory_mask: from target positions to source positions.
          cache: each layer's keys and values of earlier positions.
          index: the entry where x's begin.
        """
        decoded = []
        for layer, read, earlier in zip(self.layers, memory, cache, strict=True):
            x, key_value = layer(x, relations, read, memory_mask, (earlier, index))
            decoded.append(key_value)
        return x if self.final_norm is None else self.final_norm(x), tuple(decoded)


def final_norm(config: ModelConfig) -> Any:
    """The norm after a stack whose stream nothing else has normalised; None with post-norm."""
    if config.norm_placement == "post":
        return None
    return NORMS[config.norm](config.width, epsilon=config.norm_epsilon)


class Transformer(nnx.Module):
    """Vaswani et al. 2017, figure 1: tokens in, logits over the next target token out."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
        def make_embedding():
            return Embedding(vocab_size, config.width, dtype=DTYPES[config.dtype], rngs=rngs)

        def make_position(causal: bool):
            return POSITIONS[config.position](
                config.width,
                config.heads,
                causal=causal,
                max_length=config.random_positions or config.max_length,
                rngs=rngs,
            )

        self.config = config
        self.embedding = make_embedding()
        # Tied, one table reads the source, reads the target and scores the output.
        self.target_embedding = None if config.tie_embeddings else make_embedding()
        self.output_embedding = None if config.tie_embeddings else make_embedding()
        self.source_position, self.target_position = make_position(False), make_position(True)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        target_in: Int[Array, "B T"],
        target_segments: Int[Array, "B T"],
        *,
        source_positions: Int[Array, "B S"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for each target position, given the source and the target before it.

        Args:
          source: tokens that the encoder reads.
          source_segments: 0 = padding; of packed rows, which of its examples a token is of.
          target_in: BOS and the target's tokens.
          target_segments: likewise; attention does not cross from a segment into another.
          source_positions: where a token stands in its segment; None: where it is in its row.
          target_positions: likewise.
          training: dropout and what else training brings; None in evaluation.
          maps: `{"encoder": [], "decoder": [], "cross": []}`, to be filled with the
            attention weights of each layer; None costs nothing.
        """
        memory = self.encode(
            source, source_segments, positions=source_positions, training=training, maps=maps
        )
        training = training and training.over(target_segments)
        length = target_in.shape[1]
        positions = self.positions(in_row(length, target_positions), training)
        mask = self.mask(target_segments, target_segments, causal=True, window=self.config.window)
        memory_mask = self.mask(target_segments, source_segments)
        x = self.decoder(
            self.embed_target(target_in, positions, training),
            relations(self.target_position, mask, positions, positions),
            memory,
            memory_mask,
            training=training,
            maps=maps,
        )
        return self.logits(x)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's memory of `source`."""
        training = training and training.over(source_segments)
        positions = self.positions(in_row(source.shape[1], positions), training)
        x = drop(self.source_position.embed(self.embedding(source), positions), training)
        mask = self.mask(source_segments, source_segments, window=self.config.window)
        related = relations(self.source_position, mask, positions, positions)
        return self.encoder(x, related, training, maps["encoder"] if maps else None)

    def positions(self, index: Int[Array, "#B T"], training: Training | None) -> Int[Array, "#B T"]:
        """Where the tokens `index` of their sequences stand.

        With `random_positions` L above 0, a batch's positions in training are a sorted
        draw from 0 … L - 1 without replacement; so the model meets positions that
        longer sequences have (Ruoss et al. 2023, section 3). In evaluation they are
        evenly spaced, L / `max_length` apart, where the paper draws again: a token's
        position then depends on no draw, and on no later token.
        """
        reach = self.config.random_positions
        if not reach:
            return index
        if training is None:
            return index * (reach // self.config.max_length)
        # As many as an example has tokens at most; the rows of packed ones say nothing of that.
        length = index.shape[1] if index.shape[0] == 1 else self.config.max_length
        drawn = jax.random.choice(training.rngs.positions(), reach, (length,), replace=False)
        return jnp.sort(drawn)[index]

    def mask(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"], **relations: Any
    ) -> masking.Mask | Bool[Array, "B 1 T S"]:
        """The mask between segments in the form that the attention backend takes."""
        mask = masking.Mask(queries, keys, **relations)
        short = self.config.attention_backend in SHORT_MASK_BACKENDS
        return mask if short else mask.array()

    def embed_target(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"], training: Training | None
    ) -> Float[Array, "B T D"]:
        embedding = self.target_embedding or self.embedding
        return drop(self.target_position.embed(embedding(tokens), positions), training)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return (self.output_embedding or self.embedding).logits(x)

    def start_cache(
        self,
        memory: Float[Array, "B S D"],
        source_segments: Int[Array, "B S"],
        length: int,
        hypotheses: int = 1,
    ) -> Cache:
        """An empty cache for decoding up to `length` target positions of each hypothesis."""
        heads, entries = self.config.kv_heads or self.config.heads, length * hypotheses
        shape, widths = (len(memory), heads, entries), self.config.attention_widths()
        empty = KeyValue(*(jnp.zeros((*shape, width), memory.dtype) for width in widths))
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            decoded=(empty,) * self.config.layers,
            writers=jnp.zeros((len(memory), hypotheses, length), jnp.int32),
            memory=self.decoder.project_memory(memory),
            source_segments=source_segments,
        )

    def decode_step(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits after each of the next T target tokens, and the cache with them in it.

        The same as the positions `cache.filled … cache.filled + T - 1` of a call with
        the whole target. With a cache of J > 1 hypotheses the tokens are the next one of each, and
        T is J. Past the cache's length the logits are NaN.
        """
        filled, (hypotheses, room) = cache.filled, cache.writers.shape[1:]
        steps = tokens.shape[1] // hypotheses
        index = filled + in_row(steps) if hypotheses == 1 else jnp.full(tokens.shape, filled)
        positions = self.positions(index, None)
        mask = masking.causal(steps, room, filled)
        if self.config.window is not None:
            mask = mask & masking.window(steps, room, self.config.window, filled)
        if hypotheses > 1:
            each = jnp.arange(hypotheses)
            cache = cache._replace(writers=cache.writers.at[:, :, filled].set(each))
            own = cache.writers[..., None] == each  # [B, J, room, J]
            mask = (mask[0, 0, 0, :, None] & own).reshape(-1, 1, hypotheses, room * hypotheses)
        keys = self.positions(in_row(room * hypotheses) // hypotheses, None)
        x, decoded = self.decoder.step(
            self.embed_target(tokens, positions, None),
            relations(self.target_position, mask, positions, keys),
            cache.memory,
            masking.padding(cache.source_segments > 0),
            *(cache.decoded, filled * hypotheses),
        )
        logits = jnp.where(filled + steps <= room, self.logits(x), jnp.nan)
        return logits, cache._replace(filled=filled + steps, decoded=decoded)


def in_row(length: int, positions: Int[Array, "B T"] | None = None) -> Int[Array, "#B T"]:
    """The given positions, or where none are given those of a row's tokens themselves."""
    return jnp.arange(length)[None] if positions is None else positions


def relations(
    position: Any, mask: masking.Mask | Array, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
) -> Relations:
    """How queries that stand at `queries`, and so do the new keys, stand to the keys at `keys`."""
    rotate = partial(position.rotate, positions=queries)
    return Relations(mask, rotate, position.bias(queries, keys))


def recurrent(config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs) -> Recurrent:
    """The recurrent baseline of the model's sizes; what it does not name, it does not have."""
    return Recurrent(
        vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        cell=config.cell,
        tie_embeddings=config.tie_embeddings,
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


ARCHITECTURES: dict[str, Callable[..., Any]] = {"transformer": Transformer, "recurrent": recurrent}


class Model:
    """The model as pure functions of its variables, a flat dict name → array.

    Holds the module's structure without its arrays, and what is known of the
    variables before there are any: their shapes and the logical axes of each. Variables
    are the parameters, which are trained, and the statistics that batch norm keeps.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size
        self.structure, state = nnx.split(self.build(None))
        self.shapes = flatten(state)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        self.axes = {name: leaf.get_metadata("axes") for name, leaf in leaves.items()}
        self.statistics = {name for name, leaf in leaves.items() if leaf.type is Statistic}

    def build(self, key: Array | None) -> Any:
        """The module with variables from `key`; without one, with their shapes alone."""
        if key is None:
            return nnx.eval_shape(lambda: self.build(jax.random.key(0)))
        make = ARCHITECTURES[self.config.architecture]
        return make(self.config, self.vocab_size, rngs=nnx.Rngs(key))

    def init(self, key: Array) -> Params:
        """Fresh variables, float32, the same for the same key on any mesh."""
        return flatten(nnx.state(self.build(key)))

    def split(self, variables: Params) -> tuple[Params, Params]:
        """The parameters and the statistics among what has a variable's name."""
        parts: tuple[Params, Params] = {}, {}
        for name, leaf in variables.items():
            parts[name in self.statistics][name] = leaf
        return parts

    def bind(self, variables: Params) -> Any:
        """The module with these variables, to be called inside a traced function."""
        paths = {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf
            for name, leaf in variables.items()
        }
        return nnx.merge(self.structure, nnx.traversals.unflatten_mapping(paths))

    def count_parameters(self) -> int:
        """The exact number of parameters, from shapes alone."""
        parameters, _ = self.split(self.shapes)
        return sum(math.prod(shape.shape) for shape in parameters.values())


def flatten(state: nnx.State) -> Params:
    """A module's state as one flat dict, `encoder/layers/0/self_attention/query/kernel` → array."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
