"""The devices, their mesh, and the rules by which arrays are sharded over it.

Parameters and activations name their axes logically ("embed", "heads", "batch"). From `RULES`
follows where parameters and optimizer state live, how batches are split and what XLA is told.
"""

import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.errors import UserError, explained

# Logical axis → the mesh axes that it is sharded over. None: replicated.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    "keys": None,  # of attention: a query may attend to any key
    "width": None,
    # parameters; heads, mlp and vocab are axes of activations too
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
    """Sizes of the mesh axes; -1, once at most beside `replica`: all devices that are left."""

    replica: int = -1  # replicas of a population side by side; -1: as many as fit
    data: int = -1  # data-parallel copies of the model
    fsdp: int = 1  # shards the batch, and every matrix along the model width
    tensor: int = 1  # shards heads, feed-forward and vocabulary
    context: int = 1  # shards the positions of a sequence; attention gathers keys and values


def find_devices() -> list[Any]:
    """Returns the devices of all hosts."""
    asked = f"no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
    remedy = "install JAX for it, or unset it"
    # JAX asserts that there is a backend.
    with explained(f"{asked}: {{reason}}; {remedy}", RuntimeError, AssertionError):
        devices = jax.devices()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this host is one of {jax.process_count()} of a TPU slice; start the same program on "
            "all of them with --coordinator=auto (docs/clusters.md)"
        )
    return devices


