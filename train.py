"""Trains a model, or goes on with one that was interrupted.

Usage:
    python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from transformer import cli, costs, evaluation, hosts, sharding
from transformer.checkpoint import Checkpoints
from transformer.config import RunConfig
from transformer.console import (
    TrainingBar,
    facts,
    figure,
    percent,
    perplexity,
    table,
)
from transformer.data.batches import Dataset, pack
from transformer.data.load import Corpus, open_corpus
from transformer.errors import UserError
from transformer.metrics import (
    MetricsWriter,
    by_replica,
    mean_over,
    read_metrics,
    train_metrics,
)
from transformer.model import Model
from transformer.training import (
    TrainState,
    abstract_state,
    each_replica,
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
cli.define_host_flags()
flags.mark_flag_as_required("config")


def main() -> None:
    """Reads the flags and runs."""
    cli.set_up_jax(CONFIG.value.replicas, CONFIG.value.batch_size)
    cli.join_hosts()
    flag = flags.FLAGS["config"]
    file = Path(config_flags.get_config_filename(flag))
    overrides = config_flags.get_override_values(flag)
    facts({"config": " ".join([str(file), *(f"{k}={v}" for k, v in overrides.items())])})
    workdir = Workdir(WORKDIR.value or f"runs/{file.stem}")
    run(CONFIG.value, workdir, DATA_DIR.value, allow_changes=ALLOW_CHANGES.value)


def run(
    config: ConfigDict, workdir: Workdir, data_dir: str | None, *, allow_changes: bool = False
) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one."""
    cfg = RunConfig.resolve(config)
    mesh = sharding.make_mesh(cfg.mesh, cfg.replicas)
    sharding.check_batch(mesh, cfg.batch_size)
    workdir.claim(config, allow_changes=allow_changes)

    # Data, all of it on each device.
    corpus = open_corpus(cfg.data, data_dir)
    splits = {"train": cfg.data.train, "validation": cfg.data.validation, "test": cfg.data.test}
    data = {name: corpus.load(split, cfg.batch_size) for name, split in splits.items()}
    for name, dataset in data.items():
        cfg.model.check_length(dataset.longest(), f"the longest example of data.{name}")
    examples = len(data["train"])
    if cfg.data.pack:
        data["train"] = pack(data["train"], cfg.data.pack)
    data = sharding.place(data, sharding.replicated(mesh))

    # Model and optimizer: structure and shapes, no arrays yet.
    model = Model(cfg.model, corpus.tokenizer.vocab_size)
    recipe, numbers = cfg.recipe(), cfg.numbers()
    like = abstract_state(model, recipe, mesh, cfg.replicas, numbers)
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    facts(
        {
            "data": f"{corpus.builder.info.full_name}, {examples:,} training examples"
            + (f" in {len(data['train']):,} rows" if cfg.data.pack else ""),
            "devices": sharding.describe(mesh),
            "parameters": f"{model.count_parameters():,}"
            + (f", times {cfg.replicas} replicas" if cfg.replicas > 1 else ""),
            "workdir": str(workdir.path),
        }
    )

    with jax.set_mesh(mesh), Checkpoints(workdir.checkpoints, cfg.keep_checkpoints) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            init = each_replica(partial(init_state, model, recipe), cfg.replicas, in_axes=(0, 0))
            state = jax.jit(init, out_shardings=where)(cfg.seeds(), numbers)
        else:
            state = checkpoints.restore(step, like)
            seed, seeds = hosts.fetch(state.seed).tolist(), cfg.seeds().tolist()
            if seed != seeds or step > cfg.steps:
                raise UserError(
                    f"the checkpoint in {workdir.path} has seed {seed} and step {step}, "
                    f"the config seed={seeds} and steps={cfg.steps}: another run; "
                    "choose another --workdir"
                )
            # Not the checkpoint's: --allow_changes may have brought others.
            state = state._replace(numbers=sharding.place(numbers, where.numbers))
            facts({"resuming": f"at step {step:,} of {cfg.steps:,}"})
        workdir.write_config(config)  # only now: nothing stands in the way of training
        train_steps = make_train_steps(make_train_step(model, recipe))
        train_steps = jax.jit(
            each_replica(train_steps, cfg.replicas, in_axes=(0, 0, None, None)),
            donate_argnums=(0, 1),
            out_shardings=(where, sharding.replicated(mesh)),
        )
        score = partial(evaluation.score, model)
        score = jax.jit(
            each_replica(score, cfg.replicas, in_axes=(0, None)),
            out_shardings=sharding.replicated(mesh),
        )
        with MetricsWriter(workdir.path, step or 0, cfg.replicas) as writer:
            state = train(cfg, state, train_steps, score, data, checkpoints, writer)

        if hosts.first():
            from transformer import plots  # matplotlib is not needed before

            curve = workdir.plots / "learning_curve.png"
            plots.learning_curve(read_metrics(workdir.metrics), curve)
        results = evaluate(cfg, state, score, data)
        workdir.write_results(
            {
                "step": cfg.steps,
                "devices": sharding.describe(mesh),
                "parameters": model.count_parameters(),
                "flops_per_step": costs.step_flops(model, recipe, data["train"]),
                "replicas": results,
            }
        )
        show_results(cfg, results)
        show_samples(cfg, model, corpus, state, data["validation"].head(3))
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
    step, sums, seconds = state.taken(), zero_sums(cfg.replicas), 0.0
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
                each = by_replica(sums, cfg.replicas)
                metrics = [train_metrics(one, seconds) for one in each]
                bar.update(step, metrics)
                writer.write(step, metrics)
                sums, seconds = zero_sums(cfg.replicas), 0.0
            if step % cfg.eval_every == 0 or saves:
                scores = score(state.variables(), data["validation"])
                metrics = [one.metrics("validation") for one in by_replica(scores, cfg.replicas)]
                bar.validated(step, metrics)
                writer.write(step, metrics)
                if saves:
                    checkpoints.save(state, mean_over(metrics))
    return state


