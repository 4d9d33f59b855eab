"""Trains a model, or goes on with one that was interrupted.

Usage:
    python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from transformer import cli, evaluation, sharding
from transformer.checkpoint import Checkpoints, abstract
from transformer.config import RunConfig
from transformer.console import TrainingBar, facts, figure, percent, table
from transformer.data.batches import Dataset
from transformer.data.load import Corpus, open_corpus
from transformer.metrics import MetricsWriter, read_metrics, train_metrics
from transformer.model import Model
from transformer.optimizer import make_optimizer
from transformer.training import (
    TrainState,
    init_state,
    make_train_step,
    make_train_steps,
    state_shardings,
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
    """Sets everything up, trains, shows the results."""
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    run = RunConfig.resolve(CONFIG.value)

    # Devices.
    mesh = sharding.make_mesh(run.mesh)
    sharding.check_batch(mesh, run.batch_size)
    cli.set_up_jax()
    jax.set_mesh(mesh)

    # Data, all of it on the device.
    workdir = Workdir(WORKDIR.value or f"runs/{file.stem}")
    workdir.claim(CONFIG.value, allow_changes=ALLOW_CHANGES.value)
    corpus = open_corpus(run.data, DATA_DIR.value)
    data = {
        name: corpus.load(split, run.batch_size)
        for name, split in (
            ("train", run.data.train),
            ("validation", run.data.validation),
            ("test", run.data.test),
        )
    }
    for name, dataset in data.items():
        run.model.check_length(dataset.longest(), f"the longest example of data.{name}")
    data = jax.device_put(data, sharding.replicated(mesh))

    # Model and optimizer: structure and shapes, no arrays yet.
    model = Model(run.model, corpus.tokenizer.vocab_size)
    optimizer = make_optimizer(run.optimizer, run.steps)
    where = state_shardings(model, optimizer, mesh)
    facts(
        {
            "config": " ".join([str(file), *(f"{k}={v}" for k, v in overrides.items())]),
            "data": f"{corpus.builder.info.full_name}, {len(data['train']):,} training examples",
            "devices": sharding.describe(mesh),
            "parameters": f"{model.count_parameters():,}",
            "workdir": str(workdir.path),
        }
    )

    init = partial(init_state, model, optimizer)
    with Checkpoints(workdir.checkpoints, run.keep_checkpoints) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            state = jax.jit(init, out_shardings=where)(run.seed)
        else:
            state = checkpoints.restore(step, abstract(jax.eval_shape(init, run.seed), where))
        train_steps = make_train_steps(make_train_step(model, optimizer, run.label_smoothing))
        train_steps = jax.jit(train_steps, donate_argnums=(0, 1), out_shardings=(where, None))
        score = jax.jit(partial(evaluation.score, model))
        with MetricsWriter(workdir.path, resume_from=step or 0) as writer:
            state = train(run, state, train_steps, score, data, checkpoints, writer)

    # Plots are drawn when training is done; matplotlib is not needed before.
    from transformer import plots

    plots.learning_curve(read_metrics(workdir.metrics), workdir.plots / "learning_curve.png")
    show_results(run, model, corpus, state, score, data)


def train(run: RunConfig, state: TrainState, train_steps, score, data, checkpoints, writer):
    """Takes steps until `run.steps`; evaluates, saves and logs where they are due.

    Metrics at step i describe the parameters after i updates. A save comes with an
    evaluation, so that the best checkpoint can be told.
    """
    step = int(state.step)
    sums, seconds = zero_sums(), 0.0
    with TrainingBar(step, run.steps) as bar:
        while step < run.steps:
            started = time.perf_counter()
            stop = min(
                run.steps,
                step + run.steps_per_call,
                *(
                    (step // every + 1) * every
                    for every in (run.log_every, run.eval_every, run.save_every)
                ),
            )
            state, sums = train_steps(state, sums, data["train"], jnp.int32(stop - step))
            jax.block_until_ready(sums)
            step, seconds = stop, seconds + time.perf_counter() - started
            last = step == run.steps
            if step % run.log_every == 0 or last:
                metrics = train_metrics(sums, seconds)
                bar.update(step, metrics)
                writer.write(step, metrics)
                sums, seconds = zero_sums(), 0.0
            saves = step % run.save_every == 0 or last
            if step % run.eval_every == 0 or saves:
                metrics = score(state.params, data["validation"]).metrics("validation")
                writer.write(step, metrics)
                bar.validated(step, metrics)
                if saves:
                    checkpoints.save(state, metrics)
    return state


def show_results(
    run: RunConfig,
    model: Model,
    corpus: Corpus,
    state: TrainState,
    score,
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
                figure(metrics[f"{name}/perplexity"]),
                percent(metrics[f"{name}/token_accuracy"]),
                percent(metrics[f"{name}/sequence_accuracy"]),
            )
        )
    columns = ("split", "loss (nats a token)", "perplexity", "tokens right", "sequences right")
    table(f"after {run.steps:,} steps", columns, rows)

    samples = data["validation"].head(3)
    length = run.model.reach(samples.source.shape[1] + run.decode_margin)
    decoded = jax.jit(partial(evaluation.decode, model, length=length))(state.params, samples)
    text = corpus.tokenizer.decode
    rows = zip(
        *(map(text, each.tolist()) for each in (samples.source, samples.target, decoded)),
        strict=True,
    )
    table("samples", ("source", "target", "output"), list(rows))


if __name__ == "__main__":
    cli.run(main)
