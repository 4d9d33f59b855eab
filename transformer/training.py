"""The train state and the one pure train step that everything else is made of."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from transformer import sharding
from transformer.data.batches import Batch, Dataset
from transformer.loss import cross_entropy
from transformer.model import Model, Params

Sums = dict[str, Float[Array, ""]]

# What a run's seed is used for, each with a key of its own.
PURPOSES = ("init", "dropout", "data")


def stream(seed: UInt32[Array, ""], purpose: str) -> Array:
    """The key of one of `PURPOSES`."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


class TrainState(NamedTuple):
    """All that training carries from step to step: a plain pytree.

    The same shape holds what belongs to each array, such as its sharding.

    step: int32 scalar, how many updates have been made.
    seed: uint32 scalar, the source of all randomness; see `stream`.
    params: name → parameter, float32.
    moments: the optimizer's state.
    """

    step: Any
    seed: Any
    params: Params
    moments: Any


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: UInt32[Array, ""]
) -> TrainState:
    """The state before the first step."""
    params = model.init(stream(seed, "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=seed,
        params=params,
        moments=optimizer.init(params),
    )


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, without its arrays.

    Moments live where their parameters do; counts are the same on every device.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    params = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    everywhere = sharding.replicated(mesh)
    state = jax.eval_shape(partial(init_state, model, optimizer), np.uint32(0))
    moments = optax.tree.map_params(
        optimizer,
        lambda _, where: where,
        state.moments,
        params,
        transform_non_params=lambda _: everywhere,
    )
    where = TrainState(step=everywhere, seed=everywhere, params=params, moments=moments)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        where,
    )


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, label_smoothing: float
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The step: a pure function (state, batch) → (state, sums).

    The loss is the mean, over the batch's real tokens, of the smoothed cross-entropy.
    `sums` holds totals: `loss`, `correct` and `tokens` over tokens, `gradient_norm`
    (before clipping) and `steps` over steps.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        dropout = jax.random.fold_in(stream(state.seed, "dropout"), state.step)

        def loss_of(params: Params) -> tuple[Array, Sums]:
            logits = model.bind(params)(
                batch.source,
                batch.source_segments,
                batch.target_in,
                batch.target_segments,
                rngs=nnx.Rngs(dropout=dropout),
            )
            loss = cross_entropy(logits, batch.target_out, label_smoothing)
            correct = jnp.where(logits.argmax(-1) == batch.target_out, batch.weights, 0.0)
            tokens = batch.weights.sum()
            sums = {
                "loss": (loss * batch.weights).sum(),
                "correct": correct.sum(),
                "tokens": tokens,
            }
            return sums["loss"] / jnp.maximum(tokens, 1.0), sums

        gradients, sums = jax.grad(loss_of, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        sums |= {"gradient_norm": optax.tree.norm(gradients), "steps": jnp.ones(())}
        return state._replace(step=state.step + 1, params=params, moments=moments), sums

    return train_step


def zero_sums() -> Sums:
    """Sums over nothing."""
    names = ("loss", "correct", "tokens", "gradient_norm", "steps")
    return {name: jnp.zeros(()) for name in names}


def make_train_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
) -> Callable[[TrainState, Sums, Dataset, Int[Array, ""]], tuple[TrainState, Sums]]:
    """Many steps in one dispatch: (state, sums, data, n) → (state, sums) after n steps.

    n is an argument of the one compiled program and not its shape, so that calls of
    any length run the same machine code: the result cannot depend on how the steps
    are divided among calls.
    """

    def train_steps(
        state: TrainState, sums: Sums, data: Dataset, n: Int[Array, ""]
    ) -> tuple[TrainState, Sums]:
        def body(_, carry):
            state, sums = carry
            state, new = train_step(state, data.batch(stream(state.seed, "data"), state.step))
            return state, jax.tree.map(jnp.add, sums, new)

        return jax.lax.fori_loop(0, n, body, (state, sums))

    return train_steps
