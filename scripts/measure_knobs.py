"""What each knob that changes time and memory, and no result, does to the train step of a config.

One knob at a time against the config as it is, in one process, taking turns; on this machine.
Ratios are of useful target tokens a second, the median of the rounds with their range; the
memory is what the compiler sets aside for a step besides parameters, moments and data.

Usage:
    python scripts/measure_knobs.py --config=configs/toy_reverse.py [--config.model.d_model=128]
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from lab.timing import interleaved
from ml_collections import ConfigDict, config_flags

from transformer import cli
from transformer.config import RunConfig
from transformer.console import console, facts, table
from transformer.data.batches import Dataset
from transformer.data.load import open_corpus
from transformer.data.rows import alone, pack
from transformer.errors import UserError
from transformer.modules.config import REMATS
from transformer.modules.dot_product_attention import ATTENTION_BACKENDS
from transformer.modules.model import Model
from transformer.parallel.devices import describe_mesh
from transformer.parallel.mesh import make_mesh, replicated
from transformer.training.step import (
    abstract_state,
    init_state,
    make_train_step,
    make_train_steps,
    zero_sums,
)

CONFIG = config_flags.DEFINE_config_file("config")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps in a turn.", lower_bound=1)
flags.mark_flag_as_required("config")

# The config itself; then other values of the knobs.
KNOBS: list[dict[str, Any]] = [
    {},
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
    """Builds a program for each, then lets them take turns."""
    config = CONFIG.value
    cli.set_up_jax(RunConfig.from_config_dict(config))
    jax.config.update("jax_enable_compilation_cache", False)
    programs: dict[str, Program] = {}
    for changes in KNOBS:
        name = ", ".join(f"{knob}={value}" for knob, value in changes.items()) or "as it is"
        if changes and all(read(config, knob) == value for knob, value in changes.items()):
            continue
        if changes.get("model.attention_backend") == "splash" and jax.default_backend() != "tpu":
            console.print(f"{name}: left out: it would be interpreted")
            continue
        try:
            programs[name] = build(config, changes)
        except UserError as error:
            console.print(f"{name}: left out: {error}")
    console.print(f"{len(programs)} programs are built")
    facts({"devices": describe_mesh(next(iter(programs.values())).mesh)})
    seconds = interleaved(
        {name: program.run for name, program in programs.items()}, ROUNDS.value, 0.0
    )
    speed = {
        name: programs[name].tokens * STEPS.value / np.array(each) for name, each in seconds.items()
    }
    rows = []
    for name, program in programs.items():
        ratio = speed[name] / speed["as it is"]
        rows.append(
            (
                name,
                f"{np.median(speed[name]):,.0f}",
                f"{np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}]",
                f"{program.temporaries / 2**20:,.1f}",
                f"{program.compiling:.1f}",
            )
        )
    columns = ("knob", "target tokens/s", "times as it is", "MiB for a step", "s to compile")
    table(f"{ROUNDS.value} rounds of {STEPS.value} steps", columns, rows)


@dataclass(frozen=True)
class Program:
    """A compiled train step with its state.

    run: takes `--steps` steps and waits for them.
    tokens: useful target tokens a step, on average.
    temporaries: bytes.
    compiling: seconds.
    """

    mesh: Mesh
    run: Callable[[], Any]
    tokens: float
    temporaries: int
    compiling: float


def build(config: ConfigDict, changes: dict[str, Any]) -> Program:
    """The program of a config with changes.

    Raises:
      UserError: they do not go together.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    cfg = RunConfig.from_config_dict(config)
    mesh = make_mesh(cfg.mesh, cfg.replicas)
    corpus = open_corpus(cfg.data, DATA_DIR.value)
    rows, batch_size = alone(corpus.tokens(cfg.data.train)), cfg.batch_size
    if cfg.data.pack_length:
        # A batch of as many tokens, as near as the devices and the parts of a batch allow.
        parts = mesh.size * cfg.accumulation_steps
        batch_size = (
            max(1, round(batch_size * rows.widths[1] / cfg.data.pack_length / parts)) * parts
        )
        rows = pack(rows, cfg.data.pack_length)
    data = Dataset.of(rows, batch_size)
    model, step_config = Model.of(cfg.model, *corpus.tokenizers), cfg.step_config()
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, step_config, mesh))
    everywhere = replicated(mesh)
    with jax.set_mesh(mesh):
        data = jax.device_put(data, everywhere)
        init = jax.jit(partial(init_state, model, step_config), out_shardings=where)
        state = init(cfg.seeds(), {})
        steps = make_train_steps(make_train_step(model, step_config))
        jitted = jax.jit(steps, donate_argnums=(0, 1), out_shardings=(where, everywhere))
        sums, n = zero_sums(), jnp.int32(STEPS.value)
        started = time.perf_counter()
        compiled = jitted.lower(state, sums, data, n).compile()
        compiling = time.perf_counter() - started
    box = [state]

    def run() -> Any:
        with jax.set_mesh(mesh):
            box[0], _ = jitted(box[0], zero_sums(), data, n)
            return jax.block_until_ready(box[0].step)

    run()
    tokens = float(np.mean(np.asarray(data.target != 0).sum(1))) * data.batch_size
    memory: Any = compiled.memory_analysis()
    return Program(mesh, run, tokens, memory.temp_size_in_bytes, compiling)


def read(config: ConfigDict, knob: str) -> Any:
    """The value of `model.norm` and the like."""
    value: Any = config
    for part in knob.split("."):
        value = value[part]
    return value


if __name__ == "__main__":
    cli.run(main)
