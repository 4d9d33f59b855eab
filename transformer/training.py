"""The train state and the one pure train step that everything else is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from transformer import sharding
from transformer.data.batches import Batch, Dataset
from transformer.loss import cross_entropy
from transformer.model import Model, Params

Sums = dict[str, Float[Array, ""]]

# What a run's seed is used for, each with a key of its own: fold_in(key(seed), purpose).
INIT, DROPOUT = 0, 1


class TrainState(NamedTuple):
    """All that training carries from step to step: a plain pytree.

    The same shape holds what belongs to each array, such as its sharding.

    step: int32 scalar, how many updates have been made.
    seed: uint32 scalar, the source of all randomness: `INIT`, `DROPOUT`, and the order of the data.
    params: name → parameter, float32.
    moments: the optimizer's state.
    """

    step: Any
    seed: Any
    params: Params
    moments: Any


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: UInt32[Array, ""] | int
) -> TrainState:
    """The state before the first step."""
    params = model.init(jax.random.fold_in(jax.random.key(seed), INIT))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        params=params,
        moments=optimizer.init(params),
    )


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where each array of the state lives: moments beside their parameters, counts everywhere.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    params = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    everywhere = sharding.replicated(mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, model.shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(step=everywhere, seed=everywhere, params=params, moments=moments)


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, label_smoothing: float
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The step: a pure function (state, batch) → (state, sums).

    The loss is the mean, over the batch's real tokens, of the smoothed cross-entropy.
    `sums` holds totals: `loss`, `correct` and `tokens` over tokens, `gradient_norm`
    (before clipping) and `steps` over steps.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        dropout = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(state.seed), DROPOUT), state.step
        )

        def loss_of(params: Params) -> tuple[Array, Sums]:
            logits = model.bind(params)(
                batch.source,
                batch.source_segments,
                batch.target_in,
                batch.target_segments,
                rngs=nnx.Rngs(dropout=dropout),
            )
            loss = cross_entropy(logits, batch.target_out, label_smoothing)
            correct = (logits.argmax(-1) == batch.target_out) * batch.weights
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
            state, new = train_step(state, data.batch(state.seed, state.step))
            return state, jax.tree.map(jnp.add, sums, new)

        return jax.lax.fori_loop(0, n, body, (state, sums))

    return train_steps
