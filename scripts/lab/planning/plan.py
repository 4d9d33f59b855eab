"""Compiles the train step of a config for a topology, ahead of time, and estimates a run there.

Memory comes from the compiler, traffic from the optimized program (`hlo`). The roofline estimate is
a lower bound: the time of a step if every unit of a chip always ran at its published speed and none
waited for another (Williams, Waterman and Patterson 2009).
"""

import contextlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from lab.planning import hlo
from transformer import Run
from transformer.config import RunConfig
from transformer.data.batches import Batch, Dataset
from transformer.errors import UserError, nearest
from transformer.modules.model import Model
from transformer.parallel.mesh import check_batch, make_mesh, partition_spec, replicated
from transformer.training.costs import step_flops
from transformer.training.step import TrainState, make_train_step

GIB = 2.0**30
# Otherwise the compiler looks for a TPU and for other hosts.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
NO_TPU |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Chip(NamedTuple):
    """The published figures of a chip."""

    flops: float  # bfloat16 operations per second
    memory: float  # bytes of HBM, of which the compiler reserves a little
    bandwidth: float  # bytes per second to and from HBM
    interconnect: float  # bytes per second sent to neighbours; half of what both directions have
    shapes: str  # of its slices


FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24"
# docs.cloud.google.com/tpu/docs/v5e, v6e and v5p, as of 2025. (v5p:1x1x1, one of the four chips of
# a host, cannot be rented; it is there for comparison.)
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9 / 2, FLAT),
    "v6e": Chip(918e12, 32 * GIB, 1600e9, 800e9 / 2, FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9 / 2, f"1x1x1 {CUBES}"),
}
TPUS = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes.split()]


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    chip: Chip | None  # None: simulated CPUs
    devices: Sequence[Any]


def open_topology(name: str) -> Topology:
    """The abstract devices of `v5e:4x4`, or the simulated CPUs of `cpu:2x4`."""
    if re.fullmatch(r"cpu:[1-9]\d*(x[1-9]\d*)*", name):
        devices, size = jax.devices("cpu"), device_count(name)
        if len(devices) < size:
            remedy = f"set JAX_NUM_CPU_DEVICES={size}"
            raise UserError(f"--topology={name}: JAX simulates {len(devices)} CPUs; {remedy}")
        return Topology(name, None, devices[:size])
    if name not in TPUS:
        choices = f"{', '.join(TPUS)}, or simulated CPUs such as cpu:2x4"
        raise UserError(f"--topology={name}: choose one of {choices}{nearest(name, TPUS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs the TPU compiler: pip install -e '.[plan]'")
    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if device_count(name) == 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    return Topology(name, CHIPS[name.partition(":")[0]], described.devices)


def device_count(name: str) -> int:
    """The number of devices of a topology, by its name."""
    return math.prod(map(int, name.partition(":")[2].split("x")))


@dataclass(frozen=True)
class Plan:
    """What one train step takes on a mesh."""

    topology: Topology
    mesh: dict[str, int]  # axis → size, without `replica`
    steps: int  # of the whole run
    tokens: int  # target tokens per step
    model_flops: int  # of the matrix products of a step, on all devices (`costs.step_flops`)
    flops: float = 0.0  # by the compiler's count, on one device, with the bodies of loops once
    memory: dict[str, int] = field(default_factory=dict)  # kind → bytes on one device
    traffic: hlo.Traffic = field(default_factory=hlo.Traffic)  # what one device moves
    refusal: str = ""  # why the step does not fit into memory, in the compiler's words

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    def seconds(self) -> dict[str, float]:
        """Seconds that each unit of a chip needs for a step at its published speed."""
        chip = self.topology.chip
        if chip is None or self.refusal:
            return {}
        return {
            "compute": max(self.flops, self.model_flops / self.chips) / chip.flops,
            "memory": self.traffic.memory / chip.bandwidth,
            "interconnect": sum(self.traffic.sent.values()) / chip.interconnect,
        }

    def roofline(self) -> tuple[float, str]:
        """The estimate of a step's seconds, infinite if it does not fit, and the limiting unit."""
        return max(((each, unit) for unit, each in self.seconds().items()), default=(math.inf, ""))

    def mfu(self) -> float:
        """Model FLOPs utilization at the roofline, which is an upper bound."""
        peak = self.topology.chip.flops if self.topology.chip else math.inf
        return self.model_flops / (self.roofline()[0] * self.chips * peak)


