"""Trains a model, or goes on with one that was interrupted.

Usage:
    python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from transformer import cli, evaluation, sharding
from transformer.checkpoint import Checkpoints
from transformer.config import RunConfig
from transformer.console import TrainingBar, facts, figure, percent, perplexity, table
from transformer.data.batches import Dataset
from transformer.data.load import Corpus, open_corpus
from transformer.errors import UserError
from transformer.metrics import MetricsWriter, read_metrics, train_metrics
from transformer.model import Model
from transformer.optimizer import make_optimizer
from transformer.training import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    make_train_steps,
    zero_sums,
)
from transformer.workdir import Workdir

CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/<config's name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
ALLOW_CHANGES = flags.DEFINE_bool(
    "allow_changes", False, "Go on from the checkpoint of a run of another config."
)
flags.mark_flag_as_required("config")


def main() -> None:
    """Reads the flags and runs."""
    flag = flags.FLAGS["config"]
    file = Path(config_flags.get_config_filename(flag))
    overrides = config_flags.get_override_values(flag)
    facts({"config": " ".join([str(file), *(f"{k}={v}" for k, v in overrides.items())])})
    cli.set_up_jax()
    workdir = Workdir(WORKDIR.value or f"runs/{file.stem}")
    run(CONFIG.value, workdir, DATA_DIR.value, allow_changes=ALLOW_CHANGES.value)


def run(
    config: ConfigDict, workdir: Workdir, data_dir: str | None, *, allow_changes: bool = False
) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one."""
    cfg = RunConfig.resolve(config)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_batch(mesh, cfg.batch_size)
    workdir.claim(config, allow_changes=allow_changes)

    # Data, all of it on the device.
    corpus = open_corpus(cfg.data, data_dir)
    splits = {"train": cfg.data.train, "validation": cfg.data.validation, "test": cfg.data.test}
    data = {name: corpus.load(split, cfg.batch_size) for name, split in splits.items()}
    for name, dataset in data.items():
        cfg.model.check_length(dataset.longest(), f"the longest example of data.{name}")
    data = jax.device_put(data, sharding.replicated(mesh))

    # Model and optimizer: structure and shapes, no arrays yet.
    model = Model(cfg.model, corpus.tokenizer.vocab_size)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    like = abstract_state(model, optimizer, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    facts(
        {
            "data": f"{corpus.builder.info.full_name}, {len(data['train']):,} training examples",
            "devices": sharding.describe(mesh),
            "parameters": f"{model.count_parameters():,}",
            "workdir": str(workdir.path),
        }
    )

    with jax.set_mesh(mesh), Checkpoints(workdir.checkpoints, cfg.keep_checkpoints) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            init = jax.jit(partial(init_state, model, optimizer), out_shardings=where)
            state = init(np.uint32(cfg.seed))
        else:
            state = checkpoints.restore(step, like)
            if int(state.seed) != cfg.seed or step > cfg.steps:
                raise UserError(
                    f"the checkpoint in {workdir.path} has seed {int(state.seed)} and step {step}, "
                    f"the config seed={cfg.seed} and steps={cfg.steps}: another run; "
                    "choose another --workdir"
                )
            facts({"resuming": f"at step {step:,} of {cfg.steps:,}"})
        workdir.write_config(config)  # only now: nothing stands in the way of training
        train_step = make_train_step(model, optimizer, cfg.label_smoothing)
        train_steps = jax.jit(
            make_train_steps(train_step),
            donate_argnums=(0, 1),
            out_shardings=(where, sharding.replicated(mesh)),
        )
        score = jax.jit(partial(evaluation.score, model))
        with MetricsWriter(workdir.path, resume_from=step or 0) as writer:
            state = train(cfg, state, train_steps, score, data, checkpoints, writer)

        from transformer import plots  # matplotlib is not needed before

        plots.learning_curve(read_metrics(workdir.metrics), workdir.plots / "learning_curve.png")
        show_results(cfg, model, corpus, state, score, data)
    return state


def train(
    cfg: RunConfig,
    state: TrainState,
    train_steps: Callable,
    score: Callable,
    data: dict[str, Dataset],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
) -> TrainState:
    """Takes steps until `cfg.steps`; evaluates, saves and logs where they are due.

    Validation at step i describes the parameters after i updates; train metrics are those
    of the interval that ends there. A save comes with an evaluation, so that the best
    checkpoint can be told.
    """
    step, sums, seconds = int(state.step), zero_sums(), 0.0
    started = time.perf_counter()
    state, sums = train_steps(state, sums, data["train"], jnp.int32(0))  # compiles, takes no step
    facts({"compiled": f"in {time.perf_counter() - started:.1f} s"})
    with TrainingBar(step, cfg.steps) as bar:
        while step < cfg.steps:
            started = time.perf_counter()
            stop = next_stop(step, cfg)
            state, sums = train_steps(state, sums, data["train"], jnp.int32(stop - step))
            jax.block_until_ready(sums)
            step, seconds = stop, seconds + time.perf_counter() - started
            saves = step % cfg.save_every == 0 or step == cfg.steps
            # At saves too: a resumed run then logs the very intervals of one left alone.
            if step % cfg.log_every == 0 or saves:
                metrics = train_metrics(sums, seconds)
                bar.update(step, metrics)
                writer.write(step, metrics)
                sums, seconds = zero_sums(), 0.0
            if step % cfg.eval_every == 0 or saves:
                metrics = score(state.params, data["validation"]).metrics("validation")
                bar.validated(step, metrics)
                writer.write(step, metrics)
                if saves:
                    checkpoints.save(state, metrics)
    return state


def next_stop(step: int, cfg: RunConfig) -> int:
    """The step at which the next dispatch ends: no later than the next thing that is due."""
    due = ((step // every + 1) * every for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
    return min(cfg.steps, step + cfg.steps_per_call, *due)


def show_results(
    cfg: RunConfig,
    model: Model,
    corpus: Corpus,
    state: TrainState,
    score: Callable,
    data: dict[str, Dataset],
) -> None:
    """Prints the final metrics and three decoded samples."""
    rows = []
    for name in ("validation", "test"):
        metrics = score(state.params, data[name]).metrics(name)
        rows.append(
            (
                name,
                figure(metrics[f"{name}/loss"]),
                perplexity(metrics[f"{name}/perplexity"]),
                percent(metrics[f"{name}/token_accuracy"]),
                percent(metrics[f"{name}/sequence_accuracy"]),
            )
        )
    columns = ("split", "loss", "perplexity", "tokens right", "sequences right")
    table(f"after {cfg.steps:,} steps", columns, rows)

    samples = data["validation"].head(3)
    length = cfg.model.reach(samples.source.shape[1] + cfg.decode_margin)
    decoded = jax.jit(partial(evaluation.decode, model, length=length))(state.params, samples)
    text = corpus.tokenizer.decode
    rows = zip(
        *(map(text, each.tolist()) for each in (samples.source, samples.target, decoded)),
        strict=True,
    )
    table("samples", ("source", "target", "output"), list(rows))


if __name__ == "__main__":
    cli.run(main)
