"""Linear transformations and embeddings, with `nnx`'s arguments and parameter layouts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from transformer.parallel.mesh import RULES, constrain

Initializer = Callable[..., Any]

lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros_init()

# Initializers of the matrices of attention and feed-forward.
INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": nnx.initializers.glorot_uniform(),  # Glorot and Bengio 2010
    "glorot_normal": nnx.initializers.glorot_normal(),
    "lecun_normal": lecun_normal,
    "he_normal": nnx.initializers.he_normal(),  # He et al. 2015
    "normal": nnx.initializers.normal(0.02),  # Radford et al. 2019 (GPT-2)
}


def axis_names(*names: str) -> dict[str, Any]:
    """Flax's sharding metadata of a parameter: a logical name per axis, a key of `mesh.RULES`.

    Creating the parameter does not shard it: a module works under any mesh.
    """
    return {"out_sharding": names, "eager_sharding": False}


def linear_axes(*names: str) -> dict[str, Any]:
    """The metadata arguments of a `Linear` whose kernel has these axes, from or to "embed"."""
    bias = ("norm",) if names[-1] == "embed" else names[1:]
    return {"kernel_metadata": axis_names(*names), "bias_metadata": axis_names(*bias)}


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` as a product of two matrices, if it contracts the last axes of x.

    Of a product that contracts one axis and keeps several, the gradient of the kernel contracts
    several, and XLA's CPU backend transposes both of its factors element by element.
    """
    (axes, others), batch = dimension_numbers
    first, mesh = x.ndim - len(axes), jax.sharding.get_abstract_mesh()
    trailing = tuple(axes) == tuple(range(first, x.ndim)) and not any(batch)
    # Merging a sharded length with the batch would gather it; a mesh not ours may shard any axis.
    split = not mesh.empty and mesh.shape.get(RULES["length"], mesh.size) > 1
    if split or not trailing or tuple(others) != tuple(range(len(axes))):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, math.prod(x.shape[first:]))
    out = jax.lax.dot_general(
        rows, kernel.reshape(rows.shape[1], -1), (((1,), (0,)), ((), ())), **options
    )
    return out.reshape(*x.shape[:first], *kernel.shape[len(axes) :])


class Linear(nnx.LinearGeneral):
    """x W + b, with the arguments of `nnx.LinearGeneral` except `batch_axis` and `promote_dtype`.

    The gradient of b is summed in the dtype of b: bfloat16 cannot count above 256.
    """

    def __init__(self, in_features: Any, out_features: Any, **options: Any):
        own: dict[str, Any] = {"batch_axis": {}, "promote_dtype": _without_bias}
        options = {"dot_general": dot_general} | options
        super().__init__(in_features, out_features, **own, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        out = super().__call__(inputs, out_sharding)
        if self.bias is None:
            return out
        # The gradient is summed where the bias is broadcast, before the cast.
        return out + jnp.broadcast_to(self.bias[...], out.shape).astype(out.dtype)


def _without_bias(arrays: Any, **options: Any) -> Any:
    """Inputs and kernel in the dtype of the computation; `Linear` adds the bias."""
    return *promote_dtype(arrays, **options)[:2], None


class Embed(nnx.Embed):
    """One vector for each token, `nnx.Embed`, whose arguments it takes; `attend` gives logits.

    A token outside the vocabulary becomes NaN. Gradients are summed in the parameter's dtype.
    """

    def __init__(self, num_embeddings: int, features: int, **options: Any):
        metadata: dict[str, Any] = {"embedding_metadata": axis_names("vocab", "embed")}
        super().__init__(num_embeddings, features, **metadata | options)

    def __call__(self, inputs: Int[Array, "*B"], out_sharding: Any = None) -> Float[Array, "*B D"]:
        # Gather over fsdp first: XLA could only replicate rows of a table that is sharded along D.
        table = constrain(self.embedding[...], "vocab", "width")
        # Cast after the lookup: gradients over a token's occurrences sum in the table's dtype.
        rows = table.at[inputs].get(mode="fill", out_sharding=out_sharding)
        return self.promote_dtype((rows,), dtype=self.dtype)[0]

    def attend(self, query: Array, out_sharding: Any = None, **options: Any) -> Array:
        """query Eᵀ in `dtype`; options are those of `jnp.einsum`."""
        arrays = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return jnp.einsum("...D,VD->...V", *arrays, out_sharding=out_sharding, **options)
