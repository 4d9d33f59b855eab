"""The train state and the one pure train step that everything else is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from transformer.data.batches import Batch, BatchWindow, Dataset
from transformer.loss import cross_entropy
from transformer.modules.dropout import training_rngs
from transformer.modules.model import Model, Params, flatten
from transformer.modules.transformer import set_dropout_rates
from transformer.parallel.mesh import add_replica_axis, parameter_shardings, replicated
from transformer.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

Sums = dict[str, Float[Array, "*R"]]

# What a run's seed is used for, each with a key of its own.
PURPOSES = ("init", "dropout", "data")


def stream(seed: UInt32[Array, ""], purpose: str) -> Array:
    """The key of one of `PURPOSES`."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


@jax.jit
def data_keys(seeds: UInt32[Array, "*replicas"]) -> Array:
    """The data key of a run, or of each replica; see `data.batches.Dataset.batch`."""
    data_key = partial(stream, purpose="data")
    return jax.vmap(data_key)(seeds) if seeds.ndim else data_key(seeds)


class HParams(NamedTuple):
    """The knobs that are hparams inside the step, in which replicas of one program may differ.

    Each is a Python number, or a traced scalar in its place.
    """

    learning_rate: Any
    warmup_steps: Any
    weight_decay: Any
    label_smoothing: Any
    dropout_rate: Any
    attention_dropout_rate: Any


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a model is trained.

    optimizer: its structure.
    steps: how many updates there are, where schedules end.
    ema_decay: of the moving average of the parameters; 0.0: there is none.
    accumulation_steps: parts that a batch is taken in, one after another.
    max_skipped: steps that a run may leave out because a number in them is not finite.
    hparams: the run's, of which a replica may have others.
    """

    optimizer: OptimizerConfig
    steps: int
    ema_decay: float
    accumulation_steps: int
    max_skipped: int
    hparams: HParams

    def learning_rate(self, hparams: HParams, updates: Int[Array, ""]) -> Float[Array, ""]:
        """That of the update after so many."""
        peak, warmup = hparams.learning_rate, hparams.warmup_steps
        return make_schedule(self.optimizer.schedule, self.steps, peak, warmup)(updates)

    def make_optimizer(self, hparams: HParams) -> optax.GradientTransformation:
        """The optimizer with these hparams in it."""
        return make_optimizer(
            self.optimizer,
            self.steps,
            learning_rate=hparams.learning_rate,
            warmup_steps=hparams.warmup_steps,
            weight_decay=hparams.weight_decay,
        )


class TrainState(NamedTuple):
    """All that training carries from step to step: a plain pytree.

    The same shape holds what belongs to each array, such as its sharding. In a
    population every array has a first axis of R replicas.

    step: int32 scalar, how many updates have been made, or left out.
    skipped: int32 scalar, how many were left out; see `guarded`.
    failed: int32 scalar, the last of these; -1: none was.
    seed: uint32 scalar, the source of all randomness; see `stream`.
    hparams: name → float32 scalar, the `HParams` that are not the config's.
    params: name → parameter, float32.
    batch_stats: name → running average of batch norm, float32.
    opt_state: the optimizer's state, such as Adam's moments.
    ema_params: name → moving average of the parameter; empty without one.
    """

    step: Any
    skipped: Any
    failed: Any
    seed: Any
    hparams: dict[str, Any]
    params: Params
    batch_stats: Params
    opt_state: Any
    ema_params: Params

    def taken(self) -> int:
        """How many updates have been made; all replicas keep step."""
        return int(np.asarray(self.step.addressable_data(0)).flat[0])

    def variables(self) -> Params:
        """What the model is evaluated with."""
        return (self.ema_params or self.params) | self.batch_stats


def init_state(
    model: Model,
    config: StepConfig,
    seed: UInt32[Array, ""],
    hparams: dict[str, Float[Array, ""]],
) -> TrainState:
    """The state before the first step."""
    params, batch_stats = model.split(model.init(stream(seed, "init")))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        failed=jnp.full((), -1, jnp.int32),
        seed=seed,
        hparams=hparams,
        params=params,
        batch_stats=batch_stats,
        opt_state=config.make_optimizer(config.hparams).init(params),
        ema_params=params if config.ema_decay else {},
    )


def abstract_state(
    model: Model,
    config: StepConfig,
    mesh: Mesh,
    replicas: int = 1,
    hparams: Iterable[str] = (),
) -> TrainState:
    """The state's shapes, dtypes and shardings, without its arrays.

    Moments live where their parameters do; what has another shape than any parameter,
    such as a count, is the same on every device. Replicas are split over the mesh axis
    `replica`.

    Args:
      model: the model.
      config: how it is trained.
      mesh: the devices.
      replicas: R of a population; 1: a single run, whose arrays have no such axis.
      hparams: the names in `TrainState.hparams`.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    where = parameter_shardings(mesh, model.shapes, model.axes)
    params, batch_stats = model.split(where)
    everywhere = replicated(mesh)
    own = dict.fromkeys(hparams, np.float32(0))
    state = jax.eval_shape(partial(init_state, model, config), np.uint32(0), own)

    def place(path, leaf):  # a moment has its parameter's name, at the end of its path
        param = state.params.get(getattr(path[-1], "key", None))
        beside = param is not None and param.shape == leaf.shape
        return params[path[-1].key] if beside else everywhere

    opt_state = jax.tree_util.tree_map_with_path(place, state.opt_state)
    places = TrainState(
        step=everywhere,
        skipped=everywhere,
        failed=everywhere,
        seed=everywhere,
        hparams=dict.fromkeys(own, everywhere),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=params if config.ema_decay else {},
    )
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        places,
    )
    return abstract if replicas == 1 else add_replica_axis(abstract, replicas)


