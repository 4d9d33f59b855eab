"""The train state, and the train step as one pure function for every use."""

from collections.abc import Callable, Container
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from transformer.data.batches import Batch
from transformer.errors import UserError
from transformer.knobs import match_names
from transformer.loss import linear_cross_entropy
from transformer.modules.dropout import training_rngs
from transformer.modules.model import Model, Params, flatten
from transformer.modules.transformer import set_dropout_rates
from transformer.parallel.mesh import parameter_shardings, replicated
from transformer.training.metrics import Sums, Update, sum_over_updates, token_metrics
from transformer.training.optimizer import make_optimizer, make_schedule

if TYPE_CHECKING:
    from transformer.config import RunConfig

PURPOSES = ("init", "dropout", "data")  # the uses of a run's seed, each with its own key


def stream(seed: UInt32[Array, ""], purpose: str) -> Array:
    """The random key for one of `PURPOSES`."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


@jax.jit
def data_keys(seeds: UInt32[Array, "*replicas"]) -> Array:
    """The data key of a run, or of each replica."""
    data_key = partial(stream, purpose="data")
    return jax.vmap(data_key)(seeds) if seeds.ndim else data_key(seeds)


class TrainState(NamedTuple):
    """All that training carries from step to step: a pytree of arrays, shapes or shardings."""

    step: Any  # int32 scalar, the number of steps taken, skipped updates included
    skipped: Any  # int32 scalar, the number of skipped updates; see `skip_nonfinite`
    failed: Any  # int32 scalar, the step of the last skipped update; -1: none
    ended: Any  # int32 scalar, the step at which early stopping ended the run; 0: it has not
    seed: Any  # uint32 scalar, the source of all randomness; see `stream`
    hparams: dict[str, Any]  # name → float32 scalar; those that replace the config's
    params: Params  # float32
    batch_stats: Params  # running averages of batch norm, float32
    opt_state: Any  # such as Adam's moments, of the trained parameters
    ema_params: Params  # moving averages of the trained parameters; empty without `ema_decay`

    def taken(self) -> int:  # on the host
        return int(np.asarray(self.step.addressable_data(0)).flat[0])

    def variables(self) -> Params:
        """The variables that the model is evaluated with."""
        return self.params | self.ema_params | self.batch_stats


def frozen_names(model: Model, config: "RunConfig") -> set[str]:
    """The variables that training leaves as they are: those that `config.freeze` matches."""
    frozen = match_names(config.freeze, model.shapes, "freeze")
    if frozen >= model.split(model.shapes)[0].keys():
        raise UserError("freeze matches all parameters; leave some to train")
    return frozen


def without(variables: Params, names: Container[str]) -> Params:
    """The variables that are not named."""
    return {name: leaf for name, leaf in variables.items() if name not in names}


def init_state(model: Model, config: "RunConfig", seed: Array, hparams: dict) -> TrainState:
    """The state before the first step."""
    params, batch_stats = model.split(model.init(stream(seed, "init")))
    trained = without(params, frozen_names(model, config))
    opt_state = make_optimizer(config.optimizer, config.steps).init(trained)
    ema_params = trained if config.ema_decay else {}
    counts = jnp.int32(0), jnp.int32(0), jnp.int32(-1), jnp.int32(0)  # to `ended`
    return TrainState(*counts, seed, hparams, params, batch_stats, opt_state, ema_params)


def abstract_state(model: Model, config: "RunConfig", mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of a single run's state.

    Parameters, and optimizer arrays that have the name and shape of a parameter, are sharded by the
    rules of `parallel.mesh`; everything else is replicated.
    """
    own = dict.fromkeys(config.hparams(), np.float32(0))
    state = jax.eval_shape(partial(init_state, model, config), np.uint32(0), own)
    shardings = parameter_shardings(mesh, model.shapes, model.axes)

    def place(path: Any, leaf: Any) -> Any:  # paths in opt_state end in a parameter's name
        name = str(getattr(path[-1], "key", ""))
        like_param = name in model.shapes and model.shapes[name].shape == leaf.shape
        sharding = shardings[name] if like_param else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def make_train_step(model: Model, config: "RunConfig") -> Callable[..., tuple[TrainState, Sums]]:
    """Returns the train step, a pure function (state, batch) → (state, sums of the metrics).

    It minimises the smoothed cross-entropy, averaged over the target tokens of the whole batch.
    With gradient accumulation the result differs by rounding and in the dropout masks.
    """
    frozen = frozen_names(model, config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        own, dropout = state.hparams, ("dropout_rate", "attention_dropout_rate")
        dropout_rates = [own.get(name, getattr(config.model, name)) for name in dropout]
        label_smoothing = own.get("label_smoothing", config.label_smoothing)
        hparams = SimpleNamespace(**vars(config.optimizer) | own)  # of the optimizer
        key = jax.random.fold_in(stream(state.seed, "dropout"), state.step)
        trained = without(state.params, frozen)

        def loss_fn(trained: Params, part: Batch, key: Array) -> tuple[Array, tuple[Sums, Params]]:
            module = model.bind(state.params | trained | state.batch_stats)
            set_dropout_rates(module, *dropout_rates)
            hidden = module.hidden(**part.inputs(), deterministic=False, rngs=training_rngs(key))
            inputs = hidden, module.output_table(), part.target_out, part.weights, label_smoothing
            bias = module.output_bias()
            loss, measured = linear_cross_entropy(*inputs, bias=bias, measure=token_metrics)
            sums = {name: (each * part.weights).sum() for name, each in measured.items()}
            batch_stats = flatten(nnx.state(module, nnx.BatchStat))
            return loss, (sums | {"tokens": part.weights.sum()}, batch_stats)

        grad_fn = partial(jax.grad(loss_fn, has_aux=True), trained)
        # With gradient accumulation there are no batch statistics (`RunConfig` checks that).
        gradients, (sums, batch_stats) = accumulate(grad_fn, config.accumulation_steps, batch, key)
        # Divided only now: devices then communicate once, with the gradients.
        num_tokens = jnp.maximum(sums["tokens"], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / num_tokens, gradients)
        optimizer = make_optimizer(config.optimizer, config.steps, hparams)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained: Any = optax.apply_updates(trained, updates)
        schedule = make_schedule(config.optimizer.schedule, config.steps, hparams)
        learning_rate = schedule(state.step - state.skipped)
        sums |= sum_over_updates(Update(gradients, updates, trained, learning_rate))
        new_state = state._replace(
            step=state.step + 1,
            params=state.params | trained,
            batch_stats=state.batch_stats | without(batch_stats, frozen),
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, trained, state.step, config.ema_decay),
        )
        return skip_nonfinite(state, new_state, sums, config.max_skipped_steps)

    return train_step


