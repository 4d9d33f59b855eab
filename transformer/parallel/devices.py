"""The devices of this program: what they are, and what they can hold."""

import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from transformer.errors import UserError, explained


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