def make_plan(cfg: RunConfig, topology: Topology, *, vocab_size: int, length: int) -> Plan:
    """Compiles one train step of a single run for a topology.

    A row has `length` tokens on each side, packed where the architecture supports it. The memory
    is without the training split, which `train.py` keeps on every device.
    """
    if cfg.replicas > 1:
        raise UserError(f"replicas={cfg.replicas}: plan replicas=1 for the devices of a replica")
    mesh = make_mesh(cfg.mesh, 1, topology.devices)
    check_batch(mesh, cfg.batch_size)
    cfg.model.check_length(length, f"--length={length}")
    run = Run(cfg, mesh=mesh, model=Model(cfg.model, vocab_size))
    state = run.abstract_state
    tokens = np.broadcast_to(np.int32(0), (cfg.batch_size, length))  # takes no memory
    data = Dataset(tokens, tokens, cfg.batch_size, packed=cfg.model.architecture != "recurrent")
    batch = jax.eval_shape(Dataset.batch, data, jax.random.key(0), np.int32(0))
    where = NamedSharding(mesh, partition_spec(("batch", "length")))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)
    axes = {name: size for name, size in mesh.shape.items() if name != "replica"}
    flops = step_flops(run.model, cfg, data)
    plan = Plan(topology, axes, cfg.steps, cfg.batch_size * length, flops)
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(run.model, cfg), donate_argnums=0, out_shardings=shardings)
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
            return replace(plan, refusal=reason)
    return replace(
        plan,
        flops=(compiled.cost_analysis() or {})["flops"],
        memory=memory_by_kind(state, batch, compiled.memory_analysis()),
        traffic=hlo.traffic(compiled.as_text() or "", mesh.size),
    )


def memory_by_kind(state: TrainState, batch: Batch, analysis: Any) -> dict[str, int]:
    """The bytes of each kind on one device, from shapes and from the compiler's analysis."""

    def size(leaf: Any) -> int:  # without the padding of the chip
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    kinds = {"parameters": state.params, "batch": batch}
    kinds |= {"opt_state": state.opt_state, "ema_params": state.ema_params}
    memory = {kind: sum(map(size, jax.tree.leaves(tree))) for kind, tree in kinds.items()}
    memory["other arguments, padding"] = analysis.argument_size_in_bytes - sum(memory.values())
    # All results but the metrics reuse the memory of the arguments.
    memory["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory["activations, gradients, temporaries"] = analysis.temp_size_in_bytes
    memory["program"] = analysis.generated_code_size_in_bytes
    return {kind: bytes_ for kind, bytes_ in memory.items() if bytes_}


def meshes(cfg: RunConfig, devices: int) -> Iterator[RunConfig]:
    """`cfg` with each mesh (data, fsdp, tensor) of so many devices that divides the batch."""
    devices //= cfg.mesh.context
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if devices % (data * fsdp) == 0 and cfg.batch_size % (data * fsdp) == 0:
            tensor = devices // (data * fsdp)
            mesh = replace(cfg.mesh, replica=1, data=data, fsdp=fsdp, tensor=tensor)
            with contextlib.suppress(UserError):  # such as a tensor mesh of the recurrent baseline
                yield replace(cfg, mesh=mesh)


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest first, of equals the smallest; those that do not fit last."""
    return sorted(plans, key=lambda p: (p.refusal, *p.roofline(), sum(p.memory.values())))
