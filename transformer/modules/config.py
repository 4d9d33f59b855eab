"""The model's options: defaults, ranges and contradictions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from transformer.errors import UserError
from transformer.knobs import Choice, Range, Rate, Size, SizeOrZero, validate
from transformer.modules import dot_product_attention as backends
from transformer.modules.cells import CELLS
from transformer.modules.layers import FEED_FORWARDS, NORM_PLACEMENTS
from transformer.modules.linear import INITIALIZERS
from transformer.modules.normalization import NORMS
from transformer.modules.positions import PER_LAYER, POSITIONS, RATES, SINUSOID_LAYOUTS, Position
from transformer.modules.stacks import REMATS

ARCHITECTURES = ("transformer", "recurrent")  # modules/model.py: MODULES

# The tables of embeddings: one of all; or one of source and target and one of the logits; or one of
# the source and one of target and logits; or three.
TIES = ("all", "inputs", "target_output", "none")

Backend = Annotated[str, Choice(backends.ATTENTION_BACKENDS)]
DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}

# A normal float32 number, since the norms compute in float32.
TINY = float(np.finfo(np.float32).tiny)
Epsilon = Annotated[float, Range(TINY, 1)]
Factor = Annotated[float, Range(TINY, 1e6)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture; a UserError names an option that is invalid or contradicts another."""

    architecture: Annotated[str, Choice(ARCHITECTURES)] = "transformer"  # or recurrent
    num_layers: Annotated[int, Range(1, 1_000)] = 1  # L, of the encoder and of the decoder
    decoder_layers: Annotated[int, Range(1, 1_000)] | None = None  # None: num_layers
    d_model: Size = 64  # D, model width
    num_heads: Size = 4  # N, attention heads
    d_k: Size | None = None  # H, width of a query or key; None: d_model / num_heads
    d_v: Size | None = None  # E, width of a value; None: d_k
    num_kv_heads: Size | None = None  # K, heads of keys and values; None: num_heads
    d_ff: Size = 256  # F, feed-forward width; gated kinds use 2/3 of it
    scale_gated: bool = True  # False: gated kinds are as wide as d_ff says
    feed_forward: Annotated[str, Choice(FEED_FORWARDS)] = "relu"  # modules/layers.py
    ff_bias: bool = True  # on the projections of the feed-forward
    cell: Annotated[str, Choice(CELLS)] = "lstm"  # for architecture=recurrent; modules/cells.py
    kernel_init: Annotated[str, Choice(INITIALIZERS)] = "glorot_uniform"  # modules/linear.py
    dropout_rate: Rate = 0.0  # on sublayer outputs and embedded tokens
    attention_dropout_rate: Rate = 0.0  # on the attention weights
    ff_dropout_rate: Rate = 0.0  # on the hidden units of the feed-forward
    norm: Annotated[str, Choice(NORMS)] = "layer"  # NORMS in modules/normalization.py
    norm_placement: Annotated[str, Choice(NORM_PLACEMENTS)] = "pre"  # pre, post (paper) or both
    final_norm: bool | None = None  # after the last layer; None: unless norm_placement is post
    norm_epsilon: Epsilon = 1e-6  # added to the variance
    position_encoding: Annotated[str, Choice(POSITIONS)] = "sinusoidal"  # modules/positions.py
    max_length: Size = 512  # tokens, for learned or random positions
    position_offset: SizeOrZero = 0  # number of the first sinusoidal or learned position
    sinusoid_layout: Annotated[str, Choice(SINUSOID_LAYOUTS)] = "neighbours"  # of sine and cosine
    sinusoid_rates: Annotated[str, Choice(RATES)] = "paper"  # modules/positions.py
    rotary_base: Annotated[float, Range(1, 1e12)] = 10_000.0  # of rotary positions' wavelengths
    relative_buckets: Annotated[int, Range(4, 2**20)] = 32  # of distances, for relative positions
    relative_distance: Size = 128  # from which distances share the last bucket
    relative_per_layer: bool = False  # relative or transformer_xl for each layer, not stack
    random_positions: SizeOrZero = 0  # range to draw from in training (Ruoss et al. 2023); 0: off
    window: Size | None = None  # width of local self-attention, each side; None: no limit
    tie_embeddings: Annotated[str, Choice(TIES)] = "all"  # which sides share a table; TIES
    separate_vocabularies: bool = True  # vocabulary size per side; False: the larger for both
    embedding_scale: Factor | None = None  # of embedded tokens; None: √d_model
    embedding_norm: bool = False  # a norm of embedded tokens, after absolute positions
    logits_scale: Factor = 1.0  # of the decoder's output, before the product with the table
    logits_bias: bool = False  # one number for each target token
    attention_bias: bool = False  # on the four projections of attention
    attention_scale: Factor | None = None  # of the scores; None: 1/√d_k
    normalize_qk: bool = False  # RMS norm of queries and keys, per head
    qk_norm_epsilon: Epsilon | None = None  # for normalize_qk; None: norm_epsilon
    attention_backend: Backend = "einsum"  # modules/dot_product_attention.py
    scan_layers: bool = False  # scan over the layers, which compiles one for all
    remat: Annotated[str, Choice(REMATS)] = "none"  # what the backward pass recomputes
    dtype: Annotated[str, Choice(DTYPES)] = "float32"  # of the computation; params are float32

    def __post_init__(self):
        validate(self, "model.")
        for option, problem in self._contradictions():
            value = getattr(self, option) or self.attention_width()  # d_k is None by default
            raise UserError(f"model.{option}={value}{problem}")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Yields each option that contradicts others, with the remedy."""
        recurrent, drops = self.architecture == "recurrent", self.attention_dropout_rate > 0.0
        flexible = self.attention_backend in backends.FLEXIBLE_BACKENDS
        those = f"model.attention_backend={' or '.join(backends.FLEXIBLE_BACKENDS)}"
        random, encoding = self.random_positions, self.position_encoding
        pairs = f" is odd: {encoding} positions are pairs of sine and cosine; choose an even one"
        if self.d_model % self.num_heads and (recurrent or not self.d_k):
            remedy = "; choose one that does, or set model.d_k"
            yield "num_heads", f" does not divide model.d_model={self.d_model}{remedy}"
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            yield "num_kv_heads", f" does not divide model.num_heads={self.num_heads}; lower it"
        if drops and (recurrent or not flexible):
            remedy = "drops weights; choose it, or set 0"
            yield "attention_dropout_rate", f": only the Transformer with {those} {remedy}"
        if self.attention_backend in backends.BFLOAT16_BACKENDS and self.dtype != "bfloat16":
            yield "attention_backend", " computes only in bfloat16; set model.dtype=bfloat16"
        if self.values_width() != self.attention_width() and not flexible:
            yield "d_v", f" differs from model.d_k, which needs {those}"
        if encoding in ("sinusoidal", "transformer_xl") and self.d_model % 2:
            yield "d_model", pairs
        if encoding == "rotary" and self.attention_width() % 2:
            yield "d_k", pairs
        if random and (random < self.max_length or encoding == "none"):
            least = f": it must be at least model.max_length={self.max_length}, with a "
            yield "random_positions", least + "model.position_encoding other than none; or 0"
        if self.relative_per_layer and encoding not in PER_LAYER:
            needed = f"model.position_encoding={' or '.join(PER_LAYER)}"
            yield "relative_per_layer", f" needs {needed}; or set False"
        if encoding == "relative" and self.relative_distance <= self.relative_buckets // 2:
            half = f"half of model.relative_buckets={self.relative_buckets}"
            yield "relative_distance", f" is not above {half}; raise it"
        if recurrent and self.ff_dropout_rate:
            yield "ff_dropout_rate", ": model.architecture=recurrent has no feed-forward; set 0"
        if recurrent and self.decoder_layers:
            yield "decoder_layers", ": model.architecture=recurrent has num_layers twice; set None"
        if recurrent and self.d_model % 2:
            yield "d_model", ": each direction of the encoder has half of it; choose an even one"

    def decoder_depth(self) -> int:
        """The number of layers of the decoder."""
        return self.decoder_layers or self.num_layers

    def attention_width(self) -> int:
        """H, the width of a head's queries and keys."""
        return self.d_k or self.d_model // self.num_heads

    def values_width(self) -> int:
        """E, the width of a head's values."""
        return self.d_v or self.attention_width()

    def auto_backend(self, length: int) -> str:
        """The attention backend that `auto` picks in training at this length on this platform."""
        width, drops = self.attention_width(), self.attention_dropout_rate > 0.0
        biased = POSITIONS[self.position_encoding].bias is not Position.bias
        options = {"biased": biased, "flexible": drops or self.values_width() != width}
        sizes = DTYPES[self.dtype], width, length
        return backends.pick(jax.default_backend(), *sizes, **options)

    def reach(self, length: int) -> int:
        """`length`, or the number of positions if that is less."""
        limited = POSITIONS[self.position_encoding].limited or self.random_positions > 0
        return min(length, self.max_length) if limited else length

    def check_length(self, length: int, what: str) -> None:
        """Raises a UserError if there are fewer than `length` positions."""
        if self.reach(length) < length:
            raise UserError(
                f"{what}: {length} tokens, and model.position_encoding={self.position_encoding} "
                f"ends at model.max_length={self.max_length}; raise it, or choose sinusoidal"
            )
