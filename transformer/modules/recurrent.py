"""The recurrent baseline: a bidirectional encoder and a decoder with attention.

It has the interface of `transformer.Transformer`. Position t depends on position t - 1, so each
layer is a loop with one sequential step per token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules import masking
from transformer.modules.attention import KeyValue, MultiHeadAttention
from transformer.modules.dot_product_attention import attention_weights
from transformer.modules.dropout import Dropout
from transformer.modules.linear import (
    INITIALIZERS,
    Embed,
    Linear,
    embed_scaled,
    linear_axes,
    logits_of,
    scaled_embedding,
)
from transformer.parallel.mesh import constrain

# The carry of a cell, arrays [B, D]; the first is its output.
State = tuple[Array, ...]


class Cell(nnx.Module):
    """The step of a recurrent layer; `input` projects the inputs of all steps beforehand.

    Flax's `LSTMCell` and `GRUCell` project each step's input inside the loop, gate by gate, which
    is slower, and Flax's LSTM has no initial forget gate bias of 1.
    """

    gates = 0  # and candidates, all computed by one product
    arrays = 1  # in the state

    def __init__(self, in_features: int, width: int, *, dtype: Any = None, rngs: nnx.Rngs):
        linear = partial(Linear, out_features=self.gates * width, dtype=dtype)
        linear = partial(linear, **linear_axes("embed", "mlp"))
        glorot, orthogonal = INITIALIZERS["glorot_uniform"], nnx.initializers.orthogonal()
        self.width, self.dtype = width, dtype
        self.input = linear(in_features, kernel_init=glorot, rngs=rngs)
        self.recurrent = linear(width, kernel_init=orthogonal, use_bias=False, rngs=rngs)

    def start(self, rows: int) -> State:
        """The state before the first step."""
        return (jnp.zeros((rows, self.width), self.dtype),) * self.arrays

    def step(self, state: State, projected: Float[Array, "B gates"]) -> State:
        """The state after a step, given the output of `input`."""
        raise NotImplementedError


class LSTM(Cell):
    """c ← σ(f + 1) ⊙ c + σ(i) ⊙ tanh(g),  h ← σ(o) ⊙ tanh(c).

    (Hochreiter and Schmidhuber 1997; forget gates, Gers et al. 2000, open by 1 at first,
    Jozefowicz et al. 2015.)
    """

    gates, arrays = 4, 2

    def step(self, state: State, projected: Float[Array, "B gates"]) -> State:
        hidden, memory = state
        i, f, g, o = jnp.split(projected + self.recurrent(hidden), 4, axis=-1)
        memory = jax.nn.sigmoid(f + 1.0) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(memory), memory


class GRU(Cell):
    """h ← z ⊙ h + (1 - z) ⊙ tanh(x W + r ⊙ (h U)).

    (Cho et al. 2014, with the reset gate r on the product, so that one product computes all.)
    """

    gates = 3

    def step(self, state: State, projected: Float[Array, "B gates"]) -> State:
        (hidden,) = state
        r, z, x = jnp.split(projected, 3, axis=-1)
        from_r, from_z, from_h = jnp.split(self.recurrent(hidden), 3, axis=-1)
        candidate = jnp.tanh(x + jax.nn.sigmoid(r + from_r) * from_h)
        keep = jax.nn.sigmoid(z + from_z)
        return (keep * hidden + (1.0 - keep) * candidate,)


CELLS = {"lstm": LSTM, "gru": GRU}


def run(
    cell: Cell, x: Float[Array, "B S D"], real: Bool[Array, "B S"], *, reverse: bool
) -> Float[Array, "B S H"]:
    """The cell's outputs over a whole sequence; padding leaves the state unchanged."""

    def step(state, inputs):
        projected, real = inputs
        fresh = cell.step(state, projected)
        state = jax.tree.map(lambda new, old: jnp.where(real[:, None], new, old), fresh, state)
        return state, state[0]

    by_time = jnp.swapaxes(cell.input(x), 0, 1), real.T
    _, outputs = jax.lax.scan(step, cell.start(x.shape[0]), by_time, reverse=reverse)
    return jnp.swapaxes(outputs, 0, 1)


