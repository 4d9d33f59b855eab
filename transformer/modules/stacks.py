"""The encoder and the decoder: stacks of layers, and the layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import UserError
from transformer.modules import masking
from transformer.modules.attention import KeyValue, MultiHeadAttention, Relations
from transformer.modules.config import DTYPES, REMATS, ModelConfig
from transformer.modules.dropout import Training
from transformer.modules.layers import (
    INITIALIZERS,
    FeedForward,
    Residual,
)
from transformer.modules.normalization import NORMS, Statistic

# The attention weights [B, N, T, S] of each layer, under "encoder", "decoder", "cross".
Maps = dict[str, list[Array]]


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    """Multi-head attention of the model's sizes."""
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        config.attention_width(),
        value_width=config.values_width(),
        kv_heads=config.num_kv_heads or config.num_heads,
        use_bias=config.attention_bias,
        qk_norm=config.normalize_qk,
        epsilon=config.qk_norm_epsilon or config.norm_epsilon,
        fused=config.fused_qkv,
        init=INITIALIZERS[config.kernel_init],
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


def make_feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
    """The feed-forward sublayer of the model's sizes."""
    return FeedForward(
        config.d_model,
        config.d_ff,
        kind=config.feed_forward,
        init=INITIALIZERS[config.kernel_init],
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


def make_residual(config: ModelConfig) -> Residual:
    """The connection around one sublayer."""
    return Residual(
        config.d_model,
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


def run_layers(
    layers: Sequence[Any],
    call: Callable[..., Array],
    x: Float[Array, "B T D"],
    config: ModelConfig,
    training: Training | None,
) -> Float[Array, "B T D"]:
    """A stack of layers, one after another, as `scan_layers` and `remat` say.

    Scanned, a layer is compiled once for all of them, whose variables are put side by side
    for it: as much memory again as the parameters take.

    Args:
      layers: modules; to be scanned they must differ in nothing but their variables.
      call: (layer, x, training) → x.
      x: what goes in.
      config: the model's.
      training: what training brings.

    Raises:
      UserError: layers that differ are to be scanned.
    """
    structures, states = zip(*map(nnx.split, layers), strict=True)
    keys = None if training is None else training.of_each_layer(len(layers))

    def step(structure, x, inputs):
        state, key = inputs
        layer = nnx.merge(structure, state)
        x = call(layer, x, training and training.of_layer(key))
        return x, nnx.state(layer, Statistic)

    if config.remat != "none":
        # Inside a scan nothing can be shared with the forward pass by accident.
        step = jax.checkpoint(
            step,
            policy=REMATS[config.remat],
            prevent_cse=not config.scan_layers,
            static_argnums=0,
        )
    if config.scan_layers:
        if any(structure != structures[0] for structure in structures):
            raise UserError(
                "model.scan_layers=True compiles one layer for all of a stack, and the layers of "
                "this one differ in more than their variables; set it to False"
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        x, seen = jax.lax.scan(partial(step, structures[0]), x, (stacked, keys))
        statistics = [jax.tree.map(lambda leaf, i=i: leaf[i], seen) for i in range(len(layers))]
    else:
        statistics = []
        for i, (structure, state) in enumerate(zip(structures, states, strict=True)):
            x, seen = step(structure, x, (state, None if keys is None else keys[i]))
            statistics.append(seen)
    if training is not None:
        for layer, seen in zip(layers, statistics, strict=True):
            nnx.update(layer, seen)
    return x


class Encoder(nnx.Module):
    """A stack of L encoder layers; unless post-norm, with one more norm at its end."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
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
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
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
    return NORMS[config.norm](config.d_model, epsilon=config.norm_epsilon)