def each_replica(function: Callable, replicas: int, in_axes: tuple[int | None, ...]) -> Callable:
    """`function` of one run as a function of a population, whose arrays have a first axis R.

    The same code, vectorised. It is called under a mesh.

    Args:
      function: of a run's arrays.
      replicas: R; 1: a single run, whose arrays have no such axis.
      in_axes: 0 for an argument that each replica has its own of, None for one that they
        share.
    """
    if replicas == 1:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape["replica"] < mesh.size:
        return jax.vmap(function, in_axes=in_axes, spmd_axis_name="replica")
    # Where no other axis splits a replica, devices have nothing to say to each other, and
    # saying so is a third faster than leaving XLA to find out. (Not so where others do: XLA's
    # partitioner of jaxlib 0.10 aborts if two more axes are left to it inside a shard_map.)
    own = PartitionSpec("replica")
    return jax.shard_map(
        jax.vmap(function, in_axes=in_axes),
        in_specs=tuple(PartitionSpec() if axis is None else own for axis in in_axes),
        out_specs=own,
        axis_names={"replica"},
        check_vma=False,
    )


def make_train_step(
    model: Model, config: StepConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The step: a pure function (state, batch) → (state, sums).

    The loss is the mean, over the batch's real tokens, of the smoothed cross-entropy; over
    all of them also where the batch is taken in parts, which then differs from taking it whole
    by rounding, and by what is drawn: each part has its own key.
    `sums` holds totals: `loss`, `nll` (not smoothed), `correct` and `tokens` over tokens,
    `gradient_norm` (before clipping), `learning_rate` and `steps` over steps, of which `skipped`
    and `stopped` added nothing else.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        hparams = config.hparams._replace(**state.hparams)
        key = jax.random.fold_in(stream(state.seed, "dropout"), state.step)
        total = jnp.maximum(batch.weights.sum(), 1.0)

        def loss_of(params: Params, part: Batch, key: Array) -> tuple[Array, tuple[Sums, Params]]:
            module = model.bind(params | state.batch_stats)
            set_dropout_rates(module, hparams.dropout_rate, hparams.attention_dropout_rate)
            logits = module(**part.inputs(), deterministic=False, rngs=training_rngs(key))
            losses = cross_entropy(logits, part.target_out)
            loss = losses.smoothed(hparams.label_smoothing)
            correct = jnp.where(logits.argmax(-1) == part.target_out, part.weights, 0.0)
            sums = {
                "loss": (loss * part.weights).sum(),
                "nll": (losses.nll * part.weights).sum(),
                "correct": correct.sum(),
                "tokens": part.weights.sum(),
            }
            seen = flatten(nnx.state(module, nnx.BatchStat))
            return sums["loss"] / total, (sums, seen)

        def gradients_of(part: Batch, key: Array) -> tuple[Params, tuple[Sums, Params]]:
            return jax.grad(loss_of, has_aux=True)(state.params, part, key)

        if config.accumulation_steps == 1:
            gradients, (sums, batch_stats) = gradients_of(batch, key)
        else:  # there are no batch statistics then, see `config.RunConfig`
            gradients, (sums, batch_stats) = accumulated(
                gradients_of, batch, key, config.accumulation_steps
            )
        optimizer = config.make_optimizer(hparams)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        sums["gradient_norm"] = optax.tree.norm(gradients)
        sums["learning_rate"] = config.learning_rate(hparams, state.step - state.skipped)
        fresh = state._replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=averaged(state.ema_params, params, state.step, config.ema_decay),
        )
        return guarded(state, fresh, sums, config.max_skipped)

    return train_step


