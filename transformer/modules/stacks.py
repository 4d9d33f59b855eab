"""The encoder and the decoder: stacks of layers, run one by one, scanned or rematerialised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import UserError
from transformer.modules.attention import KeyValue
from transformer.modules.dropout import Moded, stream_of, training_rngs
from transformer.modules.layers import DecoderLayer, EncoderLayer, apply_norm
from transformer.modules.normalization import NORMS

# Checkpoint policies: what a layer saves for the backward pass.
REMATS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not those of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(Moded):
    """A stack of L layers, followed by a norm unless the layers are post-norm.

    Args:
      num_layers: L.
      d_model: D.
      num_heads: N.
      d_ff: F.
      scan_layers: whether to run the layers in a `jax.lax.scan`, which compiles one layer for all
        but stacks their variables, a copy of the parameters.
      remat: one of `REMATS`.
      norm: one of `NORMS`.
      norm_placement: one of `NORM_PLACEMENTS`.
      norm_epsilon: epsilon of the norms.
      dtype: the dtype of the computation; None: promoted from inputs and parameters.
      param_dtype: the dtype of the parameters.
      rngs: random keys for the parameters and dropout.
      **options: further arguments of `EncoderLayer` or `DecoderLayer`.
    """

    layer: type[Any]

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        scan_layers: bool = False,
        remat: str = "none",
        norm: str = "layer",
        norm_placement: str = "pre",
        norm_epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.scan_layers, self.remat = scan_layers, remat
        self.layers: Any = nnx.List(
            self.layer(
                d_model,
                num_heads,
                d_ff,
                norm=norm,
                norm_placement=norm_placement,
                norm_epsilon=norm_epsilon,
                **common,
                **options,
            )
            for _ in range(num_layers)
        )
        # With post-norm the last layer already ends with a norm.
        last = norm_placement != "post"
        self.final_norm: Any = nnx.data(
            NORMS[norm](d_model, epsilon=norm_epsilon, **common) if last else None
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *memory: Float[Array, "B S D"],
        token_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **attention: Any,
    ) -> Float[Array, "B T D"]:
        """The stack's output.

        Args:
          x: the residual stream, such as embedded tokens.
          *memory: the encoder's output, which the decoder takes.
          token_mask: see `EncoderLayer`.
          deterministic: see `EncoderLayer`.
          rngs: see `EncoderLayer`. Keys differ between layers, not with `scan_layers` or `remat`.
          **attention: further arguments of the layers: `mask`, `bias` and `rotate`, and in the
            decoder `memory_mask`.

        Raises:
          UserError: `scan_layers` is set and the layers differ.
        """
        training = not self.is_deterministic(deterministic)
        stream = stream_of("layers", rngs) if training else None
        keys = None if stream is None else jax.random.split(stream(), len(self.layers))
        options = attention | {"token_mask": token_mask, "deterministic": deterministic}

        def step(layer: Any, x: Array, key: Array | None) -> Array:
            rngs = None if key is None else training_rngs(key)
            return layer(x, *memory, rngs=rngs, **options)

        if self.scan_layers or self.remat != "none":
            x = self.run_transformed(step, x, keys, training)
        else:
            for i, layer in enumerate(self.layers):
                x = step(layer, x, None if keys is None else keys[i])
        if self.final_norm is None:
            return x
        return apply_norm(self.final_norm, x, token_mask, deterministic)

    def run_transformed(
        self,
        step: Callable[..., Array],
        x: Float[Array, "B T D"],
        keys: Array | None,
        training: bool,
    ) -> Float[Array, "B T D"]:
        """Runs the layers scanned, rematerialised or both, as functions of their variables."""
        structures, states = zip(*map(nnx.split, self.layers), strict=True)

        def pure(structure: Any) -> Callable:
            def function(x: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, Any]:
                state, key = inputs
                layer = nnx.merge(structure, state)
                x = step(layer, x, key)
                return x, nnx.state(layer, nnx.Any(nnx.BatchStat, nnx.RngState))

            if self.remat == "none":
                return function
            # A scan already prevents common subexpression elimination with the forward pass.
            return jax.checkpoint(
                function, policy=REMATS[self.remat], prevent_cse=not self.scan_layers
            )

        if self.scan_layers:
            if any(structure != structures[0] for structure in structures):
                raise UserError(
                    "model.scan_layers=True compiles one layer for the whole stack, and the layers "
                    "of this one differ in more than their variables; set it to False"
                )
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x, updates = jax.lax.scan(pure(structures[0]), x, (stacked, keys))
            changed = [jax.tree.map(lambda leaf, i=i: leaf[i], updates) for i in range(len(states))]
        else:
            changed = []
            for i, (structure, state) in enumerate(zip(structures, states, strict=True)):
                x, update = pure(structure)(x, (state, None if keys is None else keys[i]))
                changed.append(update)
        if training:
            for layer, update in zip(self.layers, changed, strict=True):
                nnx.update(layer, update)
        return x


class Encoder(Stack):
    """A stack of encoder layers; see `Stack`."""

    layer = EncoderLayer


class Decoder(Stack):
    """A stack of decoder layers, called with the residual stream and the memory; see `Stack`."""

    layer = DecoderLayer

    def project_memory(self, memory: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Each layer's cross-attention keys and values."""
        return tuple(layer.cross_attention.project_kv(memory) for layer in self.layers)

    def decode_step(
        self,
        x: Float[Array, "B T D"],
        memory: tuple[KeyValue, ...],
        cache: tuple[KeyValue, ...],
        index: Int[Array, ""],
        **attention: Any,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue, ...]]:
        """The output for the next target positions, and the cache with them in it.

        Args:
          x: the residual stream of the next target positions.
          memory: each layer's keys and values, from `project_memory`.
          cache: each layer's keys and values of the earlier target positions.
          index: the cache entry where the keys and values of `x` begin.
          **attention: `mask`, `memory_mask`, `bias` and `rotate` of `DecoderLayer.decode_step`.
        """
        decoded = []
        for layer, read, earlier in zip(self.layers, memory, cache, strict=True):
            x, key_value = layer.decode_step(x, read, earlier, index, **attention)
            decoded.append(key_value)
        x = x if self.final_norm is None else apply_norm(self.final_norm, x, deterministic=True)
        return x, tuple(decoded)
