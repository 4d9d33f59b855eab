"""This library as a contender: packed rows, many steps per dispatch, all data on the device."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from lab.benchmark.contender import Contender, Schedule, Setting
from lab.timing import interleaved
from transformer import Run, cli
from transformer.config import RunConfig, default_config
from transformer.data.tokenizer import PAD
from transformer.errors import UserError
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.parallel.mesh import cpu_cores, one_device_mesh, replicated


def run_config(setting: Setting, schedule: Schedule, rows: int) -> RunConfig:
    """The default config with the size, the pairs and the schedule of the benchmark."""
    size, config = setting.size, default_config()
    sizes = ("num_layers", "d_model", "num_heads", "d_ff")
    files = {name: str(setting.folder / f"{name}.tsv") for name in ("train", "validation", "test")}
    config.steps, config.batch_size = schedule.steps, rows
    config.data.update({"dataset": "files", "pack_length": size.pack, **files})
    config.model.update({name: getattr(size, name) for name in sizes})
    config.model.dtype = "float32" if setting.device == "cpu" else "bfloat16"
    config.model.dropout_rate, config.label_smoothing = size.dropout, size.label_smoothing
    rate, warmup = schedule.learning_rate, schedule.warmup_steps
    config.optimizer.update(schedule="linear", learning_rate=rate, warmup_steps=warmup)
    return RunConfig.from_config_dict(config)


class Ours(Contender):
    """Trains as `train.py` does, and decodes as `eval.py` does."""

    rules = DecodingConfig(length_penalty=0.0)  # of decoding

    def __init__(self, setting: Setting):
        self.setting, self.schedule = setting, Schedule(1e-3, 1, 2)
        parts = cpu_cores() if setting.device == "cpu" else 1
        first = run_config(setting, self.schedule, parts)
        cli.set_up_jax(run_config(setting, self.schedule, setting.size.batch))
        if jax.default_backend() != setting.device:
            raise UserError(f"--device={setting.device}: JAX runs on {jax.default_backend()}")
        # As many rows per step as hold on average the pairs of a step of the peers, in a number
        # that the devices divide.
        packed = len(self.make_run(first).rows)
        rows = round(setting.size.batch * packed / setting.size.examples)
        self.batch_size = max(1, -(-rows // parts)) * parts
        self.run = self.make_run(run_config(setting, self.schedule, self.batch_size))
        self.decoders: dict[Any, Callable] = {}
        self.placed: dict[Any, Any] = {}  # mesh → the variables there

    def make_run(self, config: RunConfig) -> Run:
        return Run(config, data_dir=str(self.setting.folder / "datasets"))

    def start(self, seed: int, schedule: Schedule) -> None:
        if schedule != self.schedule:
            self.schedule = schedule
            self.run = self.make_run(run_config(self.setting, schedule, self.batch_size))
        with jax.set_mesh(self.run.mesh):
            self.state = self.run.init(np.uint32(seed), {})
        self.variables, self.placed = self.state.variables(), {}

    def train(self, steps: int, batching: str) -> tuple[int, float]:
        run = self.run
        with jax.set_mesh(run.mesh):
            data, _ = run.feed.window(0)
            sums, n = run.place((run.zero_sums(), np.array(steps, np.int32)))
            self.state, sums = run.train_steps(self.state, sums, data, n)
        self.variables, self.placed = self.state.variables(), {}
        tokens = int(sums["tokens"])  # waits
        return tokens, float(sums["train/objective"]) / tokens

    def flops(self) -> tuple[int, float]:
        """The FLOPs of the matrix products of a step, and per second of products of two squares."""
        size, times = (2_048, 4) if self.setting.device == "cpu" else (8_192, 16)
        x = jax.random.normal(jax.random.key(0), (size, size), self.run.config.model.dtype) / size
        products = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: x @ y, x))
        fastest = min(interleaved({"": partial(products, x)}, rounds=5)[""])
        return self.run.step_flops, times * 2 * size**3 / fastest

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        decoding = dataclasses.replace(self.rules, beam_size=beams, length_penalty=0.0)
        # One source at a time has one device; a batch is divided among them, as in `eval.py`.
        mesh = one_device_mesh() if batch == 1 else self.run.mesh
        key = batch == 1, beams, length
        if key not in self.decoders:
            call = partial(evaluation.decode, self.run.model, decoding=decoding, max_length=length)
            self.decoders[key] = jax.jit(call, compiler_options=evaluation.compiler_options())
        with jax.set_mesh(mesh):
            if mesh not in self.placed:
                self.placed[mesh] = jax.device_put(self.variables, replicated(mesh))
            call = partial(self.decoders[key], self.placed[mesh])
            if batch > 1:
                size = evaluation.rows_at_once(self.run.model, batch, beams)
                return np.asarray(evaluation.decode_in_batches(call, source, size).tokens[:, 0])
            widths = -(-(source != PAD).sum(1) // 8) * 8  # few, for few programs
            rows = zip(source, widths, strict=True)
            found = [jax.block_until_ready(call(row[None, :width])) for row, width in rows]
        return np.concatenate([np.asarray(each.tokens) for each in found])[:, 0]

    def save(self, path: str) -> None:
        arrays: Any = {name: np.asarray(leaf) for name, leaf in self.variables.items()}
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    def load(self, path: str) -> None:
        with np.load(path) as arrays:
            self.variables, self.placed = dict(arrays), {}
