"""One mesh, one table of rules: which logical axis is split over which mesh axis.

Parameters and activations name their axes logically ("embed", "heads", "batch");
`RULES` says where each lives. Everything else follows from the table: where
parameters and optimizer moments are stored, how batches are split, and the hints
inside the model. One device is a mesh of one, and no code differs.
"""

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import UserError

# Logical axis → the mesh axes that split it. None: the same on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    "keys": None,  # of attention: a query may look at any
    "width": None,
    # parameters; heads, mlp and vocab are also axes of activations
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": None,
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
    "norm": None,
}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways each mesh axis splits the work; -1 once: all devices that are left.

    replica: the replicas of a population; -1: as many ways as divide both them and the
      devices that the other axes leave.
    data: copies of the model, each on its part of the batch.
    fsdp: the batch is split too, and so is every matrix, along the model width.
    tensor: heads, feed-forward and vocabulary are split inside each layer.
    context: the positions of each sequence are split. Attention gathers the keys and values of
      all of them: in each layer every device receives and holds B · S · K · (H + E) numbers of
      its batch, whose gradients are summed over the devices on the way back; queries, scores
      and all that is computed a token at a time stay split.
    """

    replica: int = -1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, replicas: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first devices there are, for a run or a population of `replicas`.

    Given `devices`, over the first of those, which need not be there (`planning`).

    Raises:
      UserError: a size is not a positive number, the mesh does not fit the devices or the
        replicas, or devices are not to be had (`find_devices`).
    """
    devices = devices or find_devices()
    sizes = {
        "data": config.data,
        "fsdp": config.fsdp,
        "tensor": config.tensor,
        "context": config.context,
    }
    taken = math.prod(size for size in sizes.values() if size > 0)
    replica = config.replica
    if replica == -1:
        replica = math.gcd(replicas, max(len(devices) // taken, 1))
    if replica < 1 or replicas % replica:
        raise UserError(
            f"mesh.replica={replica} does not divide replicas={replicas}; choose one that does, or "
            "-1: as many as fit"
        )
    sizes = {"replica": replica} | sizes
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"mesh {sizes}: sizes are positive, and at most one is -1 (all that is left)"
        )
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and taken <= len(devices):
        if len(devices) % taken:
            raise UserError(
                f"mesh {sizes}: {taken} does not divide the {len(devices)} devices; "
                f"set mesh.{free[0]} to a number"
            )
        sizes[free[0]] = len(devices) // taken
    needed = math.prod(abs(size) for size in sizes.values())
    if needed > len(devices):
        raise UserError(
            f"mesh {sizes} needs {needed} devices and there are {len(devices)} "
            f"({devices[0].device_kind}); lower mesh.data, mesh.fsdp, mesh.tensor, mesh.context or "
            "mesh.replica"
        )
    if needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh {sizes} takes {needed} of the {len(devices)} devices of {jax.process_count()} "
            "processes, and each process must have its part; set mesh.data=-1"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:needed],
    )


def find_devices() -> list[Any]:
    """The devices of all hosts.

    Raises:
      UserError: the platform that JAX_PLATFORMS asks for is not there, or other hosts are there
        that have not been joined.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that some backend is there
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "JAX finds none"
        raise UserError(
            f"no device for JAX_PLATFORMS={asked}: {reason}; install JAX for it, or unset it"
        ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this host is one of {jax.process_count()} of a TPU slice; start the same program on "
            "all of them with --coordinator=auto (docs/clusters.md)"
        )
    return devices


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises a UserError if the mesh does not divide each of the `accumulate` parts of a batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size % ways:
        among = f"mesh.data={mesh.shape['data']} × mesh.fsdp={mesh.shape['fsdp']}"
        among += f" × accumulation_steps={accumulate}" if accumulate > 1 else ""
        raise UserError(
            f"batch_size={batch_size} does not divide among {among}; choose a multiple of {ways}"
        )


def check_memory(state: Any) -> None:
    """Raises a UserError if the arrays of `state`, shapes and shardings, do not fit into memory."""
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    there = memory()
    if needed > there:
        raise UserError(
            f"the parameters and the optimizer's state take {needed / 2**30:,.1f} GiB of a device "
            f"that has {there / 2**30:,.1f}; lower model.d_model, model.d_ff or "
            "model.num_layers, or "
            "split them over more devices by mesh.fsdp or mesh.tensor (scripts/plan.py)"
        )


def memory() -> float:
    """Bytes that a device of this host has; simulated ones share the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return math.inf
    return machine / jax.local_device_count()


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(replica=1, data=1, fsdp=1, tensor=1, context=1), 1)


