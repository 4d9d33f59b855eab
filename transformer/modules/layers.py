"""Feed-forward, residual connection, and the layers of encoder and decoder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import check_choice, choose
from transformer.modules.attention import KeyValueCache, MultiHeadAttention, Rotate
from transformer.modules.dropout import CallRngs, Dropout, Moded, dropout, kept_stream, stream_of
from transformer.modules.linear import Initializer, Linear, lecun_normal, linear_axes
from transformer.modules.normalization import NORMS, BatchNorm
from transformer.parallel.mesh import constrain

# The kinds of feed-forward: activation, and whether it gates a second product (Shazeer 2020).
FEED_FORWARDS = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),  # approximated by tanh
    "gelu_erf": (partial(jax.nn.gelu, approximate=False), False),
    "swish": (jax.nn.swish, False),
    "glu": (jax.nn.sigmoid, True),
    "reglu": (jax.nn.relu, True),
    "geglu": (jax.nn.gelu, True),
    "swiglu": (jax.nn.swish, True),
}

NORM_PLACEMENTS = ("pre", "post", "both")

Stream = Float[Array, "B T D"]  # the residual stream, or the sublayers' outputs
Sublayer = Callable[[Array], Array]
TokenMask = Bool[Array, "B T"] | None
AttentionMask = Any  # a `Mask`, or an array that is True where a query may attend to a key


class FeedForward(Moded):
    """FFN(x) = activation(x W₁ + b₁) W₂ + b₂ at each position. (Section 3.3, equation 2.)

    The gated kinds are (activation(x W₁ + b₁) ⊙ (x W₃ + b₃)) W₂ + b₂ (Shazeer 2020, with biases),
    2/3 as wide, rounded to a multiple of 8, which keeps the number of parameters, unless
    `scale_gated` is False.

    Args:
      d_ff: F; None: 4 · D.
      activation: one of `FEED_FORWARDS`.
      dropout_rate: of the F hidden units.
      **options: `rngs`, `use_bias`, `kernel_init`, `dtype` and `param_dtype` of `Linear`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "relu",
        scale_gated: bool = True,
        dropout_rate: float = 0.0,
        **options: Any,
    ):
        self.activation, gated = choose(FEED_FORWARDS, activation, "activation")
        hidden = 4 * d_model if d_ff is None else d_ff
        hidden = max(8, round(hidden * 2 / 3 / 8) * 8) if gated and scale_gated else hidden
        expand = partial(Linear, d_model, hidden, **linear_axes("embed", "mlp"), **options)
        self.expand = expand()
        self.gate = expand() if gated else nnx.data(None)
        self.contract = Linear(hidden, d_model, **linear_axes("mlp", "embed"), **options)
        self.dropout_rate = dropout_rate
        self.rngs = nnx.data(kept_stream(options["rngs"], dropout_rate))

    def __call__(
        self, x: Float[Array, "*B D"], *, deterministic: bool | None = None, rngs: CallRngs = None
    ) -> Float[Array, "*B D"]:
        hidden = self.activation(self.expand(x))
        hidden = hidden if self.gate is None else hidden * self.gate(x)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp")
        if self.dropout_rate > 0.0 and not self.is_deterministic(deterministic):
            hidden = dropout(hidden, self.dropout_rate, stream_of("dropout", rngs, self.rngs))
        return self.contract(hidden)


def make_norm(d_model: int, norm: str = "layer", norm_epsilon: float = 1e-6, **options: Any) -> Any:
    """A norm; options are `rngs`, `dtype` and `param_dtype`."""
    return choose(NORMS, norm, "norm")(d_model, epsilon=norm_epsilon, **options)


def apply_norm(
    norm: Any, x: Stream, token_mask: TokenMask = None, deterministic: bool | None = None
) -> Stream:
    """`norm(x)`; batch norm also takes its mode and the positions that hold tokens. None: x."""
    if not isinstance(norm, BatchNorm):
        return x if norm is None else norm(x)
    mask = None if token_mask is None else token_mask[..., None]
    return norm(x, use_running_average=deterministic, mask=mask)


class Residual(nnx.Module):
    """The connection around a sublayer, with its norm and its dropout.

    post:  x ← norm(x + dropout(sublayer(x)))       (Vaswani et al. 2017, section 3.1)
    pre:   x ← x + dropout(sublayer(norm(x)))       (Xiong et al. 2020)
    both:  x ← x + dropout(norm₂(sublayer(norm(x))))  (Ding et al. 2021, "sandwich")
    """

    def __init__(
        self, d_model: int, *, placement: str = "pre", dropout_rate: float = 0.0, **norm: Any
    ):
        check_choice(NORM_PLACEMENTS, placement, "norm_placement")
        self.placement = placement
        self.norm = make_norm(d_model, **norm)
        self.output_norm = make_norm(d_model, **norm) if placement == "both" else nnx.data(None)
        self.dropout = Dropout(dropout_rate, rngs=norm["rngs"])

    def __call__(
        self, x: Stream, sublayer: Sublayer, *, token_mask: TokenMask = None, **mode: Any
    ) -> Stream:
        options = token_mask, mode.get("deterministic")
        y = sublayer(x if self.placement == "post" else apply_norm(self.norm, x, *options))
        x = x + self.dropout(apply_norm(self.output_norm, y, *options), **mode)
        x = constrain(x, "batch", "length", "width")
        return apply_norm(self.norm, x, *options) if self.placement == "post" else x


