"""Recurrent cells, `CELLS`, and their loop over a sequence, one sequential step per token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from transformer.modules.linear import INITIALIZERS, Linear, linear_axes

State = tuple[Array, ...]  # the carry of a cell, arrays [B, D]; the first is its output


class Cell(nnx.Module):
    """The step of a recurrent layer; `input` projects the inputs of all steps beforehand.

    Flax's `LSTMCell` and `GRUCell` project each step's input inside the loop, gate by gate, which
    is slower, and Flax's LSTM has no initial forget gate bias of 1.
    """

    gates = 0  # and candidates, all computed by one product
    arrays = 1  # in the state

    def __init__(self, in_features: int, width: int, *, dtype: Any = None, rngs: nnx.Rngs):
        options = linear_axes("embed", "mlp") | {"dtype": dtype, "rngs": rngs}
        linear = partial(Linear, out_features=self.gates * width, **options)
        glorot, orthogonal = INITIALIZERS["glorot_uniform"], nnx.initializers.orthogonal()
        self.width, self.dtype = width, dtype
        self.input = linear(in_features, kernel_init=glorot)
        self.recurrent = linear(width, kernel_init=orthogonal, use_bias=False)

    def start(self, rows: Any) -> State:
        """The state before the first step."""
        return (jnp.zeros((rows, self.width), self.dtype),) * self.arrays

    def step(self, state: State, projected: Float[Array, "B gates"]) -> State:
        """The state after a step, given the output of `input`."""
        raise NotImplementedError


class LSTM(Cell):
    """c ← σ(f + 1) ⊙ c + σ(i) ⊙ tanh(g),  h ← σ(o) ⊙ tanh(c).

    (Hochreiter and Schmidhuber 1997; gate f: Gers et al. 2000; f + 1: Jozefowicz et al. 2015.)
    """

    gates, arrays = 4, 2

    def step(self, state: State, projected: Float[Array, "B gates"]) -> State:
        hidden, memory = state
        i, f, g, o = jnp.split(projected + self.recurrent(hidden), 4, axis=-1)
        memory = jax.nn.sigmoid(f + 1.0) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(memory), memory


class GRU(Cell):
    """h ← z ⊙ h + (1 - z) ⊙ tanh(x W + r ⊙ (h U)), where Cho et al. 2014 have (r ⊙ h) U."""

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
