"""The encoder-decoder Transformer, assembled from the config."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import UserError
from transformer.modules import masking
from transformer.modules.attention import KeyValueCache, MultiHeadAttention
from transformer.modules.config import DTYPES, ModelConfig
from transformer.modules.dot_product_attention import SHORT_MASK_BACKENDS
from transformer.modules.dropout import Dropout, Moded, stream_of
from transformer.modules.layers import apply_norm, make_norm
from transformer.modules.linear import INITIALIZERS, Embed, axis_names
from transformer.modules.normalization import RMSNorm
from transformer.modules.positions import POSITIONS, PerLayer, in_row
from transformer.modules.stacks import Caches, Decoder, Encoder
from transformer.parallel.mesh import constrain

Source = Int[Array, "B S"]  # tokens, or their segments or positions
Target = Int[Array, "B T"]
Positions = Int[Array, "#B T"]
Memory = Float[Array, "B S D"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]


class Cache(NamedTuple):
    """The state of decoding, passed to and returned by `decode_step`.

    Entry t · J + j of `decoded` was computed by hypothesis j of a source at position t. It stays
    there if another hypothesis continues from it: beam search permutes `own`, not keys and values.
    """

    filled: Int[Array, ""]  # the number of decoded target positions
    decoded: Caches  # each layer's self-attention; see `grow`
    own: Bool[Array, "B J entries"]  # which entries belong to the past of each hypothesis
    memory: Caches  # each layer's cross-attention
    source_segments: Source

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache in which hypothesis j continues hypothesis parents[:, j]."""
        return self._replace(own=jnp.take_along_axis(self.own, parents[..., None], axis=1))

    def grow(self, length: int) -> "Cache":
        """The cache with room for `length` target positions."""
        entries = length * self.own.shape[1]
        own = jnp.pad(self.own, ((0, 0), (0, 0), (0, entries - self.own.shape[2])))
        decoded = tuple(each.grow(entries) for each in self.decoded)
        return self._replace(decoded=decoded, own=own)


class EncoderDecoder(Moded):
    """Base class of the architectures: embeddings and logits, which share one table if tied."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        target_vocab_size: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        # Of variance 1/D: embedded tokens times √D have variance 1, and logits about 1.
        init = nnx.initializers.normal(config.d_model**-0.5)
        options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "rngs": rngs}
        embed = partial(Embed, features=config.d_model, embedding_init=init, **options)
        ties, size = config.tie_embeddings, target_vocab_size or vocab_size
        if ties in ("all", "inputs") and size != vocab_size:
            problem = f"{vocab_size:,} tokens of the source and {size:,} of the target"
            raise UserError(f"model.tie_embeddings={ties}: {problem}; set target_output or none")
        self.config = config
        self.embedding = embed(vocab_size)
        self.target_embedding = nnx.data(None if ties in ("all", "inputs") else embed(size))
        self.output_embedding = nnx.data(embed(size) if ties in ("inputs", "none") else None)
        bias = nnx.Param(jnp.zeros(size), **axis_names("vocab")) if config.logits_bias else None
        self.logits_bias = nnx.data(bias)
        self._build(config, rngs)

    def _build(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def __call__(
        self,
        source: Source,
        target_in: Target,
        *,
        source_segments: Source | None = None,
        target_segments: Target | None = None,
        source_positions: Source | None = None,
        target_positions: Target | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Logits:
        """Logits for each target position, given the source and the target before it.

        Args:
          target_in: BOS and the target's tokens.
          source_segments, target_segments: 0 = padding; in packed rows, the number of a token's
            example in its row, which attention does not leave. None: 1 where the token is not 0.
          source_positions, target_positions: of each token in its segment; None: in its row.
          deterministic: whether to disable dropout; None: as set by `train()` and `eval()`.
          rngs: random keys for training; see `dropout.training_rngs`.
        """
        segments = {"source_segments": source_segments, "target_segments": target_segments}
        positions = {"source_positions": source_positions, "target_positions": target_positions}
        mode: Any = {"deterministic": deterministic, "rngs": rngs}
        return self.logits(self.hidden(source, target_in, **segments, **positions, **mode))

    def hidden(self, source: Source, target_in: Target, **options: Any) -> Hidden:
        """The decoder's output times `logits_scale`, for `logits`; arguments as of a call."""
        raise NotImplementedError

    def embed(self, tokens: Target, table: Embed | None = None) -> Float[Array, "B T D"]:
        """The tokens' vectors in a table, by default the source's, times √D. (Section 3.4.)

        Or times `embedding_scale`, if that is set.
        """
        table, scale = table or self.embedding, self.config.embedding_scale
        scale = table.features**0.5 if scale is None else scale
        return constrain(table(tokens) * scale, "batch", "length", "width")

    def scaled(self, decoded: Hidden) -> Hidden:
        """The decoder's output times `logits_scale`."""
        return decoded if self.config.logits_scale == 1.0 else decoded * self.config.logits_scale

    def logits(self, hidden: Hidden) -> Logits:
        """The logits of the next target token: hidden Eᵀ + b, summed in float32."""
        logits = self.output.attend(hidden, preferred_element_type=jnp.float32)
        logits = logits if self.logits_bias is None else logits + self.logits_bias[...]
        return constrain(logits, "batch", "length", "vocab")

    @property
    def output(self) -> Embed:
        """The embedding whose table gives the logits."""
        return self.output_embedding or self.target_embedding or self.embedding

    def output_table(self) -> Float[Array, "V D"]:
        """The vectors E of the target tokens in `logits`."""
        return self.output.embedding[...]

    def output_bias(self) -> Float[Array, " V"] | None:
        """The bias b of `logits`; None: no bias."""
        return None if self.logits_bias is None else self.logits_bias[...]


