"""Optimizers and learning-rate schedules by name, from optax."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from transformer.errors import UserError, choose
from transformer.knobs import Choice, Range, Rate, validate

FLOAT32 = np.finfo(np.float32)  # in which the step computes
TINY, LARGEST = float(FLOAT32.tiny), float(FLOAT32.max)

# (Steps since the warm-up, warm-up steps, steps after the warm-up) → fraction of the peak.
SCHEDULES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "constant": lambda since, warmup, decay: jnp.ones_like(since),
    "cosine": lambda since, warmup, decay: (
        (1.0 + jnp.cos(jnp.pi * jnp.minimum(since / decay, 1.0))) / 2.0
    ),
    "linear": lambda since, warmup, decay: 1.0 - jnp.minimum(since / decay, 1.0),
    # Together with the warm-up this is d^-0.5 · min(step^-0.5, step · warmup^-1.5), whose peak is
    # (d · warmup)^-0.5. (Vaswani et al. 2017, equation 3.)
    "inverse_sqrt": lambda since, warmup, decay: (warmup / (warmup + since)) ** 0.5,
}


def make_schedule(name: str, steps: int, hparams: Any) -> Callable[[Any], Any]:
    """Returns update number, from 0 → learning rate.

    In the warm-up, the s-th update, counted from 1, has the rate learning_rate · s / warmup_steps.
    The schedule `name` follows; `linear` and `cosine` reach 0 at the last of `steps` updates.
    `hparams` has these two hyperparameters, which may be traced.
    """
    after_warmup = choose(SCHEDULES, name, "schedule")
    # Without a warm-up the schedule starts at the first update, at the peak.
    warmup = jnp.maximum(jnp.asarray(hparams.warmup_steps, jnp.float32), 1.0)
    decay = jnp.maximum(steps - warmup, 1.0)

    def schedule(count):
        step = jnp.asarray(count, jnp.float32) + 1.0
        after = after_warmup(jnp.maximum(step - warmup, 0.0), warmup, decay)
        return hparams.learning_rate * jnp.where(step < warmup, step / warmup, after)

    return schedule


def is_decayed(params: Any) -> Any:
    """Returns name → whether weight decay applies, for a flat dict of parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("bias", "scale")), params
    )


def muon_and_adam(config: "OptimizerConfig", rate: Any, decay: Any) -> Any:
    """Muon (Jordan et al. 2024) for matrices, Adam for embeddings and vectors, which do not decay.

    Both use Nesterov momentum with `beta1` (for Adam: Dozat 2016); Adam's epsilon is 1e-8. Updates
    are scaled to suit Adam's learning rates (Liu et al. 2025, section 2.2).
    """

    def dimensions(path, leaf):
        name, axes = path[-1].key, tuple(range(leaf.ndim))
        # [D, N, H] of queries, keys and values; [N, H, D] of the output; [D, F].
        inputs = 2 if name.endswith("out/kernel") else 1
        is_matrix = name.endswith("kernel")
        return MuonDimensionNumbers(axes[:inputs], axes[inputs:]) if is_matrix else None

    return muon(
        rate,
        beta=config.beta1,
        weight_decay=decay,
        weight_decay_mask=is_decayed,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=partial(jax.tree_util.tree_map_with_path, dimensions),
        consistent_rms=0.2,
    )


# (config, learning rate or schedule, weight decay) → optimizer.
OPTIMIZERS: dict[str, Callable[["OptimizerConfig", Any, Any], Any]] = {
    # Kingma and Ba 2015.
    "adam": lambda config, rate, _: optax.adam(rate, config.beta1, config.beta2, config.epsilon),
    # Adam with weight decay of all but biases and scales (Loshchilov and Hutter 2019).
    "adamw": lambda config, rate, decay: optax.adamw(
        rate, config.beta1, config.beta2, config.epsilon, weight_decay=decay, mask=is_decayed
    ),
    # Factored second moments where both dimensions are at least 128; the rate is relative to the
    # scale of each parameter; decay rate and clipping are the paper's (Shazeer and Stern 2018).
    "adafactor": lambda config, rate, _: optax.adafactor(rate),
    # The sign of a momentum; use at most a tenth of Adam's learning rate (Chen et al. 2023).
    "lion": lambda config, rate, decay: optax.lion(
        rate, config.beta1, config.beta2, weight_decay=decay, mask=is_decayed
    ),
    "sgd": lambda config, rate, _: optax.sgd(rate, momentum=config.beta1),
    "muon": muon_and_adam,
}

DECAYING = ("adamw", "lion", "muon")  # optimizers with weight decay

NonNegative = Annotated[float, Range(0, LARGEST)]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer section of a config."""

    name: Annotated[str, Choice(OPTIMIZERS)] = "adam"  # OPTIMIZERS in training/optimizer.py
    learning_rate: NonNegative = 4e-3  # the peak
    schedule: Annotated[str, Choice(SCHEDULES)] = "linear"  # after the warm-up
    warmup_steps: Annotated[int, Range(0, LARGEST)] = 50  # updates of linear warm-up
    beta1: Rate = 0.9  # of adam, adamw, lion; momentum of sgd, muon
    beta2: Rate = 0.98  # of adam, adamw, lion
    epsilon: Annotated[float, Range(TINY, LARGEST)] = 1e-9  # of adam, adamw
    weight_decay: NonNegative = 0.0  # decoupled; of adamw, lion and muon
    clip_norm: NonNegative = 1.0  # global norm of the gradients; 0: no clipping

    def __post_init__(self):
        validate(self, "optimizer.")
        if self.weight_decay and self.name not in DECAYING:
            names = ", ".join(DECAYING)
            raise UserError(f"optimizer.weight_decay is for {names}; choose one, or set it to 0")


def make_optimizer(config: OptimizerConfig, steps: int, hparams: Any = None) -> Any:
    """Returns the optax optimizer, preceded by clipping of the global norm if `clip_norm` is set.

    The schedule ends after `steps` updates. `hparams`, if given, replaces the learning rate,
    warm-up and weight decay of the config by traced scalars.
    """
    hparams = hparams or config
    schedule = make_schedule(config.schedule, steps, hparams)
    optimizer = OPTIMIZERS[config.name](config, schedule, hparams.weight_decay)
    if config.clip_norm > 0.0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(updates, state, params=None):
        # Optax multiplies integer counts with floats, which strict promotion rejects.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
