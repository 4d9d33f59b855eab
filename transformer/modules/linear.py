"""Linear transformations and embeddings, with `nnx`'s arguments and parameter layouts."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.parallel.mesh import constrain

Initializer = Callable[..., Any]

lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros_init()
embed_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

# Initializers of the matrices of attention and feed-forward.
INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": nnx.initializers.glorot_uniform(),  # Glorot and Bengio 2010
    "glorot_normal": nnx.initializers.glorot_normal(),
    "lecun_normal": lecun_normal,
    "he_normal": nnx.initializers.he_normal(),  # He et al. 2015
    "normal": nnx.initializers.normal(0.02),  # Radford et al. 2019 (GPT-2)
}


def axis_names(*names: str) -> dict[str, Any]:
    """Flax's sharding metadata of a parameter: the logical name of each of its axes.

    `nnx.get_partition_spec` reads them; `parallel/mesh.py: RULES` maps them to mesh axes.
    Creating the parameter does not shard it: a module works under any mesh.
    """
    return {"out_sharding": names, "eager_sharding": False}


def linear_axes(*names: str) -> dict[str, Any]:
    """The metadata arguments of a `Linear` whose kernel has these axes from or to "embed"."""
    bias = ("norm",) if names[-1] == "embed" else names[1:]
    return {"kernel_metadata": axis_names(*names), "bias_metadata": axis_names(*bias)}


def compute_dtype(dtype: Any, *arrays: Array | None) -> Any:
    """`dtype`, or if it is None the type that the arrays promote to, as in Flax."""
    return dtype or jnp.result_type(*(each for each in arrays if each is not None))


class Linear(nnx.LinearGeneral):
    """x W + b over the last axis, or over several axes at once, as `nnx.Linear(General)`.

    The gradient of b is summed in the dtype of b: bfloat16 cannot count above 256.

    Args:
      in_features: size of the input's last axis, or of its last axes.
      out_features: size of the output's last axis, or axes.
      use_bias: whether to add b.
      dtype: the dtype of the computation; None: promoted from inputs and parameters.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of W, called with its shape as a matrix.
      bias_init: initializer of b.
      rngs: random keys for the parameters.
      kernel_metadata: metadata of the parameter `kernel`.
      bias_metadata: metadata of the parameter `bias`.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        axes = 1 if isinstance(in_features, int) else len(in_features)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options |= {"use_bias": use_bias, "kernel_init": kernel_init, "bias_init": bias_init}
        options |= {"kernel_metadata": kernel_metadata, "bias_metadata": bias_metadata}
        super().__init__(in_features, out_features, axis=range(-axes, 0), **options)

    def __call__(
        self, inputs: Float[Array, "..."], out_sharding: Any = None
    ) -> Float[Array, "..."]:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        dtype = compute_dtype(self.dtype, inputs, kernel, bias)
        options = {"axes": len(self.in_features), "out_sharding": out_sharding}
        product = jnp.tensordot(inputs.astype(dtype), kernel.astype(dtype), **options)
        if bias is None:
            return product
        # Cast after the broadcast: the gradient is summed in the bias's dtype.
        return product + jnp.broadcast_to(bias, product.shape).astype(dtype)


class Embed(nnx.Module):
    """One vector for each token, as `nnx.Embed`; its transpose gives logits (`attend`).

    A token outside the vocabulary becomes NaN. Gradients are summed in the dtype of the parameter.

    Args:
      num_embeddings: V.
      features: D.
      dtype: the dtype of the vectors; None: that of the parameter.
      param_dtype: the dtype of the parameter.
      embedding_init: initializer of the parameter, [V, D].
      rngs: random keys for the parameter.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Initializer = embed_init,
        rngs: nnx.Rngs,
    ):
        self.num_embeddings, self.features = num_embeddings, features
        self.dtype = dtype or param_dtype
        embedding = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        self.embedding = nnx.Param(embedding, **axis_names("vocab", "embed"))

    def __call__(self, inputs: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        # Gather over fsdp first: the rows of a table that is sharded along D would be sharded
        # along D too, and XLA could only replicate them on every device.
        table = constrain(self.embedding[...], "vocab", "width")
        # Cast after the lookup: gradients over a token's occurrences sum in the table's dtype.
        return table.at[inputs].get(mode="fill").astype(self.dtype)

    def attend(
        self, query: Float[Array, "*B D"], *, preferred_element_type: Any = None
    ) -> Float[Array, "*B V"]:
        """query Eᵀ in `dtype`; `preferred_element_type` sets the dtype of the sum and result."""
        query, table = query.astype(self.dtype), self.embedding[...].astype(self.dtype)
        dtype = {"preferred_element_type": preferred_element_type}
        return jnp.einsum("...D,VD->...V", query, table, **dtype)


def scaled_embedding(size: int, d_model: int, dtype: Any, rngs: nnx.Rngs) -> Embed:
    """An `Embed` of variance 1/D: embedded tokens times √D have variance 1, and logits about 1."""
    init = nnx.initializers.normal(d_model**-0.5)
    return Embed(size, d_model, dtype=dtype, embedding_init=init, rngs=rngs)


def embed_scaled(embedding: Embed, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The token embeddings times √D. (Vaswani et al. 2017, section 3.4.)"""
    return constrain(embedding(tokens) * embedding.features**0.5, "batch", "length", "width")


def logits_of(embedding: Embed, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """x Eᵀ, summed in float32."""
    logits = embedding.attend(x, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "length", "vocab")
