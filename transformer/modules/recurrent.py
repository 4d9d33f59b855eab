"""The recurrent baseline: a bidirectional encoder and a decoder with attention."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules import masking
from transformer.modules.attention import KeyValue, MultiHeadAttention
from transformer.modules.cells import CELLS, State, run
from transformer.modules.config import DTYPES, ModelConfig
from transformer.modules.dot_product_attention import attention_weights
from transformer.modules.dropout import Dropout
from transformer.modules.linear import INITIALIZERS, Linear, linear_axes
from transformer.modules.transformer import EncoderDecoder, Hidden, Logits, Memory, Source, Target
from transformer.parallel.mesh import constrain


class Cache(NamedTuple):
    """The state of decoding, passed to and returned by `decode_step`.

    A row is a hypothesis; the J hypotheses of a source are adjacent.
    """

    filled: Int[Array, ""]  # how many target positions have been decoded
    states: tuple[State, ...]  # of each layer
    attended: Float[Array, "rows D"]  # the last output, which is also an input of the next step
    memory: KeyValue  # of the encoder's output
    mask: Bool[Array, "B 1 1 S"]  # which source positions are tokens

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache in which hypothesis j continues hypothesis parents[:, j]."""
        rows = (jnp.arange(parents.shape[0])[:, None] * parents.shape[1] + parents).reshape(-1)
        states, attended = jax.tree.map(lambda each: each[rows], (self.states, self.attended))
        return self._replace(states=states, attended=attended)


class Recurrent(EncoderDecoder):
    """LSTM or GRU encoder-decoder with attention; ignores options that do not apply.

        encoder:  m = [→cell(x) ; ←cell(x)], each half as wide, `num_layers` times
        decoder:  s_t = cell([E(y_t) ; a_{t-1}], s_{t-1}),  a_t = tanh(W [s_t ; Attention(s_t, m)])
        logits:   a_t Eᵀ

    The decoder begins with tanh(W ←m_0) (Bahdanau et al. 2015, section A.2.2), feeds its output
    back to its input (Luong et al. 2015, section 3.3), and has the Transformer's attention.
    """

    def _build(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, layers = config.d_model, range(config.num_layers)
        common: dict[str, Any] = {"dtype": DTYPES[config.dtype], "rngs": rngs}
        cell = partial(CELLS[config.cell], **common)
        common["kernel_init"] = INITIALIZERS["glorot_uniform"]
        linear = partial(Linear, out_features=width, **linear_axes("mlp", "embed"), **common)
        self.forward = nnx.List(cell(width, width // 2) for _ in layers)
        self.backward = nnx.List(cell(width, width // 2) for _ in layers)
        self.bridge = nnx.List(linear(width // 2) for _ in layers)
        self.decoder = nnx.List(cell(width if i else 2 * width, width) for i in layers)
        options = common | {"use_bias": False, "backend": config.attention_backend}
        self.attention = MultiHeadAttention(config.num_heads, width, **options)
        self.combine = linear(2 * width)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)

    def hidden(
        self,
        source: Source,
        target_in: Target,
        source_segments: Source | None = None,
        target_segments: Target | None = None,
        source_positions: None = None,
        target_positions: None = None,
        **mode: Any,
    ) -> Hidden:
        """As `Transformer`; rows hold one example each, and positions are not used."""
        source_segments = masking.segments_of(source, source_segments)
        memory = self.encode(source, source_segments, **mode)
        cache = self.start_cache(memory, source_segments, target_in.shape[1])
        return self._advance(target_in, cache, **mode)[0]

    def encode(self, source: Source, source_segments: Source | None = None, **mode: Any) -> Memory:
        """The encoder's memory of `source`; `mode` is `deterministic` and `rngs` of the call."""
        real = masking.segments_of(source, source_segments) > 0
        x = self.dropout(self.embed(source), **mode)
        for forward, backward in zip(self.forward, self.backward, strict=True):
            halves = run(forward, x, real, reverse=False), run(backward, x, real, reverse=True)
            x = constrain(jnp.concatenate(halves, axis=-1), "batch", "length", "width")
            x = self.dropout(x, **mode)
        return x

    def start_cache(
        self, memory: Memory, source_segments: Source, length: int, hypotheses: int = 1
    ) -> Cache:
        """The cache before the first token; its size does not depend on `length`."""
        first = jnp.repeat(memory[:, 0, memory.shape[-1] // 2 :], hypotheses, axis=0)
        states = tuple(
            (jnp.tanh(bridge(first)), *cell.start(first.shape[0])[1:])
            for bridge, cell in zip(self.bridge, self.decoder, strict=True)
        )
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            states=states,
            attended=jnp.zeros((first.shape[0], memory.shape[-1]), memory.dtype),
            memory=self.attention.project_kv(memory),
            mask=masking.padding(source_segments > 0),
        )

    def decode_step(self, tokens: Target, cache: Cache) -> tuple[Logits, Cache]:
        """As `Transformer.decode_step`; with several hypotheses, the next token of each."""
        rows = tokens.reshape(cache.attended.shape[0], -1)
        hidden, cache = self._advance(rows, cache, deterministic=True)
        return self.logits(hidden).reshape(*tokens.shape, -1), cache

    def _advance(self, tokens: Target, cache: Cache, **mode: Any) -> tuple[Hidden, Cache]:
        """Reads `tokens` one after another, in training and decoding alike."""
        x = self.dropout(self.embed(tokens, self.target_embedding), **mode)
        # Dropout between layers, drawn ahead: a key drawn in the loop would be reused in all steps.
        between = jnp.ones((len(self.decoder) - 1, *x.shape), x.dtype)
        between = self.dropout(between, **mode)
        attention = self.attention

        def step(carry: Any, inputs: Any) -> Any:
            states, attended = carry
            x, between = inputs
            x, fresh = jnp.concatenate([x, attended], axis=-1), []
            for i, cell in enumerate(self.decoder):
                x = x if i == 0 else x * between[i - 1]
                fresh.append(cell.step(states[i], cell.input(x)))
                x = fresh[-1][0]
            # The rows of a source's hypotheses become queries to one memory.
            query = attention.project_query(x.reshape(cache.mask.shape[0], -1, x.shape[-1]))
            weights = None  # sown after the scan, which cannot sow
            if attention.sow_weights:
                weights = attention_weights(query, cache.memory.key, cache.mask)
            heads = attention.backend(query, *cache.memory, cache.mask)
            read = attention.out(heads.swapaxes(1, 2)).reshape(x.shape)
            attended = jnp.tanh(self.combine(jnp.concatenate([x, read], axis=-1)))
            return (tuple(fresh), attended), (attended, weights)

        by_time = jnp.swapaxes(x, 0, 1), jnp.moveaxis(between, 2, 0)
        carry, (outputs, weights) = jax.lax.scan(step, (cache.states, cache.attended), by_time)
        if weights is not None:
            weights = jnp.moveaxis(weights[:, :, :, 0], 0, 2)
            attention.sow(nnx.Intermediate, "attention_weights", weights)
        x = constrain(jnp.swapaxes(outputs, 0, 1), "batch", "length", "width")
        hidden = self.scaled(self.dropout(x, **mode))
        filled = cache.filled + tokens.shape[1]
        return hidden, cache._replace(filled=filled, states=carry[0], attended=carry[1])