class Cache(NamedTuple):
    """The state of decoding, passed to and returned by `decode_step`.

    filled: int32 scalar, how many target positions have been decoded.
    states: the state of each layer.
    attended: the last output, which is also an input of the next step; it has B · J rows, the J
      hypotheses of a source being adjacent.
    memory: keys and values of the encoder's memory.
    mask: which source positions are tokens.
    """

    filled: Int[Array, ""]
    states: tuple[State, ...]
    attended: Float[Array, "rows D"]
    memory: KeyValue
    mask: Bool[Array, "B 1 1 S"]

    def hypotheses(self) -> int:
        """J, the number of hypotheses per source."""
        return len(self.attended) // len(self.mask)

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache in which hypothesis j continues hypothesis parents[:, j]."""
        first = jnp.arange(len(parents))[:, None] * self.hypotheses()
        rows = (first + parents).reshape(-1)
        states, attended = jax.tree.map(lambda each: each[rows], (self.states, self.attended))
        return self._replace(states=states, attended=attended)


class Recurrent(nnx.Module):
    """LSTM or GRU encoder-decoder with attention.

        encoder:  m = [→cell(x) ; ←cell(x)], each half as wide, `layers` times
        decoder:  s_t = cell([E(y_t) ; a_{t-1}], s_{t-1}),  a_t = tanh(W [s_t ; Attention(s_t, m)])
        logits:   a_t Eᵀ

    The decoder begins with tanh(W ←m_0) (Bahdanau et al. 2015, section A.2.2), feeds its output
    back to its input (Luong et al. 2015, section 3.3), and has the Transformer's attention.

    Args:
      vocab_size: V of the source.
      target_vocab_size: V of the target; None: the same.
      d_model: D, even.
      num_layers: L, of the encoder and of the decoder.
      num_heads: N, of the attention.
      cell: one of `CELLS`.
      dropout_rate: dropout rate of embedded tokens and of each layer's output.
      tie_embeddings: whether source, target and logits share one table.
      backend: the attention backend.
      dtype: the dtype of the computation.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
    """

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int | None = None,
        *,
        d_model: int,
        num_layers: int = 1,
        num_heads: int = 1,
        cell: str = "lstm",
        dropout_rate: float = 0.0,
        tie_embeddings: bool = True,
        backend: str = "einsum",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = INITIALIZERS["glorot_uniform"]

        def embedding(size: int) -> Embed:
            return scaled_embedding(size, d_model, dtype, rngs)

        def linear(inputs: int) -> Linear:
            return Linear(
                inputs,
                d_model,
                kernel_init=init,
                **linear_axes("mlp", "embed"),
                dtype=dtype,
                rngs=rngs,
            )

        def make_cell(inputs: int, width: int) -> Cell:
            return CELLS[cell](inputs, width, dtype=dtype, rngs=rngs)

        half, target_size = d_model // 2, target_vocab_size or vocab_size
        self.embedding = embedding(vocab_size)
        self.target_embedding = nnx.data(None if tie_embeddings else embedding(target_size))
        self.output_embedding = nnx.data(None if tie_embeddings else embedding(target_size))
        self.forward = nnx.List(make_cell(d_model, half) for _ in range(num_layers))
        self.backward = nnx.List(make_cell(d_model, half) for _ in range(num_layers))
        self.bridge = nnx.List(linear(half) for _ in range(num_layers))
        self.decoder = nnx.List(
            make_cell(2 * d_model if i == 0 else d_model, d_model) for i in range(num_layers)
        )
        self.attention = MultiHeadAttention(
            num_heads,
            d_model,
            use_bias=False,
            kernel_init=init,
            backend=backend,
            dtype=dtype,
            rngs=rngs,
        )
        self.combine = linear(2 * d_model)
        self.dropout = Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        target_in: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        source_positions: None = None,
        target_positions: None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for each target position; the arguments are those of `transformer.Transformer`.

        Rows hold one example each; positions are not used.
        """
        mode = {"deterministic": deterministic, "rngs": rngs}
        source_segments = masking.segments_of(source, source_segments)
        memory = self.encode(source, source_segments, **mode)
        cache = self.start_cache(memory, source_segments, target_in.shape[1])
        return self.advance(target_in, cache, **mode)[0]

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"] | None = None,
        **mode: Any,
    ) -> Float[Array, "B S D"]:
        """The encoder's memory of `source`; `mode` is `deterministic` and `rngs` of the call."""
        real = masking.segments_of(source, source_segments) > 0
        x = self.dropout(embed_scaled(self.embedding, source), **mode)
        for forward, backward in zip(self.forward, self.backward, strict=True):
            halves = run(forward, x, real, reverse=False), run(backward, x, real, reverse=True)
            x = constrain(jnp.concatenate(halves, axis=-1), "batch", "length", "width")
            x = self.dropout(x, **mode)
        return x

    def start_cache(
        self,
        memory: Float[Array, "B S D"],
        source_segments: Int[Array, "B S"],
        length: int,
        hypotheses: int = 1,
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

    def decode_step(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits after each of the next T target tokens, and the cache with them in it.

        If the cache has several hypotheses, `tokens` holds the next token of each.
        """
        if cache.hypotheses() == 1:
            return self.advance(tokens, cache, deterministic=True)
        logits, cache = self.advance(tokens.reshape(-1, 1), cache, deterministic=True)
        return logits.reshape(*tokens.shape, -1), cache

    def advance(
        self, tokens: Int[Array, "B T"], cache: Cache, **mode: Any
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads `tokens` one after another, in training and decoding alike."""
        x = embed_scaled(self.target_embedding or self.embedding, tokens)
        x = self.dropout(x, **mode)
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
        x = self.dropout(x, **mode)
        logits = logits_of(self.output_embedding or self.embedding, x)
        filled = cache.filled + tokens.shape[1]
        return logits, cache._replace(filled=filled, states=carry[0], attended=carry[1])
