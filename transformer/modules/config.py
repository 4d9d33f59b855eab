"""The model's knobs: what they may be, and what contradicts itself."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.errors import UserError, choose, within
from transformer.modules.dot_product_attention import (
    ATTENTION_BACKENDS,
    BFLOAT16_BACKENDS,
    FLEXIBLE_BACKENDS,
    pick,
)
from transformer.modules.layers import (
    FEED_FORWARDS,
    INITIALIZERS,
    NORM_PLACEMENTS,
)
from transformer.modules.normalization import NORMS
from transformer.modules.positions import POSITIONS, Position
from transformer.modules.recurrent import CELLS

ARCHITECTURES = ("transformer", "recurrent")  # transformer/modules/model.py: MODULES

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}

# The most that a size may be: what is above is a slip of the finger.
SIZES = {
    "layers": 1_000,
    "width": 2**20,
    "heads": 2**20,
    "head_width": 2**20,
    "value_width": 2**20,
    "kv_heads": 2**20,
    "ff_width": 2**20,
    "max_length": 2**20,
    "window": 2**20,
}

# What a layer keeps for its gradient; all else is computed anew there.
REMATS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not those of attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


# The tables that knobs name an entry of.
TABLES: dict[str, dict[str, Any]] = {
    "architecture": {name: name for name in ARCHITECTURES},
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture.

    Raises:
      UserError: a name is unknown, or the numbers contradict each other.
    """

    architecture: str = "transformer"  # transformer/modules/config.py: ARCHITECTURES
    layers: int = 1  # L, of the encoder and of the decoder
    width: int = 64  # D
    heads: int = 4  # N
    head_width: int | None = None  # H, d_k; None: width / heads
    value_width: int | None = None  # E, d_v; None: head_width
    kv_heads: int | None = None  # K, of keys and values; None: heads
    ff_width: int = 256  # F; the gated kinds have 2/3 of it, and as many parameters
    feed_forward: str = "relu"  # transformer/modules/layers.py: FEED_FORWARDS
    cell: str = "lstm"  # of the recurrent architecture; transformer/modules/recurrent.py: CELLS
    init: str = "glorot_uniform"  # transformer/modules/layers.py: INITIALIZERS
    dropout: float = 0.0  # on each sublayer's output and on the embedded tokens
    attention_dropout: float = 0.0  # on the attention weights
    norm: str = "layer"  # transformer/modules/normalization.py: NORMS
    norm_placement: str = "pre"  # pre (Xiong 2020), post (Vaswani 2017) or both
    norm_epsilon: float = 1e-6  # added to the variance
    position: str = "sinusoidal"  # transformer/modules/positions.py: POSITIONS
    max_length: int = 512  # tokens, where positions are learned or random
    random_positions: int = 0  # draw them from so many in training (Ruoss 2023); 0: do not
    window: int | None = None  # self-attention reaches less far; None: all
    tie_embeddings: bool = True  # one table for source, target and logits
    separate_vocabularies: bool = True  # each side's table has its own size; False: the larger
    attention_bias: bool = False  # on the four projections of attention
    qk_norm: bool = False  # RMS norm of queries and keys, head by head
    qk_norm_epsilon: float | None = None  # of that norm; None: norm_epsilon
    fused_qkv: bool = False  # queries, keys and values of a sequence in one product
    attention_backend: str = "einsum"  # in transformer/modules/dot_product_attention.py
    scan_layers: bool = False  # compiled once for all layers of a stack
    remat: str = "none"  # computed anew in the gradient; REMATS there
    dtype: str = "float32"  # of the computation; parameters are always float32

    def __post_init__(self):
        for name, entries in TABLES.items():
            choose(entries, getattr(self, name), f"model.{name}")
        for name, most in SIZES.items():
            if getattr(self, name) is not None:
                within(f"model.{name}", getattr(self, name), 1, most)
        within("model.random_positions", self.random_positions, 0, 2**20)
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            self.require(name, 0.0 <= rate < 1.0, "it must be at least 0 and below 1")
        # In float32, which the norms compute in.
        for name in ("norm_epsilon", "qk_norm_epsilon"):
            value = getattr(self, name)
            normal = value is None or float(np.finfo(np.float32).tiny) <= value <= 1.0
            self.require(name, normal, "it must be above 0, as a float32 too, and at most 1")
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
