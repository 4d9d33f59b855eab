"""The encoder and the decoder: stacks of layers, run one by one, scanned or rematerialised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import UserError
from transformer.modules.attention import KeyValue, Rotate
from transformer.modules.dropout import is_deterministic, stream_of, training_rngs
from transformer.modules.layers import (
    AttentionMask,
    DecoderLayer,
    EncoderLayer,
    apply_norm,
)
from transformer.modules.normalization import NORMS

# What a layer keeps for its gradient; the rest is rematerialised.
REMATS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not those of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
    """A stack of L layers; unless post-norm, with one more norm at its end.

    Args:
      num_layers: L.
      d_model: D.
      num_heads: N.
      d_ff: F.
      scan_layers: whether one layer is compiled for all of them, in a `jax.lax.scan`. Their
        variables are stacked for it: as much memory again as the parameters take.
      remat: one of `REMATS`.
      norm: one of `NORMS`.
      norm_placement: one of `NORM_PLACEMENTS`.
      norm_epsilon: of the norms.
      dtype: of the computation; None: that which inputs and parameters promote to.
      param_dtype: of the parameters.
      rngs: for the parameters and dropout.
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
        self.deterministic: bool | None = False
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
        # With post-norm the last layer has normalised the stream.
        last = norm_placement != "post"
        self.final_norm: Any = nnx.data(
            NORMS[norm](d_model, epsilon=norm_epsilon, **common) if last else None
        )

    def run(
        self,
        x: Float[Array, "B T D"],
        call: Callable[..., Array],
        *,
        token_mask: Bool[Array, "B T"] | None,
        deterministic: bool | None,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "B T D"]:
        """The layers one after another, then the final norm.

        Each layer gets random keys of its own, which do not depend on how the layers are run.

        Args:
          x: the stream.
          call: (layer, x, deterministic=, rngs=, token_mask=) → x.
          token_mask: see `EncoderLayer`, as for the others.
          deterministic: see there.
          rngs: see there.

        Raises:
          UserError: layers that differ are to be scanned.
        """
        training = not is_deterministic(deterministic, self.deterministic)
        stream = stream_of("layers", rngs) if training else None
        keys = None if stream is None else jax.random.split(stream(), len(self.layers))
        options = {"token_mask": token_mask, "deterministic": deterministic}

        def step(layer: nnx.Module, x: Array, key: Array | None) -> Array:
            return call(layer, x, rngs=None if key is None else training_rngs(key), **options)

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
        """The layers scanned, rematerialised or both, as functions of their variables."""
        structures, states = zip(*map(nnx.split, self.layers), strict=True)

        def pure(structure: Any) -> Callable:
            def function(x: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, Any]:
                state, key = inputs
                layer = nnx.merge(structure, state)
                x = step(layer, x, key)
                return x, nnx.state(layer, nnx.Any(nnx.BatchStat, nnx.RngState))

            if self.remat == "none":
                return function
            # Inside a scan nothing can be shared with the forward pass by accident.
            return jax.checkpoint(
                function, policy=REMATS[self.remat], prevent_cse=not self.scan_layers
            )

        if self.scan_layers:
            if any(structure != structures[0] for structure in structures):
                raise UserError(
                    "model.scan_layers=True compiles one layer for all of a stack, and the layers "
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

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode, for `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic


class Encoder(Stack):
    """A stack of encoder layers; see `Stack`."""

    layer = EncoderLayer

    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        mask: AttentionMask = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        token_mask: Bool[Array, "B S"] | None = None,
        bias: Float[Array, "#B N S S"] | None = None,
        rotate: Rotate | None = None,
    ) -> Float[Array, "B S D"]:
        """The stack's output; the arguments are those of `EncoderLayer`."""

        def call(layer: EncoderLayer, x: Array, **options: Any) -> Array:
            return layer(x, mask=mask, bias=bias, rotate=rotate, **options)

        return self.run(x, call, token_mask=token_mask, deterministic=deterministic, rngs=rngs)


class Decoder(Stack):
    """A stack of decoder layers; see `Stack`."""

    layer = DecoderLayer

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S D"],
        *,
        mask: AttentionMask = None,
        memory_mask: AttentionMask = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
        bias: Float[Array, "#B N T T"] | None = None,
        rotate: Rotate | None = None,
    ) -> Float[Array, "B T D"]:
        """The stack's output for a whole target; the arguments are those of `DecoderLayer`."""

        def call(layer: DecoderLayer, x: Array, **options: Any) -> Array:
            attention = {"mask": mask, "memory_mask": memory_mask, "bias": bias, "rotate": rotate}
            return layer(x, memory, **attention, **options)

        return self.run(x, call, token_mask=token_mask, deterministic=deterministic, rngs=rngs)

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
          x: the stream of the next target positions.
          memory: each layer's keys and values, from `project_memory`.
          cache: each layer's keys and values of the earlier target positions.
          index: the entry where those of `x` begin.
          **attention: `mask`, `memory_mask`, `bias` and `rotate` of `DecoderLayer.decode_step`.
        """
        decoded = []
        for layer, read, earlier in zip(self.layers, memory, cache, strict=True):
            x, key_value = layer.decode_step(x, read, earlier, index, **attention)
            decoded.append(key_value)
        x = x if self.final_norm is None else apply_norm(self.final_norm, x, deterministic=True)
        return x, tuple(decoded)
