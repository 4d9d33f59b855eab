"""Feed-forward, residual connection, and the layers of encoder and decoder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules.attention import KeyValue, MultiHeadAttention, Rotate
from transformer.modules.dropout import CallRngs, Dropout
from transformer.modules.linear import Initializer, Linear, lecun_normal, linear_axes
from transformer.modules.normalization import NORMS, BatchNorm
from transformer.parallel.mesh import constrain

# The kinds of feed-forward: activation, and whether it gates a second product (Shazeer 2020).
FEED_FORWARDS = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),
    "swish": (jax.nn.swish, False),
    "glu": (jax.nn.sigmoid, True),
    "reglu": (jax.nn.relu, True),
    "geglu": (jax.nn.gelu, True),
    "swiglu": (jax.nn.swish, True),
}

NORM_PLACEMENTS = ("pre", "post", "both")

AttentionMask = Any  # a `Mask`, or an array that is True where a query may attend to a key


class FeedForward(nnx.Module):
    """FFN(x) = activation(x W₁ + b₁) W₂ + b₂ at each position. (Section 3.3, equation 2.)

    The gated kinds compute (activation(x W₁ + b₁) ⊙ (x W₃ + b₃)) W₂ + b₂ (Shazeer 2020, here with
    biases). Their hidden width is 2/3 of `d_ff`, rounded to a multiple of 8, which keeps the number
    of parameters.

    Args:
      d_model: D.
      d_ff: F.
      activation: one of `FEED_FORWARDS`.
      kernel_init: initializer of the matrices.
      rngs: random keys for the parameters.
      **options: `dtype` and `param_dtype` of `Linear`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        kernel_init: Initializer = lecun_normal,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.activation, gated = FEED_FORWARDS[activation]
        hidden = max(8, round(d_ff * 2 / 3 / 8) * 8) if gated else d_ff
        linear = partial(Linear, kernel_init=kernel_init, rngs=rngs, **options)
        expand = partial(linear, d_model, hidden, **linear_axes("embed", "mlp"))
        self.expand = expand()
        self.gate = expand() if gated else nnx.data(None)
        self.contract = linear(hidden, d_model, **linear_axes("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = self.activation(self.expand(x))
        hidden = hidden if self.gate is None else hidden * self.gate(x)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp")
        return self.contract(hidden)


class Residual(nnx.Module):
    """The connection around a sublayer, with its norm and its dropout.

        post:  x ← norm(x + dropout(sublayer(x)))       (Vaswani et al. 2017, section 3.1)
        pre:   x ← x + dropout(sublayer(norm(x)))       (Xiong et al. 2020)
        both:  x ← x + dropout(norm₂(sublayer(norm(x))))  (Ding et al. 2021, "sandwich")

    Args:
      d_model: D.
      norm: one of `NORMS`.
      placement: one of `NORM_PLACEMENTS`.
      dropout_rate: dropout rate of the sublayer's output.
      rngs: random keys for the parameters and dropout.
      **options: `epsilon`, `dtype` and `param_dtype` of the norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm: str = "layer",
        placement: str = "pre",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        make_norm = partial(NORMS[norm], d_model, rngs=rngs, **options)
        self.norm: Any = make_norm()
        self.output_norm: Any = make_norm() if placement == "both" else nnx.data(None)
        self.dropout = Dropout(dropout_rate, rngs=rngs)
        self.placement = placement

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sublayer: Callable[[Array], Array],
        *,
        token_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream x with the output of `sublayer` added."""
        mode = token_mask, deterministic
        y = sublayer(x if self.placement == "post" else apply_norm(self.norm, x, *mode))
        y = y if self.output_norm is None else apply_norm(self.output_norm, y, *mode)
        x = x + self.dropout(y, deterministic=deterministic, rngs=rngs)
        x = constrain(x, "batch", "length", "width")
        return apply_norm(self.norm, x, *mode) if self.placement == "post" else x


def apply_norm(
    norm: Any,
    x: Float[Array, "B T D"],
    token_mask: Bool[Array, "B T"] | None = None,
    deterministic: bool | None = None,
) -> Float[Array, "B T D"]:
    """Returns `norm(x)`; batch norm also takes its mode and the positions that hold tokens."""
    if not isinstance(norm, BatchNorm):
        return norm(x)
    mask = None if token_mask is None else token_mask[..., None]
    return norm(x, use_running_average=deterministic, mask=mask)


class Layer(nnx.Module):
    """Base class of the layers of encoder and decoder.

    Args:
      d_model: D.
      num_heads: N.
      d_ff: F.
      dropout_rate: dropout rate of each sublayer's output.
      attention_dropout_rate: dropout rate of the attention weights.
      norm: one of `NORMS`.
      norm_placement: one of `NORM_PLACEMENTS`.
      norm_epsilon: epsilon of the norms.
      feed_forward: one of `FEED_FORWARDS`.
      kernel_init: initializer of the matrices.
      dtype: the dtype of the computation; None: promoted from inputs and parameters.
      param_dtype: the dtype of the parameters.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
      **attention: further arguments of `MultiHeadAttention`, such as `use_bias` and `backend`.
    """

    attentions: tuple[str, ...] = ()
    self_attention: MultiHeadAttention
    cross_attention: MultiHeadAttention

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        norm: str = "layer",
        norm_placement: str = "pre",
        norm_epsilon: float = 1e-6,
        feed_forward: str = "relu",
        kernel_init: Initializer = lecun_normal,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        attention |= {"dropout_rate": attention_dropout_rate, "deterministic": False}
        for name in self.attentions:
            options = common | attention
            made = MultiHeadAttention(num_heads, d_model, kernel_init=kernel_init, **options)
            setattr(self, name, made)
        self.feed_forward = FeedForward(
            d_model, d_ff, activation=feed_forward, kernel_init=kernel_init, **common
        )
        norms = {"norm": norm, "placement": norm_placement, "epsilon": norm_epsilon}
        self.residuals = nnx.List(
            Residual(d_model, dropout_rate=dropout_rate, **norms, **common)
            for _ in range(len(self.attentions) + 1)
        )


class EncoderLayer(Layer):
    """Self-attention, then feed-forward, each inside a residual connection; see `Layer`."""

    attentions = ("self_attention",)

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
        """The layer's output.

        Args:
          x: the residual stream.
          mask: broadcastable to [B, N, S, S], True = may attend.
          deterministic: overrides the mode that `train()` and `eval()` set.
          rngs: random keys for dropout; streams `dropout` and `attention` (default `dropout`).
          token_mask: which positions hold tokens, for batch norm; None: all.
          bias: see `MultiHeadAttention`.
          rotate: see `MultiHeadAttention`.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        attention, feed_forward = self.residuals
        x = attention(
            x,
            lambda h: self.self_attention(h, mask=mask, bias=bias, rotate=rotate, **mode),
            token_mask=token_mask,
            **mode,
        )
        return feed_forward(x, self.feed_forward, token_mask=token_mask, **mode)


class DecoderLayer(Layer):
    """Masked self-attention, cross-attention to the memory, feed-forward; see `Layer`."""

    attentions = ("self_attention", "cross_attention")

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
        """The layer's output; the other arguments are those of `EncoderLayer`.

        Args:
          x: the residual stream of the target.
          memory: the encoder's output.
          mask: from target to target positions, such as `masking.causal(T)`.
          memory_mask: from target to source positions.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        return self.through(
            x,
            lambda h: self.self_attention(h, mask=mask, bias=bias, rotate=rotate, **mode),
            lambda h: self.cross_attention(h, memory, mask=memory_mask, **mode),
            token_mask=token_mask,
            **mode,
        )

    def through(self, x: Array, attend: Callable, attend_memory: Callable, **mode: Any) -> Array:
        """The three sublayers, each inside its residual connection."""
        sublayers = attend, attend_memory, self.feed_forward
        for residual, sublayer in zip(self.residuals, sublayers, strict=True):
            x = residual(x, sublayer, **mode)
        return x

    def decode_step(
        self,
        x: Float[Array, "B T D"],
        memory: KeyValue,
        cache: KeyValue,
        index: Int[Array, ""],
        *,
        memory_mask: AttentionMask,
        rotate: Rotate | None = None,
        **attention: Any,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The output for the next target positions, and the cache with them in it.

        Args:
          x: the residual stream of the next target positions.
          memory: `cross_attention.project_kv` of the encoder's output.
          cache: keys and values of the earlier target positions.
          index: where the keys and values of `x` are written.
          memory_mask: from the next positions to source positions.
          rotate: rotates the queries and keys of self-attention.
          **attention: `mask` and `bias`, from the next positions to the cache's.
        """

        def attend(h: Array) -> Array:
            nonlocal cache
            query = self.self_attention.project_query(h, rotate)
            cache = cache.write(self.self_attention.project_kv(h, rotate=rotate), index)
            return self.self_attention.attend(query, cache, deterministic=True, **attention)

        def attend_memory(h: Array) -> Array:
            query = self.cross_attention.project_query(h)
            return self.cross_attention.attend(query, memory, mask=memory_mask, deterministic=True)

        return self.through(x, attend, attend_memory, deterministic=True), cache