def all_devices() -> Mesh:
    """A mesh of all devices, each of which takes its part of a batch."""
    return make_mesh(MeshConfig(replica=1, data=-1, fsdp=1, tensor=1, context=1))


def describe(mesh: Mesh) -> str:
    """`8 × TPU v5 lite, mesh data 4, fsdp 2`; of a CPU, the processor and the cores to run on."""
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu":
        kind += f" ({processor()}, {cores()} core{'s' * (cores() > 1)})"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} × {kind}" + (f", mesh {axes}" if axes else "")


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cores() -> int:
    """How many CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are `axes`."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how `x` is split; does nothing where there is nothing to split.

    What its ways do not divide, such as a length that the data decide, the compiler pads,
    and no result depends on that. What is shorter than they are many stays whole: the one
    position that a step of decoding computes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[name] for name in mesh.auto_axes) == 1:
        return x
    parts = [
        part if axis is None or size >= ways(axis) else None
        for size, axis, part in zip(x.shape, axes, spec(axes), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def ways(axis: str, mesh: Any = None) -> int:
    """How many ways a logical axis is split on a mesh; None: on the one that is set."""
    mesh, part = mesh or jax.sharding.get_abstract_mesh(), RULES[axis]
    names = (part,) if isinstance(part, str) else part or ()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


def each_part(function: Callable, ways: int) -> Callable:
    """`function(everything, rows)` with the rows split over the `ways` of mesh axis `data`.

    Each device calls it with its own part and needs nothing of the others: a loop ends
    where its own rows do, and what moves rows about moves them within a device.
    """
    if ways == 1:
        return function
    return jax.shard_map(
        function,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )


def each_shard(function: Callable, inside: tuple, outside: tuple) -> Callable:
    """`function` called on each device with its own part of the arrays.

    For what XLA cannot split by itself, such as a kernel. A part does not depend on another.

    Args:
      function: of arrays, that gives one.
      inside: the logical axes of each of its arguments.
      outside: those of its result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[name] for name in mesh.auto_axes) == 1:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(map(spec, inside)),
        out_specs=spec(outside),
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )


def parts() -> int:
    """How many ways `each_part` may split rows: those of `data`, if nothing else is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.shape["data"] < mesh.size else mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, where: Any) -> Any:
    """Puts arrays, of which every host has the same, on the devices, each host on its own.

    Args:
      tree: NumPy arrays.
      where: a sharding, or one for each array.
    """

    def put(x: Any, there: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, there, x.__getitem__)

    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: put(x, where), tree)
    return jax.tree.map(put, tree, where)


def stacked(state: Any, replicas: int) -> Any:
    """The shapes and shardings of a run's arrays as those of a population's."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (replicas, *leaf.shape),
            leaf.dtype,
            sharding=NamedSharding(
                leaf.sharding.mesh, PartitionSpec("replica", *leaf.sharding.spec)
            ),
        ),
        state,
    )


def parameter_shardings(
    mesh: Mesh, params: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, NamedSharding]:
    """A sharding for each parameter from the names of its axes.

    Args:
      mesh: the devices.
      params: name → anything with a shape.
      axes: name → logical axes, as many as the shape has.

    Raises:
      UserError: a mesh axis does not divide the dimension that it splits.
    """
    shardings = {}
    for name, param in params.items():
        parts = spec(axes[name])
        for size, part, axis in zip(param.shape, parts, axes[name], strict=True):
            if size % ways(axis, mesh):
                knobs = " × ".join(f"mesh.{each}" for each in np.atleast_1d(part))
                raise UserError(
                    f"{knobs}={ways(axis, mesh)} does not divide the {size} of axis {axis!r} in "
                    f"{name} {tuple(param.shape)}; choose a {knobs} that does"
                )
        shardings[name] = NamedSharding(mesh, parts)
    return shardings
