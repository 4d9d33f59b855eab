"""Replicas: R runs of one config that are trained at once in one compiled program.

Model, step and metrics are written for a single run. Here they get a first axis of R replicas,
sharded over the mesh axis `replica`; the arrays of a single run (R = 1) have no such axis.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from transformer.errors import UserError, explained
from transformer.parallel import hosts
from transformer.parallel.mesh import device_map


@dataclass(frozen=True, kw_only=True)
class PerReplica:
    """Where the replicas of a population differ: a value for each, or () for the run's."""

    seed: Sequence[Any] = ()  # by default seed, seed + 1, …
    learning_rate: Sequence[Any] = ()  # optimizer.learning_rate
    warmup_steps: Sequence[Any] = ()  # optimizer.warmup_steps
    weight_decay: Sequence[Any] = ()  # optimizer.weight_decay
    label_smoothing: Sequence[Any] = ()  # label_smoothing
    dropout_rate: Sequence[Any] = ()  # model.dropout_rate
    attention_dropout_rate: Sequence[Any] = ()  # model.attention_dropout_rate

    def __post_init__(self):
        for name, values in vars(self).items():
            whole = name in ("seed", "warmup_steps")
            message = f"per_replica.{name}={values}: it takes a {'whole ' * whole}number for each "
            with explained(message + "replica, such as (1,2,3)"):
                numbers = tuple(map(operator.index if whole else float, values))
            object.__setattr__(self, name, numbers)


class Population:
    """The replicas of a run's config; `RunConfig` inherits it."""

    def check_replicas(self: Any) -> None:
        """Raises a UserError unless each replica is a valid run by itself."""
        for name, values in vars(self.per_replica).items():
            if values and (len(values) != self.replicas or self.replicas == 1):
                found = f"per_replica.{name} has {len(values)} values and replicas={self.replicas}"
                raise UserError(f"{found}; give as many as there are replicas, two or more")
        self.single_runs()

    def single_runs(self: Any) -> list[Any]:
        """The config of the single run that each replica is."""
        return [self] if self.replicas == 1 else [self.replica(k) for k in range(self.replicas)]

    def replica(self: Any, k: int) -> Any:
        own = {name: values[k] for name, values in vars(self.per_replica).items() if values}
        own = {"seed": self.seed + k, "replicas": 1, "per_replica": PerReplica()} | own
        for name, part in (("optimizer", self.optimizer), ("model", self.model)):
            inside = {each: own.pop(each) for each in own.keys() & vars(part).keys()}
            own[name] = replace(part, **inside)
        return replace(self, **own)

    def seeds(self: Any) -> Any:
        """The seed; of a population those of the replicas, [R]; uint32."""
        seeds = np.array([config.seed for config in self.single_runs()], np.uint32)
        return seeds if self.replicas > 1 else seeds[0]

    def hparams(self: Any) -> dict[str, np.ndarray]:
        """The hyperparameters that differ among the replicas: name → [R] float32."""
        own = {name: values for name, values in vars(self.per_replica).items() if values}
        return {name: np.array(own[name], np.float32) for name in own if name != "seed"}


def vmap_replicas(function: Callable, replicas: int, in_axes: tuple[int | None, ...]) -> Callable:
    """Returns `function` of a single run's arrays vectorised over R replicas, as by `jax.vmap`."""
    if replicas == 1:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape["replica"] < mesh.size:
        return jax.vmap(function, in_axes=in_axes, spmd_axis_name="replica")
    # Where no other axis shards a replica, devices need no communication, and saying so is a
    # third faster than leaving XLA to find out. (Not so where others do: XLA's partitioner of
    # jaxlib 0.10 aborts if two more axes are left to it inside a shard_map.)
    own = PartitionSpec("replica")
    specs = tuple(PartitionSpec() if axis is None else own for axis in in_axes)
    return device_map(jax.vmap(function, in_axes=in_axes), specs, own, "replica")


def add_replica_axis(state: Any, replicas: int) -> Any:
    """Returns the shapes and shardings of a single run's arrays as those of R replicas."""
    if replicas == 1:
        return state

    def add(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("replica", *leaf.sharding.spec)
        where = NamedSharding(leaf.sharding.mesh, spec)
        return jax.ShapeDtypeStruct((replicas, *leaf.shape), leaf.dtype, sharding=where)

    return jax.tree.map(add, state)


def split_replicas(tree: Any, replicas: int) -> list[Any]:
    """The arrays of each replica, on the host; `[tree]` of a single run."""
    if replicas == 1:
        return [tree]
    tree = hosts.fetch(tree)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(replicas)]


def mean_over_replicas(metrics: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """The mean of each metric over the replicas."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


def format_replicas(values: Sequence[float], form: Callable[[float], str]) -> str:
    """A value of each replica as text: `mean (least–most)`; of a single run the value."""
    mean = form(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))}–{form(max(values))})"


def is_stopped(skipped: Any, max_skipped_steps: int) -> np.ndarray:
    """Whether each replica has stopped for a NaN or Inf, [R] (see `step.skip_nonfinite`)."""
    return np.atleast_1d(hosts.fetch(skipped)) > max_skipped_steps


def mask_stopped(metrics: Sequence[Any], stopped: np.ndarray) -> list[dict[str, float]]:
    """The metrics of each replica; NaN for stopped ones, whose parameters are old."""
    each = zip(metrics, stopped, strict=True)
    return [dict.fromkeys(one, float("nan")) if old else one for one, old in each]
