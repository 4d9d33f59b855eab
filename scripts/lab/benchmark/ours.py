"""This code as a contender: packed rows, many steps a dispatch, everything on the device."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.benchmark import task
from lab.benchmark.contender import Contender, Schedule, Setting
from lab.benchmark.task import Size
from transformer import cli
from transformer.config import RunConfig, default_config
from transformer.data.batches import Dataset
from transformer.data.ragged import Ragged
from transformer.data.rows import Pairs, alone, pack
from transformer.data.tokenizer import PAD
from transformer.inference import decoding, evaluation
from transformer.modules.model import Model, Params
from transformer.parallel.devices import cpu_cores
from transformer.parallel.mesh import MeshConfig, make_mesh, one_device_mesh, replicated
from transformer.training import costs
from transformer.training.step import (
    abstract_state,
    init_state,
    make_train_step,
    make_train_steps,
    zero_sums,
)


def run_config(size: Size, device: str, schedule: Schedule, rows: int) -> RunConfig:
    """The shipped config but for sizes and schedule."""
    config = default_config()
    config.steps, config.batch_size = schedule.steps, rows
    config.data.pack_length = size.pack
    config.model.update(
        {
            "num_layers": size.layers,
            "d_model": size.width,
            "num_heads": size.heads,
            "d_ff": size.ff_width,
            "dtype": "float32" if device == "cpu" else "bfloat16",
        }
    )
    config.optimizer.update(
        {
            "learning_rate": schedule.learning_rate,
            "warmup_steps": schedule.warmup_steps,
            "schedule": schedule.name,
        }
    )
    return RunConfig.from_config_dict(config)


def without_padding(row: np.ndarray) -> np.ndarray:
    """One source [1, S], S a multiple of 8, so that few programs serve every length."""
    length = int((row != PAD).sum())
    return row[None, : -(-length // 8) * 8]


class Ours(Contender):
    """As `train.py` trains, but for what it writes."""

    def __init__(self, setting: Setting):
        self.size, self.device = setting.size, setting.device
        strings = task.load(setting.data, "train")
        pairs = Pairs(Ragged.unpadded(strings.source), Ragged.unpadded(strings.target))
        packed = pack(alone(pairs), setting.size.pack)
        # As many rows a step as hold, on average, the strings that a step of the peers has, in a
        # number that the cores divide.
        rows = max(1, round(setting.size.batch * len(packed) / len(strings)))
        if setting.device == "cpu":
            rows = -(-rows // cpu_cores()) * cpu_cores()
        schedule = Schedule(learning_rate=1e-3, warmup_steps=1, name="constant", steps=2)
        cli.set_up_jax(run_config(self.size, self.device, schedule, rows))
        whole = MeshConfig(replica=1, data=-1, fsdp=1, tensor=1, context=1)
        self.mesh = make_mesh(whole)
        self.everywhere = replicated(self.mesh)
        self.data = jax.device_put(Dataset.of(packed, rows), self.everywhere)
        self.schedule: Schedule | None = None
        self.decoders: dict[tuple[Any, ...], Callable] = {}
        self.placed: dict[Any, Params] = {}  # mesh → the variables there, which came `from` these

    def start(self, seed: int, schedule: Schedule) -> None:
        if schedule != self.schedule:
            self.schedule = schedule
            cfg = run_config(self.size, self.device, schedule, self.data.batch_size)
            self.model, self.step_config = Model(cfg.model, self.size.vocabulary), cfg.step_config()
            like = abstract_state(self.model, self.step_config, self.mesh)
            where = jax.tree.map(lambda leaf: leaf.sharding, like)
            self.init = jax.jit(
                partial(init_state, self.model, self.step_config), out_shardings=where
            )
            steps = make_train_steps(make_train_step(self.model, self.step_config))
            self.train_steps = jax.jit(
                steps, donate_argnums=(0, 1), out_shardings=(where, self.everywhere)
            )
        with jax.set_mesh(self.mesh):
            self.state = self.init(np.uint32(seed), {})
        self.variables: Params = self.state.variables()

    def train(self, steps: int, batching: str) -> int:
        with jax.set_mesh(self.mesh):
            self.state, self.sums = self.train_steps(
                self.state, zero_sums(), self.data, jnp.int32(steps)
            )
        self.variables = self.state.variables()
        return int(self.sums["tokens"])  # waits

    def loss(self) -> float:
        return float(self.sums["loss"] / self.sums["tokens"])

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        search = decoding.greedy
        if beams > 1:
            search = partial(decoding.beam_search, beam_size=beams, length_penalty=0.0)
        # One source at a time has one device; a batch is divided among them, as in `eval.py`.
        mesh = one_device_mesh() if batch == 1 else self.mesh
        key = batch == 1, beams, length
        if key not in self.decoders:
            decode = partial(evaluation.decode, self.model, length=length, search=search)
            options = evaluation.compiler_options()
            self.decoders[key] = jax.jit(decode, compiler_options=options)
        with jax.set_mesh(mesh):
            if self.placed.get("from") is not self.variables:
                self.placed = {"from": self.variables}
            if mesh not in self.placed:
                self.placed[mesh] = jax.device_put(self.variables, replicated(mesh))
            variables = self.placed[mesh]
            parts = [without_padding(row) for row in source] if batch == 1 else [source]
            decode = self.decoders[key]
            found = [
                jax.block_until_ready(decode(variables, Dataset(part, part, batch)))
                for part in parts
            ]
        tokens = np.concatenate([np.asarray(each.tokens) for each in found])
        return tokens if beams == 1 else tokens[:, 0]

    def product(self, n: int) -> Callable[[], Any]:
        dtype = jnp.float32 if self.device == "cpu" else jnp.bfloat16
        left, right = (jax.random.normal(jax.random.key(k), (n, n), dtype) for k in range(2))
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(left, right))

    def memory(self) -> int | None:
        statistics = jax.devices()[0].memory_stats()  # None on a CPU
        return statistics and statistics["peak_bytes_in_use"]

    def flops(self) -> int | None:
        return costs.step_flops(self.model, self.step_config, self.data)

    def save(self, path: Path) -> None:
        arrays: Any = {name: np.asarray(leaf) for name, leaf in self.variables.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def load(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.variables = {name: jnp.asarray(array) for name, array in arrays.items()}
