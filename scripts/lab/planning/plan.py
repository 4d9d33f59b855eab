"""What a run would need and how fast it could be on chips that are not there.

The real train step is compiled for them. What it takes of memory, the compiler says; what it
moves is read from the program (`hlo`); from both and a chip's published figures follows the
roofline: the time below which a step cannot come, if every unit were always as busy as can be
and none waited for another (Williams, Waterman and Patterson 2009).
"""

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from lab.planning import hlo
from transformer.config import RunConfig
from transformer.data.batches import Batch, Dataset
from transformer.errors import UserError, nearest
from transformer.modules.model import Model
from transformer.parallel.mesh import check_batch, make_mesh, partition_spec, replicated
from transformer.training.costs import step_flops
from transformer.training.step import TrainState, abstract_state, make_train_step

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """A chip's published figures, and the shapes in which it can be had.

    flops: bfloat16 operations a second.
    memory: bytes of HBM; of which the compiler keeps a little to itself.
    bandwidth: bytes a second to and from HBM.
    interconnect: bytes a second that it sends to its neighbours, over all links together:
      half of the published figure, which has both directions in it.
    topologies: the shapes of a slice.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    topologies: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    *("8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)

# docs.cloud.google.com/tpu/docs/v5e, v6e and v5p, as of 2025. (1x1x1 of v5p cannot be rented:
# one of a host's four chips, to compare with.)
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9 / 2, FLAT),
    "v6e": Chip(918e12, 32 * GIB, 1600e9, 800e9 / 2, FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9 / 2, ("1x1x1", *CUBES)),
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for. `chip` is None for simulated CPUs, whose figures nobody publishes."""

    name: str
    chip: Chip | None
    devices: Sequence[Any]


def open_topology(name: str) -> Topology:
    """The devices of `v5e:4x4`, of which none is there; or of `cpu:2x4`, simulated ones.

    Raises:
      UserError: there is no such topology, no compiler for it, or too few simulated CPUs.
    """
    known = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.topologies]
    if re.fullmatch(r"cpu:[1-9]\d*(x[1-9]\d*)*", name):
        devices = jax.devices("cpu")[: count(name)]
        if len(devices) < count(name):
            raise UserError(
                f"--topology={name}: JAX simulates {len(devices)} CPUs; set "
                f"JAX_NUM_CPU_DEVICES={count(name)}"
            )
        return Topology(name, None, devices)
    if name not in known:
        raise UserError(
            f"--topology={name}: choose one of {', '.join(known)}, or simulated CPUs such as "
            f"cpu:2x4{nearest(name, known)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU's compiler: pip install -e '.[plan]'; or plan for "
            "simulated CPUs, such as --topology=cpu:2x4"
        )
    # The compiler looks for a TPU, which it does not need, and for others that do.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if count(name) == 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **alone)
    return Topology(name, CHIPS[name.partition(":")[0]], described.devices)