def guarded(state: TrainState, fresh: TrainState, sums: Sums, most: int) -> tuple[TrainState, Sums]:
    """The step from `state` to `fresh`; left out if its loss or gradients are NaN or Inf.

    It then changes no array and adds nothing to `sums` but to `steps` and `skipped`. `most` steps
    of a run may be; after one more nothing changes any longer, and `stopped` counts the steps
    that pass too: the state is that before the step `failed`, whoever looks at it, and whenever.
    """
    stopped = state.skipped > most
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(sums["gradient_norm"])
    fails, good = ~finite & ~stopped, finite & ~stopped
    skipped = state.skipped + fails.astype(jnp.int32)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), fresh, state)
    sums = {name: jnp.where(good, total, 0.0) for name, total in sums.items()}
    sums |= {"steps": jnp.ones(()), "skipped": (~good).astype(jnp.float32)}
    sums["stopped"] = (skipped > most).astype(jnp.float32)
    return kept._replace(
        step=fresh.step, skipped=skipped, failed=jnp.where(fails, state.step, state.failed)
    ), sums


def accumulated(
    function: Callable[[Batch, Array], Any], batch: Batch, key: Array, ways: int
) -> Any:
    """The sum of what `function` gives for each of `ways` parts of a batch, one after another.

    Part i has every `ways`-th row from row i on, so that each device finds its own rows in
    each part, and a key of its own.
    """
    parts = jax.tree.map(lambda x: x.reshape(-1, ways, *x.shape[1:]).swapaxes(0, 1), batch)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), key)

    def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(add, zeros, (parts, jax.random.split(key, ways)))[0]


def averaged(average: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """The moving average of the parameters after an update; empty if it is.

    old · d + new · (1 - d) with d = min(decay, (1 + step) / (10 + step)), so that the first
    parameters, which are noise, do not linger.
    """
    if not average:
        return average
    step = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return {name: kept * old + (1.0 - kept) * params[name] for name, old in average.items()}


def zero_sums(replicas: int = 1) -> Sums:
    """Sums over nothing, of a run or of each replica."""
    names = ("loss", "nll", "correct", "tokens", "gradient_norm", "learning_rate")
    names += ("steps", "skipped", "stopped")
    return {name: jnp.zeros(() if replicas == 1 else replicas) for name in names}


def make_train_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
) -> Callable[[TrainState, Sums, Dataset | BatchWindow, Int[Array, ""]], tuple[TrainState, Sums]]:
    """Many steps in one dispatch: (state, sums, data, n) → (state, sums) after n steps.

    n is an argument of the one compiled program and not its shape, so that calls of
    any length run the same machine code: the result cannot depend on how the steps
    are divided among calls.
    """

    def train_steps(
        state: TrainState, sums: Sums, data: Dataset | BatchWindow, n: Int[Array, ""]
    ) -> tuple[TrainState, Sums]:
        def body(_, carry):
            state, sums = carry
            state, new = train_step(state, data.batch(stream(state.seed, "data"), state.step))
            return state, jax.tree.map(jnp.add, sums, new)

        return jax.lax.fori_loop(0, n, body, (state, sums))

    return train_steps