def make_mesh(config: MeshConfig | None = None, replicas: int = 1, devices: Any = None) -> Mesh:
    """Returns the mesh of `config` over the first `devices`; by default all, data-parallel."""
    devices, sizes = devices or find_devices(), asdict(config or MeshConfig())
    if sizes["replica"] == -1:
        others = math.prod(size for size in sizes.values() if size > 0)
        sizes["replica"] = math.gcd(replicas, max(len(devices) // others, 1))
    if sizes["replica"] < 1 or replicas % sizes["replica"]:
        raise UserError(f"mesh.replica={sizes['replica']} does not divide {replicas=}; try -1")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes are positive, and at most one is -1, the rest")
    taken = math.prod(map(abs, sizes.values()))
    if free and taken < len(devices) and len(devices) % taken:
        parts = f"{taken} does not divide the {len(devices)} devices"
        raise UserError(f"mesh {sizes}: {parts}; set mesh.{free[0]} to a number")
    sizes |= dict.fromkeys(free, max(len(devices) // taken, 1))
    needed = math.prod(sizes.values())
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        found = f"{len(devices)} ({devices[0].device_kind})"
        remedy = "lower mesh.data, fsdp, tensor, context or replica"
        if needed < len(devices):
            remedy = f"{jax.process_count()} processes must use all; set mesh.data=-1"
        raise UserError(f"mesh {sizes} needs {needed} devices and there are {found}; {remedy}")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices[:needed])


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first device alone."""
    return make_mesh(MeshConfig(replica=1, data=1))


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> None:
    """Raises a UserError if the mesh does not divide the batch of each accumulation step."""
    factors = {f"mesh.{name}": mesh.shape[name] for name in ("data", "fsdp")}
    factors |= {"accumulation_steps": accumulation_steps} if accumulation_steps > 1 else {}
    if batch_size % (shards := math.prod(factors.values())):
        among = " × ".join(f"{name}={factor}" for name, factor in factors.items())
        remedy = f"choose a multiple of {shards}"
        raise UserError(f"batch_size={batch_size} does not divide among {among}; {remedy}")


def check_memory(state: Any) -> None:
    """Raises a UserError if the arrays of `state`, shapes and shardings, do not fit in memory."""
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    if needed > (available := device_memory()):
        raise UserError(
            f"parameters and optimizer state take {needed / 2**30:,.1f} GiB of a device with "
            f"{available / 2**30:,.1f} GiB; lower model.d_model, model.d_ff or model.num_layers, "
            "or shard them over more devices by mesh.fsdp or mesh.tensor (scripts/plan.py)"
        )


def device_memory() -> float:
    """Returns the bytes of memory of a device; simulated devices share the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return math.inf
    return machine / jax.local_device_count()


def describe_mesh(mesh: Mesh) -> str:
    """Returns `8 × TPU v5 lite, mesh data 4, fsdp 2`; of a CPU, its name and usable cores."""
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu":
        kind += f" ({cpu_name()}, {cpu_cores()} core{'s' * (cpu_cores() > 1)})"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} × {kind}" + (f", mesh {axes}" if axes else "")


def cpu_name() -> str:
    """Returns the name of the processor, if the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"^model name\s*: (.*\S)", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def axis_shards(axis: str, mesh: Any = None) -> int:
    """Returns over how many devices a logical axis is sharded; by default on the current mesh."""
    mesh, rule = mesh or jax.sharding.get_abstract_mesh(), RULES[axis]
    names = (rule,) if isinstance(rule, str) else rule or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def is_unsharded(mesh: Any) -> bool:
    """Whether there is no mesh of `make_mesh`, or no axis of it is left to shard over."""
    ours = "context" in mesh.shape
    return not ours or math.prod(mesh.shape[name] for name in mesh.auto_axes) == 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns `x` with a sharding constraint by its logical axes; `x` itself without a mesh.

    The compiler pads a dimension that its shards do not divide, which changes no result. One that
    is smaller than their number, such as the position of a decoding step, stays whole.
    """
    if is_unsharded(jax.sharding.get_abstract_mesh()):
        return x
    spec = [
        part if axis is None or size >= axis_shards(axis) else None
        for size, axis, part in zip(x.shape, axes, partition_spec(axes), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def device_map(function: Callable, in_specs: tuple, out_specs: Any, *axes: str) -> Callable:
    """Returns `function` run by each device on its shards over the mesh axes `axes`."""
    specs = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": set(axes)}
    return jax.shard_map(function, **specs, check_vma=False)


def shard_rows(function: Callable, shards: int) -> Callable:
    """Returns `function(replicated, rows)` with the rows sharded over the mesh axis `data`.

    Each device runs it on its own rows without communication, so that a loop ends as soon as the
    device's own rows are done, and gathers stay within the device.
    """
    if shards == 1:
        return function
    rows = PartitionSpec("data")
    return device_map(function, (PartitionSpec(), rows), rows, "data")


def row_shards() -> int:
    """Returns how many shards `shard_rows` may make: the mesh's, if only `data` is above 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.shape["data"] < mesh.size else mesh.size


def shard_by_rules(function: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """Returns `function` run by each device on its own shards of the arguments.

    For what XLA cannot shard by itself, such as a Pallas kernel. Shards must be independent. The
    axes are the logical ones of each argument and of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if is_unsharded(mesh):
        return function
    specs = tuple(map(partition_spec, in_axes)), partition_spec(out_axes)
    return device_map(function, *specs, *mesh.auto_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, where: Any) -> Any:
    """Puts NumPy arrays, the same on every host, on devices; `where` is a sharding, or one each."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: put(x, where), tree)
    return jax.tree.map(put, tree, where)


def parameter_shardings(
    mesh: Mesh, params: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, NamedSharding]:
    """Returns a sharding for each parameter (name → anything with a shape) by its logical axes."""
    shardings = {}
    for name, param in params.items():
        spec = partition_spec(axes[name])
        for size, part, axis in zip(param.shape, spec, axes[name], strict=True):
            if size % axis_shards(axis, mesh):
                knobs = " × ".join(f"mesh.{each}" for each in np.atleast_1d(part))
                where = f"the {size} of axis {axis!r} in {name} {tuple(param.shape)}"
                fault = f"{knobs}={axis_shards(axis, mesh)} does not divide {where}"
                raise UserError(f"{fault}; choose one that does")
        shardings[name] = NamedSharding(mesh, spec)
    return shardings
