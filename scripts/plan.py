"""Compiles a config's train step for chips that are not there, and says what a run would take.

Of each topology or, with --sweep, of each mesh that divides it: the memory of a device by kind
and whether it fits; the operations, and the bytes to memory and to other devices; the time of a
step at the roofline, which no run can beat; and what follows from it for the whole run.

Topologies of TPUs need their compiler (pip install -e '.[plan]') and no TPU; cpu:2x4 stands for
eight simulated CPUs and needs nothing.

Usage:
    python scripts/plan.py --config=configs/vaswani_big.py --topology=v5e:4x4 [--sweep]
        [--topology=v5e:1x1,v5e:2x4] [--length=256] [--rows_per_chip=32] [--config.mesh.fsdp=4]
"""

import math
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
LENGTH = flags.DEFINE_integer("length", 32, "Tokens a row, of source and of target.", 1)
VOCAB = flags.DEFINE_integer("vocab", 37_000, "Pieces of the vocabulary.", 1)
ROWS = flags.DEFINE_integer("rows_per_chip", None, "Of a batch, in place of its batch_size.", 1)
PRICE = flags.DEFINE_float("price", None, "Dollars for an hour of a chip.", 0.0)
SWEEP = flags.DEFINE_bool("sweep", False, "Try every mesh, and rank them.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """Compiles, and prints."""
    names = TOPOLOGY.value or []
    simulated = [planning.count(name) for name in names if re.fullmatch(r"cpu:\d+(x\d+)*", name)]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max([1, *simulated]))
    plans = [plan for name in names for plan in plans_for(name)]
    if len(plans) == 1:
        show(plans[0])
    else:
        compare(plans)
    console.print(
        f"Assumed: {VOCAB.value:,} pieces; rows of {LENGTH.value} tokens on each side, none of "
        "them padding; the split that batches come from takes memory besides; every unit of a "
        "chip at its published speed, and none waits for another: a run takes longer."
    )


def plans_for(name: str) -> list[Plan]:
    """The plan for a topology; with --sweep, those of its meshes, ranked."""
    topology = planning.open_topology(name)
    devices, config = len(topology.devices), CONFIG.value.copy_and_resolve_references()
    config.batch_size = ROWS.value * devices if ROWS.value else config.batch_size
    cfg = RunConfig.from_config_dict(config)
    plans = []
    for each in planning.meshes(cfg, devices) if SWEEP.value else [cfg]:
        try:
            plan = planning.make_plan(each, topology, vocab_size=VOCAB.value, length=LENGTH.value)
        except UserError as error:
            if not SWEEP.value:
                raise
            console.print(f"left out: {error}")
            continue
        console.print(f"{name}, {mesh(plan)}: {outcome(plan)}")
        plans.append(plan)
    if not plans:
        raise UserError(
            f"--topology={name}: no mesh divides its {devices} devices and batch_size="
            f"{cfg.batch_size}; choose another batch_size, or --rows_per_chip"
        )
    return planning.rank(plans)


def show(plan: Plan) -> None:
    """One plan at length."""
    chip, seconds = plan.topology.chip, plan.seconds()
    if plan.memory:
        sizes = plan.memory | {"all": sum(plan.memory.values())}
        rows = [(kind, f"{size / 2**20:,.2f}") for kind, size in sizes.items()]
        table("memory of a device", ("kind", "MiB"), rows)
    if plan.traffic.sent:
        rows = [
            (kind, f"{plan.traffic.collectives[kind]:,}", f"{sent / 2**20:,.2f}")
            for kind, sent in plan.traffic.sent.items()
        ]
        table("sent by a device in a step", ("collective", "count", "MiB"), rows)
    facts(
        {
            "topology": f"{plan.topology.name}, {mesh(plan)}",
            "batch": f"{plan.tokens:,} target tokens",
            "FLOPs": f"{plan.model_flops:.4g} of matrix products in a step, on all devices",
        }
    )
    if plan.refusal:
        facts({"fits": f"no: {plan.refusal}"})
        return
    facts(
        {
            "a device": f"{plan.model_flops / plan.chips:.4g} of them; {plan.flops:.4g} FLOPs by "
            f"the compiler's count; {plan.traffic.memory / GIB:,.3g} GiB to and from memory"
        }
    )
    if plan.traffic.endless:
        facts({"loops": f"{plan.traffic.endless} of unknown length, counted once"})
    if chip:
        units = ", ".join(f"{unit} {1e3 * time:.3g} ms" for unit, time in seconds.items())
        facts(
            {
                "fits": f"yes, into {chip.memory / GIB:.0f} GiB",
                "at least": units,
                "roofline": f"{1e3 * plan.step_seconds():.3g} ms a step, by {plan.bound()}; "
                f"{figure(plan.tokens / plan.step_seconds())} target tokens/s; "
                f"MFU {percent(plan.mfu())}",
                "run": f"{plan.steps:,} steps in {figure(plan.hours() / 24)} days, "
                f"{figure(plan.hours() * plan.chips)} chip-hours{dollars(plan)}",
            }
        )


def compare(plans: list[Plan]) -> None:
    """Two tables with a row for each plan; the last column is of a billion target tokens."""
    steps, runs = [], []
    for plan in plans:
        name = f"{plan.topology.name} {mesh(plan)}"
        memory = f"{sum(plan.memory.values()) / GIB:.2f}" if plan.memory else "too much"
        times = [f"{1e3 * seconds:.3g} ms" for seconds in plan.seconds().values()]
        steps.append((name, f"{plan.tokens:,}", memory, *(times or [""] * 3)))
        if times:
            chip_hours = plan.hours() * plan.chips
            runs.append(
                (
                    name,
                    figure(plan.tokens / plan.step_seconds()),
                    f"{plan.mfu():.0%}",
                    figure(plan.hours() / 24),
                    figure(chip_hours) + dollars(plan),
                    figure(chip_hours * 1e9 / (plan.tokens * plan.steps)),
                )
            )
    columns = ("", "tokens", "GiB", "compute", "memory", "network")
    table("a step, at the roofline", columns, steps)
    if runs:
        columns = ("", "tokens/s", "MFU", "days", "chip-hours", "a billion")
        table("the run, at the roofline", columns, runs)


def outcome(plan: Plan) -> str:
    """What came of a plan, in a few words."""
    if plan.refusal:
        return f"does not fit: {plan.refusal}"
    memory = f"{sum(plan.memory.values()) / GIB:.2f} GiB"
    time = plan.step_seconds()
    return memory if math.isinf(time) else f"{memory}, {1e3 * time:.3g} ms by {plan.bound()}"


def mesh(plan: Plan) -> str:
    """`data 4, fsdp 2`."""
    axes = [f"{name} {size}" for name, size in plan.mesh.items() if size > 1]
    return ", ".join(axes) or "one device"


def dollars(plan: Plan) -> str:
    """`, $12` if there is a price."""
    if PRICE.value is None:
        return ""
    return f", ${figure(plan.hours() * plan.chips * PRICE.value)}"


if __name__ == "__main__":
    cli.run(main)