class Layer(nnx.Module):
    """Base class of the layers of encoder and decoder.

    Args:
      d_ff: F; None: 4 · D.
      dropout_rate: of the sublayers' outputs; that of the weights is `attention_dropout_rate`, and
        that of the hidden units of the feed-forward `ff_dropout_rate`.
      norm: one of `NORMS`, placed by `norm_placement`, one of `NORM_PLACEMENTS`.
      feed_forward: one of `FEED_FORWARDS`; `ff_bias` and `scale_gated`: see `FeedForward`.
      **attention: further arguments of `MultiHeadAttention`, such as `use_bias` and `backend`.
    """

    attentions: tuple[str, ...] = ()
    self_attention: MultiHeadAttention
    cross_attention: MultiHeadAttention

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        ff_dropout_rate: float = 0.0,
        norm: str = "layer",
        norm_placement: str = "pre",
        norm_epsilon: float = 1e-6,
        feed_forward: str = "relu",
        ff_bias: bool = True,
        scale_gated: bool = True,
        kernel_init: Initializer = lecun_normal,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        matrices = common | {"kernel_init": kernel_init}
        attention |= {"dropout_rate": attention_dropout_rate, "deterministic": False} | matrices
        for name in self.attentions:
            setattr(self, name, MultiHeadAttention(num_heads, d_model, **attention))
        inner: dict[str, Any] = {"activation": feed_forward, "scale_gated": scale_gated}
        inner |= {"use_bias": ff_bias, "dropout_rate": ff_dropout_rate} | matrices
        self.feed_forward = FeedForward(d_model, d_ff, **inner)
        common |= {"norm": norm, "norm_epsilon": norm_epsilon, "dropout_rate": dropout_rate}
        residual = partial(Residual, d_model, placement=norm_placement, **common)
        self.residuals = nnx.List(residual() for _ in (*self.attentions, "feed_forward"))

    def through(
        self, x: Stream, *attend: Sublayer, token_mask: TokenMask = None, **mode: Any
    ) -> Stream:
        """Attention, then feed-forward, each inside its residual connection."""
        sublayers = *attend, partial(self.feed_forward, **mode)
        for residual, sublayer in zip(self.residuals, sublayers, strict=True):
            x = residual(x, sublayer, token_mask=token_mask, **mode)
        return x


class EncoderLayer(Layer):
    """Self-attention, then feed-forward, each inside a residual connection; see `Layer`."""

    attentions = ("self_attention",)

    def __call__(
        self,
        x: Stream,
        *,
        mask: AttentionMask = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
        token_mask: TokenMask = None,
        **encoding: Any,
    ) -> Stream:
        """The layer's output.

        Args:
          mask: broadcastable to [B, N, T, T], True = may attend.
          deterministic: overrides the mode that `train()` and `eval()` set.
          rngs: random keys for dropout.
          token_mask: which positions hold tokens, for batch norm; None: all.
          **encoding: `bias` and `rotate` of `MultiHeadAttention`.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        attend = partial(self.self_attention, mask=mask, **mode, **encoding)
        return self.through(x, attend, token_mask=token_mask, **mode)


class DecoderLayer(Layer):
    """Masked self-attention, cross-attention to the memory, feed-forward; see `Layer`."""

    attentions = ("self_attention", "cross_attention")

    def __call__(
        self,
        x: Stream,
        memory: Float[Array, "B S D"],
        *,
        mask: AttentionMask = None,
        memory_mask: AttentionMask = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
        token_mask: TokenMask = None,
        **encoding: Any,
    ) -> Stream:
        """The layer's output; the other arguments are those of `EncoderLayer`.

        Args:
          memory: the encoder's output, attended to under `memory_mask`.
          mask: of self-attention, such as `masking.causal(T)`.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        attend = partial(self.self_attention, mask=mask, **mode, **encoding)
        attend_memory = partial(self.cross_attention, inputs_k=memory, mask=memory_mask, **mode)
        return self.through(x, attend, attend_memory, token_mask=token_mask, **mode)

    def decode_step(
        self,
        x: Stream,
        memory: KeyValueCache,
        cache: KeyValueCache,
        index: Int[Array, ""],
        *,
        mask: AttentionMask,
        memory_mask: AttentionMask,
        rotate: Rotate = None,
        bias: Any = None,
    ) -> tuple[Stream, KeyValueCache]:
        """The output for the next target positions, and the cache with theirs from `index` on."""

        def attend(h: Array) -> Array:
            nonlocal cache
            query = self.self_attention.project_query(h, rotate)
            cache = cache.write(self.self_attention.project_kv(h, rotate=rotate), index)
            return self.self_attention.attend_cached(query, cache, mask, bias)

        def attend_memory(h: Array) -> Array:
            query = self.cross_attention.project_query(h)
            return self.cross_attention.attend_cached(query, memory, memory_mask)

        return self.through(x, attend, attend_memory, deterministic=True), cache
