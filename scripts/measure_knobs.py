"""Measures how each knob that affects only time and memory changes the train step of a config.

One knob at a time against the config as given, interleaved in one process. The ratio of useful
target tokens per second is the median over the rounds with the lowest and the highest; memory is
the compiler's, for a step without parameters, optimizer state and data.

Usage:
    python scripts/measure_knobs.py --config=configs/toy_reverse.py [--config.model.d_model=128]
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from absl import flags
from lab.tables import ratios, spread
from lab.timing import interleaved
from ml_collections import config_flags

from transformer import Run, cli
from transformer.config import RunConfig, flat_knobs
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.modules.config import REMATS
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS
from transformer.parallel.devices import describe_mesh

CONFIG = config_flags.DEFINE_config_file("config")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of each knob.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps per measurement.", lower_bound=1)
flags.mark_flag_as_required("config")

AS_GIVEN = "as given"
CHANGES: list[dict[str, Any]] = [
    *({"data.pack_length": length} for length in (0, 32, 64, 128)),
    {"model.fused_qkv": True},
    *({"model.attention_backend": name} for name in ATTENTION_BACKENDS),
    {"model.dtype": "bfloat16"},
    *({"model.remat": name} for name in REMATS),
    {"model.scan_layers": True},
    {"accumulation_steps": 2},
    {"accumulation_steps": 4},
    {"mesh.data": 1},
]


def main() -> None:
    """Compiles a program per knob, then interleaves them."""
    given = CONFIG.value
    cli.set_up_jax(RunConfig.from_config_dict(given))
    jax.config.update("jax_enable_compilation_cache", False)
    run = assemble(RunConfig.from_config_dict(given))
    facts({"devices": describe_mesh(run.mesh)})
    tokens = run.config.batch_size * run.rows.widths[1]
    programs = {AS_GIVEN: compile_steps(run)}
    for change in CHANGES:
        ((knob, value),) = change.items()
        name = f"{knob}={value}"
        if flat_knobs(given)[knob] == value:
            continue
        if value == "splash" and jax.default_backend() != "tpu":
            console.print(f"{name}: skipped: it would be interpreted")
            continue
        config = given.copy_and_resolve_references()
        config.update_from_flattened_dict(change)
        try:
            changed = assemble(RunConfig.from_config_dict(config), tokens)
            programs[name] = compile_steps(changed)
        except UserError as error:
            console.print(f"{name}: skipped: {error}")
    calls = {name: call for name, (call, *_) in programs.items()}
    seconds = interleaved(calls, ROUNDS.value, 0.0)
    speeds, rows = {}, []
    for name, (_, tokens, temporaries, compilation) in programs.items():
        speeds[name] = [tokens * STEPS.value / each for each in seconds[name]]
        ratio = spread(ratios(speeds[name], speeds[AS_GIVEN]), "{:.2f}".format)
        memory = f"{temporaries / 2**20:,.1f}"
        rows.append((name, spread(speeds[name]), ratio, memory, f"{compilation:.1f}"))
    columns = ("knob", "target tokens/s", "ratio", "MiB for a step", "s to compile")
    table(f"{ROUNDS.value} rounds of {STEPS.value} steps", columns, rows)


def assemble(config: RunConfig, tokens: int = 0) -> Run:
    """The run, with batches of about so many tokens if its rows are of another length."""
    run = Run(config, data_dir=DATA_DIR.value)
    parts, width = run.mesh.size * config.accumulation_steps, run.rows.widths[1]
    if tokens in (0, config.batch_size * width):
        return run
    batch_size = max(1, round(tokens / width / parts)) * parts
    return Run(replace(config, batch_size=batch_size), data_dir=DATA_DIR.value)


def compile_steps(run: Run) -> tuple[Callable[[], Any], float, int, float]:
    """A call that takes `--steps` steps; tokens per step, bytes of temporaries, seconds to compile.

    Raises:
      UserError: the knobs contradict each other.
    """
    run.check()
    with jax.set_mesh(run.mesh):
        state, (data, _) = run.initial_state(), run.feed.following(0)
        sums, steps = run.place((run.zero_sums(), np.array(STEPS.value, np.int32)))
        started = time.perf_counter()
        compiled = run.train_steps.lower(state, sums, data, steps).compile()
        compilation = time.perf_counter() - started
    states = [state]

    def call() -> Any:
        states[0], _ = compiled(states[0], sums, data, steps)
        return states[0].step

    tokens = float(np.mean(np.asarray(data.target != 0).sum(1))) * run.config.batch_size
    return call, tokens, compiled.memory_analysis().temp_size_in_bytes, compilation


if __name__ == "__main__":
    cli.run(main)
