"""Compiles the train step of a config for a topology, and estimates the cost of a run there.

Prints, for each topology or with --sweep for each of its meshes, memory per device, operations,
traffic, and the roofline estimate of a step and of the run. TPU topologies need the TPU compiler
(pip install -e '.[plan]') and no TPU; cpu:2x4 simulates eight CPUs and needs nothing.

    python scripts/plan.py --config=configs/vaswani_big.py --topology=v5e:4x4 [--sweep]
        [--topology=v5e:1x1,v5e:2x4] [--length=256] [--rows_per_chip=32] [--config.mesh.fsdp=4]
"""

import re

import jax
from absl import flags
from lab.planning import plan as planning
from lab.planning.plan import GIB, Plan
from ml_collections import config_flags

from transformer import cli
from transformer.config import RunConfig
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.metrics import figure, percent

CONFIG = config_flags.DEFINE_config_file("config")
TOPOLOGY = flags.DEFINE_list("topology", None, "Such as v5e:4x4, v5p:4x4x4, cpu:2x4; several.")
LENGTH = flags.DEFINE_integer("length", 32, "Tokens per row, of source and of target.", 1)
VOCAB = flags.DEFINE_integer("vocab", 37_000, "Vocabulary size.", 1)
ROWS = flags.DEFINE_integer("rows_per_chip", None, "Rows per chip, instead of batch_size.", 1)
PRICE = flags.DEFINE_float("price", None, "Dollars per chip-hour.", 0.0)
SWEEP = flags.DEFINE_bool("sweep", False, "Try every mesh, and rank them.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """Compiles and prints the plans."""
    names = TOPOLOGY.value or []
    cpus = [planning.device_count(name) for name in names if re.fullmatch(r"cpu:\d+(x\d+)*", name)]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max([1, *cpus]))
    show([plan for name in names for plan in plans_for(name)])
    console.print(
        f"Assumptions: vocabulary {VOCAB.value:,}; rows of {LENGTH.value} tokens on each side "
        "without padding; the training split takes memory on top; every unit of a chip runs at its "
        "published speed and never waits, so that a real run takes longer."
    )


def plans_for(name: str) -> list[Plan]:
    """The plan for a topology; with --sweep, those of its meshes, ranked."""
    topology, plans = planning.open_topology(name), []
    devices, config = len(topology.devices), CONFIG.value.copy_and_resolve_references()
    config.batch_size = ROWS.value * devices if ROWS.value else config.batch_size
    cfg = RunConfig.from_config_dict(config)
    for each in planning.meshes(cfg, devices) if SWEEP.value else [cfg]:
        try:
            plan = planning.make_plan(each, topology, vocab_size=VOCAB.value, length=LENGTH.value)
        except UserError as error:
            if not SWEEP.value:
                raise
            console.print(f"skipped: {error}")
            continue
        outcome = f"does not fit: {plan.refusal}" if plan.refusal else "compiled"
        console.print(f"{label(plan)}: {outcome}")
        plans.append(plan)
    if not plans:
        raise UserError(
            f"--topology={name}: no mesh divides its {devices} devices and batch_size="
            f"{cfg.batch_size}; choose another batch_size, or --rows_per_chip"
        )
    return planning.rank(plans)


def show(plans: list[Plan]) -> None:
    """Prints a row per plan; for a single plan also the memory by kind and the collectives."""
    if len(plans) == 1:
        details(plans[0])
    steps, runs = [], []
    for plan in plans:
        name, (seconds, bound) = label(plan), plan.roofline()
        memory = f"{sum(plan.memory.values()) / GIB:.2f}" if plan.memory else "too much"
        times = [f"{1e3 * each:.3g} ms" for each in plan.seconds().values()]
        steps.append((name, f"{plan.tokens:,}", memory, *(times or [""] * 3), bound))
        if times:
            hours = seconds * plan.steps / 3600
            chip_hours = hours * plan.chips
            cost = "" if PRICE.value is None else f", ${figure(chip_hours * PRICE.value)}"
            cost = f"{figure(chip_hours)} chip-hours{cost}"
            speed, days = figure(plan.tokens / seconds), figure(hours / 24)
            per_billion = figure(chip_hours * 1e9 / (plan.tokens * plan.steps))
            runs.append((name, speed, percent(plan.mfu()), days, cost, per_billion))
    columns = ("", "tokens", "GiB a device", "compute", "memory", "interconnect", "bound by")
    table("a step, roofline estimate", columns, steps)
    if runs:
        columns = ("", "tokens/s", "MFU", "days", "cost", "chip-hours per billion tokens")
        table("the run, roofline estimate", columns, runs)


def details(plan: Plan) -> None:
    """Prints the memory by kind, the collectives and the operations of one plan."""
    traffic, products = plan.traffic, f"{plan.model_flops / plan.chips:.4g} of matrix products"
    rows = [(kind, f"{size / 2**20:,.2f}") for kind, size in plan.memory.items()]
    table("memory of a device", ("kind", "MiB"), rows)
    sent = traffic.sent.items()
    rows = [(kind, f"{traffic.counts[kind]:,}", f"{size / 2**20:,.2f}") for kind, size in sent]
    table("sent by a device in a step", ("collective", "count", "MiB"), rows)
    facts(
        {
            "FLOPs": f"{products} in a step, per device; {plan.flops:.4g} by the compiler's count",
            "HBM": f"{traffic.memory / GIB:,.3g} GiB read and written in a step, per device",
            "loops": f"{traffic.unknown_loops} of unknown length, counted once",
        }
    )


def label(plan: Plan) -> str:
    """`v5e:2x4, data 4, fsdp 2`."""
    axes = [f"{name} {size}" for name, size in plan.mesh.items() if size > 1]
    return ", ".join([plan.topology.name, *(axes or ["one device"])])


if __name__ == "__main__":
    cli.run(main)
