"""Optimizers and learning-rate schedules by name, from optax."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer.errors import UserError, choose


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule. `configs/base.py` explains each knob and holds its default.

    Raises:
      UserError: a name is unknown or a number out of its range.
    """

    name: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self):
        choose(OPTIMIZERS, self.name, "optimizer.name")
        choose(SCHEDULES, self.schedule, "optimizer.schedule")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: at least 0 and below 1")
        for name in ("learning_rate", "warmup_steps", "epsilon", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: it cannot be negative")
        if self.weight_decay and self.name == "adam":
            raise UserError(
                "optimizer.weight_decay is for adamw; set optimizer.name=adamw, or it to 0"
            )


def constant(peak: float, decay_steps: int, warmup_steps: int) -> optax.Schedule:
    """The peak for ever."""
    return optax.constant_schedule(peak)


def cosine(peak: float, decay_steps: int, warmup_steps: int) -> optax.Schedule:
    """peak · (1 + cos(π s / decay_steps)) / 2 at s steps after warm-up."""
    return optax.cosine_decay_schedule(peak, decay_steps)


def linear(peak: float, decay_steps: int, warmup_steps: int) -> optax.Schedule:
    """From the peak to 0 in a straight line."""
    return optax.linear_schedule(peak, 0.0, decay_steps)


def inverse_sqrt(peak: float, decay_steps: int, warmup_steps: int) -> optax.Schedule:
    """peak · √(warmup_steps / step), counted from the first step of training.

    With the warm-up before it this is the paper's d^-0.5 · min(step^-0.5, step ·
    warmup^-1.5), whose peak is (d · warmup)^-0.5. (Vaswani et al. 2017, equation 3.)
    """
    start = max(warmup_steps, 1)
    return lambda since: peak * (start / (start + since)) ** 0.5


# What follows the warm-up: (peak, steps after warm-up, steps of warm-up) → schedule
# of the number of steps since then.
SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear, "inverse_sqrt": inverse_sqrt}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each update, the first being number 0.

    It climbs in a straight line, peak · s / warmup_steps at the s-th update counted
    from 1, then follows `config.schedule`, whose end, 0 for `linear` and `cosine`, is the
    last of `steps` updates.
    """
    warmup = config.warmup_steps
    decay_steps = max(steps - max(warmup, 1), 1)
    after = SCHEDULES[config.schedule](config.learning_rate, decay_steps, warmup)

    def schedule(count):
        step = jnp.asarray(count, jnp.float32) + 1.0
        climbing = config.learning_rate * step / max(warmup, 1)
        # Without a warm-up the first update, at the peak, is the 0th of the schedule.
        return jnp.where(step < warmup, climbing, after(step - max(warmup, 1)))

    return schedule


def adam(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Kingma and Ba 2015."""
    return optax.adam(schedule, config.beta1, config.beta2, config.epsilon)


def is_decayed(params: Any) -> Any:
    """Name → whether weight decay applies, for a flat dict of parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("bias", "gain")), params
    )


def adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), but of biases and gains."""
    return optax.adamw(
        schedule,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=is_decayed,
    )


OPTIMIZERS = {"adam": adam, "adamw": adamw}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer, with gradients first clipped by their global norm if asked for."""
    optimizer = OPTIMIZERS[config.name](config, make_schedule(config, steps))
    if config.clip_norm > 0.0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(updates, state, params=None):
        # Optax multiplies integer counts with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