def skip_nonfinite(
    state: TrainState, new_state: TrainState, sums: Sums, max_skipped: int
) -> tuple[TrainState, Sums]:
    """Returns `new_state`, or `state` at the next step if the loss or a gradient is NaN or Inf.

    A skipped update adds only to the sums `steps` and `skipped`. After more than `max_skipped` of
    them the run has stopped: the state no longer changes, so the host finds it as it was before
    step `failed`, and `stopped` counts the remaining steps. Nor does the state of a run change
    that early stopping has ended: it waits for the other replicas.
    """
    stopped, goes_on = state.skipped > max_skipped, state.ended == 0
    finite = jnp.isfinite(sums["train/objective"]) & jnp.isfinite(sums["train/gradient_norm"])
    fails, good = ~finite & ~stopped & goes_on, finite & ~stopped & goes_on
    skipped = state.skipped + fails.astype(jnp.int32)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_state, state)
    sums = {name: jnp.where(good, total, 0.0) for name, total in sums.items()}
    sums |= {"steps": jnp.ones(()), "skipped": (~good & goes_on).astype(jnp.float32)}
    sums["stopped"] = (skipped > max_skipped).astype(jnp.float32)
    failed = jnp.where(fails, state.step, state.failed)
    return kept._replace(step=new_state.step, skipped=skipped, failed=failed), sums


def accumulate(function: Callable, num_parts: int, batch: Batch, key: Array) -> Any:
    """The sum of `function(part, key)` over microbatches of `batch`, each with its own key.

    Microbatch i holds every `num_parts`-th row from row i on, so that a device keeps its rows.
    """
    if num_parts == 1:
        return function(batch, key)
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), key)

    def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(add, zeros, (parts, jax.random.split(key, num_parts)))[0]


def update_ema(ema: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """The exponential moving average of the parameters after an update; {} stays {}.

    At first its decay is (1 + step) / (10 + step), which soon forgets the initial parameters.
    """
    step = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return {name: kept * old + (1.0 - kept) * params[name] for name, old in ema.items()}


def make_train_steps(train_step: Callable) -> Callable[..., tuple[TrainState, Sums]]:
    """Returns (state, sums, data, n) → (state, sums) n steps later.

    Every n runs the same machine code, so the division of steps into dispatches does not matter.
    """

    def train_steps(state: TrainState, sums: Sums, data: Any, n: Int[Array, ""]) -> Any:
        def body(_, carry):
            state, sums = carry
            state, new = train_step(state, data.batch(stream(state.seed, "data"), state.step))
            return state, jax.tree.map(jnp.add, sums, new)

        return jax.lax.fori_loop(0, n, body, (state, sums))

    return train_steps