def count(name: str) -> int:
    """How many devices a topology has by its name."""
    return math.prod(map(int, name.partition(":")[2].split("x")))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one train step takes on a mesh.

    topology: the devices.
    mesh: the sizes of its axes that split something.
    steps: of the whole run.
    tokens: target tokens of a step.
    model_flops: of the step's matrix products, on all devices together (`costs.step_flops`).
    flops: as the compiler counts them, on one device, the bodies of loops once.
    memory: kind → bytes on one device; empty if the compiler found no room.
    traffic: what one device moves.
    refusal: the compiler's words if the step does not fit into memory, or "".
    """

    topology: Topology
    mesh: dict[str, int]
    steps: int
    tokens: int
    model_flops: int
    flops: float
    memory: dict[str, int]
    traffic: hlo.Traffic
    refusal: str

    @property
    def chips(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    def seconds(self) -> dict[str, float]:
        """The time that each unit of a chip needs for a step at its published speed."""
        chip = self.topology.chip
        if chip is None or self.refusal:
            return {}
        return {
            "compute": max(self.flops, self.model_flops / self.chips) / chip.flops,
            "memory": self.traffic.memory / chip.bandwidth,
            "interconnect": sum(self.traffic.sent.values()) / chip.interconnect,
        }

    def step_seconds(self) -> float:
        """The roofline; infinite where a step does not fit."""
        return max(self.seconds().values(), default=math.inf)

    def bound(self) -> str:
        """Which unit sets the pace."""
        return max(self.seconds().items(), key=lambda item: item[1], default=("", 0))[0]

    def mfu(self) -> float:
        """Model FLOPs utilisation at the roofline: the most that can be reached."""
        peak = self.topology.chip.flops if self.topology.chip else math.inf
        return self.model_flops / (self.step_seconds() * self.chips * peak)

    def hours(self) -> float:
        """The whole run at the roofline."""
        return self.step_seconds() * self.steps / 3600


def make_plan(cfg: RunConfig, topology: Topology, *, vocab_size: int, length: int) -> Plan:
    """Compiles one train step of `cfg` for `topology`.

    The batch is there already: `cfg.batch_size` rows, each full on both sides; packed where the
    architecture can read that. The split it comes from, which `train.py` keeps on every device,
    takes memory besides.

    Args:
      cfg: the run, a single one.
      topology: the devices.
      vocab_size: V.
      length: tokens a row, of source and of target.

    Raises:
      UserError: the mesh does not divide the devices, the batch or a parameter, or a row is
        longer than positions reach.
    """
    if cfg.replicas > 1:
        raise UserError(
            f"replicas={cfg.replicas}: a plan is of a single run; set it to 1, and count the "
            "devices of each replica"
        )
    mesh = make_mesh(cfg.mesh, 1, topology.devices)
    check_batch(mesh, cfg.batch_size)
    cfg.model.check_length(length, f"--length={length}")
    model, step_config = Model(cfg.model, vocab_size), cfg.step_config()
    state = abstract_state(model, step_config, mesh)
    tokens = np.broadcast_to(np.int32(0), (cfg.batch_size, length))  # takes no memory
    data = Dataset(tokens, tokens, cfg.batch_size, packed=cfg.model.architecture != "recurrent")
    batch = abstract_batch(data, mesh)
    step = jax.jit(
        make_train_step(model, step_config),
        donate_argnums=0,
        out_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, state),
            replicated(mesh),
        ),
    )
    flops, memory, moves, refusal = 0.0, {}, hlo.Traffic(), ""
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        else:
            flops = (compiled.cost_analysis() or {})["flops"]
            memory = memory_by_kind(state, batch, compiled.memory_analysis())
            moves = hlo.traffic(compiled.as_text() or "", mesh.size)
    return Plan(
        topology=topology,
        mesh={name: size for name, size in mesh.shape.items() if name != "replica"},
        steps=cfg.steps,
        tokens=cfg.batch_size * length,
        model_flops=step_flops(model, step_config, data),
        flops=flops,
        memory=memory,
        traffic=moves,
        refusal=refusal,
    )


def abstract_batch(data: Dataset, mesh: Mesh) -> Batch:
    """The shapes of a batch, and how it is split."""
    shapes = jax.eval_shape(Dataset.batch, data, jax.random.key(0), np.int32(0))
    where = NamedSharding(mesh, partition_spec(("batch", "length")))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes
    )


def memory_by_kind(state: TrainState, batch: Batch, analysis: Any) -> dict[str, int]:
    """The bytes of each kind on one device, from shapes and from the compiler's analysis."""
    kinds = {
        "parameters": state.params,
        "opt_state": state.opt_state,
        "ema_params": state.ema_params,
        "batch": batch,
    }
    memory = {kind: device_bytes(tree) for kind, tree in kinds.items()}
    memory["other arguments, padding"] = analysis.argument_size_in_bytes - sum(memory.values())
    # What is handed back lies where it came from, all but the sums.
    memory["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory["activations, gradients, temporaries"] = analysis.temp_size_in_bytes
    memory["program"] = analysis.generated_code_size_in_bytes
    return {kind: size for kind, size in memory.items() if size}


def device_bytes(tree: Any) -> int:
    """The bytes of a pytree's arrays on one device, before the chip's own padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def meshes(cfg: RunConfig, devices: int) -> Iterator[RunConfig]:
    """`cfg` with each mesh (data, fsdp, tensor) of so many devices that divides the batch.

    What `mesh.context` splits stays as it is.
    """
    devices //= cfg.mesh.context
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if devices % (data * fsdp) == 0 and cfg.batch_size % (data * fsdp) == 0:
            tensor = devices // (data * fsdp)
            mesh = replace(cfg.mesh, replica=1, data=data, fsdp=fsdp, tensor=tensor)
            try:
                yield replace(cfg, mesh=mesh)
            except UserError:  # such as a tensor mesh of the recurrent baseline
                continue


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest first, of equals the smallest; what does not fit last."""

    def key(plan: Plan):
        return bool(plan.refusal), plan.step_seconds(), sum(plan.memory.values())

    return sorted(plans, key=key)