def next_stop(step: int, cfg: RunConfig) -> int:
    """The step at which the next dispatch ends: no later than the next thing that is due."""
    due = ((step // every + 1) * every for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
    return min(cfg.steps, step + cfg.steps_per_call, *due)


def evaluate(
    cfg: RunConfig, state: TrainState, score: Callable, data: dict[str, Dataset]
) -> list[dict[str, Any]]:
    """Each replica's seed and final metrics on the validation and test splits."""
    results: list[dict[str, Any]] = [{"seed": int(seed)} for seed in np.atleast_1d(cfg.seeds())]
    for name in ("validation", "test"):
        scores = by_replica(score(state.variables(), data[name]), cfg.replicas)
        for result, one in zip(results, scores, strict=True):
            result |= one.metrics(name)
    return results


def show_results(cfg: RunConfig, results: list[dict[str, Any]]) -> None:
    """Prints the final metrics."""
    over = {"": np.mean} if len(results) == 1 else {"mean": np.mean, "min": np.min, "max": np.max}
    rows = []
    for split, (word, summary) in itertools.product(("validation", "test"), over.items()):

        def over_all(metric, split=split, summary=summary):
            return float(summary([result[f"{split}/{metric}"] for result in results]))

        rows.append(
            (
                f"{split} {word}".strip(),
                figure(over_all("loss")),
                perplexity(over_all("perplexity")),
                percent(over_all("token_accuracy")),
                percent(over_all("sequence_accuracy")),
            )
        )
    columns = ("split", "loss", "perplexity", "tokens right", "sequences right")
    table(f"after {cfg.steps:,} steps", columns, rows)


def show_samples(
    cfg: RunConfig, model: Model, corpus: Corpus, state: TrainState, samples: Dataset
) -> None:
    """Prints what the model, or the first replica, makes of a few sources."""
    length = cfg.model.reach(samples.source.shape[1] + cfg.decode_margin)
    variables = by_replica(state.variables(), cfg.replicas)[0]
    decode = jax.jit(partial(evaluation.decode, model, length=length))
    decoded = hosts.fetch(decode(variables, samples))
    text = corpus.tokenizer.decode
    rows = zip(
        *(map(text, each.tolist()) for each in (samples.source, samples.target, decoded)),
        strict=True,
    )
    table("samples", ("source", "target", "output"), list(rows))


if __name__ == "__main__":
    cli.run(main)