class Transformer(EncoderDecoder):
    """Vaswani et al. 2017, figure 1: tokens in, logits over the next target token out.

    Args:
      vocab_size: V of the source.
      target_vocab_size: V of the target and the logits; None: the same.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
    """

    def _build(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        if config.architecture != "transformer":
            raise UserError(f"model.architecture={config.architecture} is no Transformer; use Run")
        stack, depth = stack_arguments(config), config.decoder_depth()
        self.source_position = _position(config, config.num_layers, causal=False, rngs=rngs)
        self.target_position = _position(config, depth, causal=True, rngs=rngs)
        names = ("d_model", "norm", "norm_epsilon", "dtype")
        norm = partial(make_norm, **{name: stack[name] for name in names}, rngs=rngs)
        self.source_embedding_norm = nnx.data(norm() if config.embedding_norm else None)
        self.target_embedding_norm = nnx.data(norm() if config.embedding_norm else None)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.encoder = Encoder(**stack, rngs=rngs)
        stack["num_layers"] = depth
        self.decoder = Decoder(**stack, rngs=rngs)

    def hidden(
        self,
        source: Source,
        target_in: Target,
        source_segments: Source | None = None,
        target_segments: Target | None = None,
        source_positions: Source | None = None,
        target_positions: Target | None = None,
        **mode: Any,
    ) -> Hidden:
        source_segments = masking.segments_of(source, source_segments)
        segments = masking.segments_of(target_in, target_segments)
        if target_segments is None:  # the first token is no padding, even if it has its number
            segments = segments.at[:, 0].set(1)
        memory = self.encode(source, source_segments, source_positions, **mode)
        positions = self.positions(in_row(target_in, target_positions), **mode)
        mask = self._mask(segments, segments, causal=True, window=self.config.window)
        masks = {"mask": mask, "memory_mask": self._mask(segments, source_segments)}
        encoding = _attention_positions(self.target_position, positions, positions)
        x = self.target_position(self.embed(target_in, self.target_embedding), positions)
        tokens = segments > 0
        x = self._enter(self.target_embedding_norm, x, tokens, **mode)
        x = self.decoder(x, memory, token_mask=tokens, **masks, **encoding, **mode)
        return self.scaled(x)

    def encode(
        self, source: Source, source_segments: Any = None, positions: Any = None, **mode: Any
    ) -> Memory:
        """The encoder's output, the memory; `mode` is `deterministic` and `rngs` of `__call__`."""
        segments = masking.segments_of(source, source_segments)
        index = self.positions(in_row(source, positions), **mode)
        mask = self._mask(segments, segments, window=self.config.window)
        encoding = _attention_positions(self.source_position, index, index)
        x, tokens = self.source_position(self.embed(source), index), segments > 0
        x = self._enter(self.source_embedding_norm, x, tokens, **mode)
        return self.encoder(x, mask=mask, token_mask=tokens, **encoding, **mode)

    def _enter(self, norm: Any, x: Hidden, token_mask: Any = None, **mode: Any) -> Hidden:
        """Embedded tokens as a stack takes them, after their norm, if any, and dropout."""
        return self.dropout(apply_norm(norm, x, token_mask, mode.get("deterministic")), **mode)

    def positions(
        self, index: Positions, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Positions:
        """The positions of tokens, given their index in their sequences.

        With `random_positions` L, those of a training batch are drawn from 0 … L - 1 without
        replacement and sorted (Ruoss et al. 2023, section 3). In evaluation, where the paper draws
        again, they are multiples of L / `max_length`.
        """
        reach, length = self.config.random_positions, self.config.max_length
        if not reach:
            return index
        if self.is_deterministic(deterministic):
            return index * (reach // length)
        # The longest possible example; a packed row may be longer.
        length = min(index.shape[1], length) if index.shape[0] == 1 else length
        stream = stream_of("positions", rngs, self.dropout.rngs)
        if stream is None:
            raise ValueError("random positions need random keys in training: pass rngs=")
        drawn = jax.random.choice(stream(), reach, (length,), replace=False)
        return jnp.sort(drawn)[index]

    def _mask(self, queries: Target, keys: Source, **structure: Any) -> Any:
        """The mask between segments, as a `Mask` if the attention backend takes one."""
        mask = masking.Mask(queries, keys, **structure)
        short = self.config.attention_backend in SHORT_MASK_BACKENDS
        return mask if short else mask.array()

    def start_cache(
        self, memory: Memory, source_segments: Source, length: int, hypotheses: int = 1
    ) -> Cache:
        """An empty cache for up to `length` target positions per hypothesis."""
        config, entries = self.config, length * hypotheses
        shape = memory.shape[0], config.num_kv_heads or config.num_heads
        key = jnp.zeros((*shape, config.attention_width(), entries), memory.dtype)
        value = jnp.zeros((*shape, entries, config.values_width()), memory.dtype)
        read = (layer.cross_attention.project_kv(memory) for layer in self.decoder.layers)
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            decoded=(KeyValueCache(key, value),) * config.decoder_depth(),
            own=jnp.zeros((memory.shape[0], hypotheses, entries), bool),
            memory=tuple(map(KeyValueCache.of, read)),
            source_segments=source_segments,
        )

    def decode_step(self, tokens: Target, cache: Cache) -> tuple[Logits, Cache]:
        """The logits after each of the next T target tokens, and the cache with them in it.

        The logits equal those of a call with the whole target, and are NaN past the length of the
        cache. With J > 1 hypotheses T = J: the next token of each.
        """
        filled, (hypotheses, entries) = cache.filled, cache.own.shape[1:]
        steps, room = tokens.shape[1] // hypotheses, entries // hypotheses
        index = jnp.full((1, hypotheses), filled)
        if hypotheses == 1:
            index = filled + jnp.arange(steps)[None]
            mask = masking.causal(steps, room, filled)
        else:
            new = jnp.eye(hypotheses, dtype=bool)[None].repeat(tokens.shape[0], axis=0)
            own = jax.lax.dynamic_update_slice_in_dim(cache.own, new, filled * hypotheses, axis=2)
            cache, mask = cache._replace(own=own), own[:, None]
        if self.config.window is not None:
            near = masking.window(steps, room, self.config.window, filled)
            mask = mask & jnp.repeat(near, hypotheses, axis=3)
        positions = self.positions(index, True)
        keys = self.positions(jnp.arange(entries)[None] // hypotheses, True)
        masks = {"mask": mask, "memory_mask": masking.padding(cache.source_segments > 0)}
        encoding = _attention_positions(self.target_position, positions, keys)
        x = self.target_position(self.embed(tokens, self.target_embedding), positions)
        x = self._enter(self.target_embedding_norm, x, deterministic=True)
        caches = cache.memory, cache.decoded, filled * hypotheses
        x, decoded = self.decoder.decode_step(x, *caches, **masks, **encoding)
        logits = jnp.where(filled + steps <= room, self.logits(self.scaled(x)), jnp.nan)
        return logits, cache._replace(filled=filled + steps, decoded=decoded)


def stack_arguments(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `Encoder` and `Decoder`, except `rngs`."""
    shared = (
        "num_layers d_model num_heads num_kv_heads d_ff feed_forward ff_bias scale_gated norm "
        "norm_placement norm_epsilon final_norm dropout_rate attention_dropout_rate "
        "ff_dropout_rate normalize_qk scan_layers remat"
    )
    return {name: getattr(config, name) for name in shared.split()} | {
        "kernel_init": INITIALIZERS[config.kernel_init],
        "dtype": DTYPES[config.dtype],
        "qkv_features": config.num_heads * config.attention_width(),
        "value_features": config.num_heads * config.values_width(),
        "use_bias": config.attention_bias,
        "qk_norm": partial(RMSNorm, epsilon=config.qk_norm_epsilon or config.norm_epsilon),
        "backend": config.attention_backend,
        "scale": config.attention_scale,
    }


# Arguments of position encodings, and the knobs that set them.
OFFSET = {"offset": "position_offset"}
POSITION_KNOBS = {
    "sinusoidal": {"layout": "sinusoid_layout", "rates": "sinusoid_rates"} | OFFSET,
    "learned": OFFSET,
    "rotary": {"base": "rotary_base"},
    "relative": {"buckets": "relative_buckets", "distance": "relative_distance"},
}


def _position(config: ModelConfig, num_layers: int, **options: Any) -> Any:
    """The position encoding of a stack with so many layers."""
    encoding, length = config.position_encoding, config.random_positions or config.max_length
    knobs = POSITION_KNOBS.get(encoding, {}).items()
    options |= {name: getattr(config, knob) for name, knob in knobs}
    options |= {"num_heads": config.num_heads, "max_length": length}
    if encoding == "transformer_xl":
        options |= {"head_width": config.attention_width(), "scale": config.attention_scale}
        options["init"] = config.kernel_init
    make = partial(POSITIONS[encoding], config.d_model, **options)
    return PerLayer(make() for _ in range(num_layers)) if config.relative_per_layer else make()


def _attention_positions(position: Any, queries: Array, keys: Array) -> dict[str, Any]:
    rotate = partial(position.rotate, positions=queries)
    return {"rotate": rotate, "bias": position.bias(queries, keys)}


def set_dropout_rates(module: nnx.Module, dropout_rate: Any, attention_dropout_rate: Any) -> None:
    """Sets the dropout rates of a model to numbers or traced scalars."""
    attention = MultiHeadAttention, "dropout_rate", attention_dropout_rate
    for kind, name, rate in ((Dropout, "rate", dropout_rate), attention):
        value: Any = nnx.data(rate) if isinstance(rate, jax.Array) else rate
        module.set_attributes(kind, raise_if_not_found=False, **{name: value})
