"""The encoder and the decoder: stacks of layers, run one by one, scanned or rematerialised."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer.errors import UserError, check_choice
from transformer.modules import layers
from transformer.modules.attention import KeyValueCache
from transformer.modules.dropout import Moded, stream_of, training_rngs
from transformer.modules.layers import Stream, apply_norm
from transformer.modules.positions import QueryBias

# Checkpoint policies: what a layer saves for the backward pass.
REMATS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not those of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}

Caches = tuple[KeyValueCache, ...]  # of each layer
Bias = Array | QueryBias | None  # of the scores of self-attention


class Stack(Moded):
    """A stack of L layers, followed by a norm.

    Args:
      d_ff: F; None: 4 · D.
      scan_layers: whether to run the layers in a `jax.lax.scan`, which compiles one layer for all
        but stacks their variables, a copy of the parameters.
      remat: one of `REMATS`.
      final_norm: whether a norm follows; None: unless the layers are post-norm.
      **options: `rngs` and further arguments of the layers.
    """

    layer: type[Any]

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        scan_layers: bool = False,
        remat: str = "none",
        final_norm: bool | None = None,
        **options: Any,
    ):
        check_choice(REMATS, remat, "remat")
        self.scan_layers, self.remat = scan_layers, remat
        layer = partial(self.layer, d_model, num_heads, d_ff, **options)
        self.layers: Any = nnx.List(layer() for _ in range(num_layers))
        names = ("norm", "norm_epsilon", "dtype", "param_dtype", "rngs")
        norm = {name: options[name] for name in names if name in options}
        post = options.get("norm_placement") == "post"  # where each layer ends with a norm
        last = not post if final_norm is None else final_norm
        self.final_norm: Any = nnx.data(layers.make_norm(d_model, **norm) if last else None)

    def __call__(
        self,
        x: Stream,
        *memory: Float[Array, "B S D"],
        token_mask: layers.TokenMask = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **attention: Any,
    ) -> Stream:
        """The stack's output.

        Args:
          *memory: the encoder's output, which the decoder takes.
          token_mask, deterministic: see `EncoderLayer`.
          rngs: random keys for dropout; layers differ in them, not with `scan_layers` or `remat`.
          **attention: `mask`, `bias` and `rotate` of the layers, and `memory_mask` of the decoder.
            `bias` is of all layers, or a tuple with that of each.
        """
        training = not self.is_deterministic(deterministic)
        stream = stream_of("layers", rngs) if training else None
        keys = None if stream is None else jax.random.split(stream(), len(self.layers))
        shared, own = self._biases(attention.pop("bias", None))
        options = attention | {"token_mask": token_mask, "deterministic": deterministic}

        def step(layer: Any, x: Array, key: Array | None, bias: Bias) -> Array:
            rngs = None if key is None else training_rngs(key)
            return layer(x, *memory, rngs=rngs, bias=shared if bias is None else bias, **options)

        if self.scan_layers or self.remat != "none":
            x = self._run_pure(step, x, keys, own, training)
        else:
            for i, layer in enumerate(self.layers):
                x = step(layer, x, None if keys is None else keys[i], own[i])
        return apply_norm(self.final_norm, x, token_mask, deterministic)

    def _biases(self, bias: Any) -> tuple[Bias, tuple[Bias, ...]]:
        """The bias that all layers share, if they do, and that of each, if they do not."""
        return (None, bias) if isinstance(bias, tuple) else (bias, (None,) * len(self.layers))

    def _run_pure(
        self, step: Callable[..., Array], x: Stream, keys: Array | None, biases: Any, training: bool
    ) -> Stream:
        """Runs the layers as functions of their variables, scanned, rematerialised or both."""
        structures, states = zip(*map(nnx.split, self.layers), strict=True)

        def pure(structure: Any) -> Callable[..., tuple[Array, Any]]:
            def function(x: Array, inputs: tuple[Any, ...]) -> tuple[Array, Any]:
                state, key, bias = inputs
                layer = nnx.merge(structure, state)
                x = step(layer, x, key, bias)
                return x, nnx.state(layer, nnx.Any(nnx.BatchStat, nnx.RngState))

            # A scan already prevents common subexpression elimination with the forward pass.
            options = {"policy": REMATS[self.remat], "prevent_cse": not self.scan_layers}
            return function if self.remat == "none" else jax.checkpoint(function, **options)

        if self.scan_layers:
            if any(structure != structures[0] for structure in structures):
                raise UserError(
                    "model.scan_layers=True compiles one layer for all, and these differ in more "
                    "than their variables; set it to False"
                )
            each = zip(states, biases, strict=True)
            stacked, bias = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            x, updates = jax.lax.scan(pure(structures[0]), x, (stacked, keys, bias))
            changed = [jax.tree.map(lambda leaf, i=i: leaf[i], updates) for i in range(len(states))]
        else:
            changed = []
            for i, (structure, state) in enumerate(zip(structures, states, strict=True)):
                key = None if keys is None else keys[i]
                x, update = pure(structure)(x, (state, key, biases[i]))
                changed.append(update)
        if training:
            for layer, update in zip(self.layers, changed, strict=True):
                nnx.update(layer, update)
        return x


class Encoder(Stack):
    """A stack of encoder layers; see `Stack`."""

    layer = layers.EncoderLayer


class Decoder(Stack):
    """A stack of decoder layers, called with the residual stream and the memory; see `Stack`."""

    layer = layers.DecoderLayer

    def decode_step(
        self, x: Stream, memory: Caches, cache: Caches, index: Array, bias: Any = None, **masks: Any
    ) -> tuple[Stream, Caches]:
        """`DecoderLayer.decode_step` of each layer, with the keys and values of each."""
        decoded, (shared, own) = [], self._biases(bias)
        for layer, bias, *read in zip(self.layers, own, memory, cache, strict=True):
            bias = shared if bias is None else bias
            x, key_value = layer.decode_step(x, *read, index, bias=bias, **masks)
            decoded.append(key_value)
        return apply_norm(self.final_norm, x, deterministic=True), tuple(decoded)
