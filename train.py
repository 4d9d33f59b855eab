"""Trains a model, or goes on with one that was interrupted.

Usage:
    python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
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
from transformer.health import NonfiniteError, Watchman, dump_batch, find_operation
from transformer.interruption import Interrupted, StopRequests
from transformer.metrics import (
    MetricsWriter,
    by_replica,
    mean_over,
    read_metrics,
    train_metrics,
)
from transformer.model import Model
from transformer.training import (
    Sums,
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
PROFILE = flags.DEFINE_integer(
    "profile", 0, "Write a trace of so many steps before training.", lower_bound=0
)
cli.define_host_flags()
flags.mark_flag_as_required("config")


def main() -> None:
    """Reads the flags and runs."""
    cli.set_up_jax(RunConfig.resolve(CONFIG.value))
    cli.join_hosts(interruptible=True)
    flag = flags.FLAGS["config"]
    file = Path(config_flags.get_config_filename(flag))
    overrides = config_flags.get_override_values(flag)
    facts({"config": " ".join([str(file), *(f"{k}={v}" for k, v in overrides.items())])})
    workdir = Workdir(WORKDIR.value or f"runs/{file.stem}")
    run(
        CONFIG.value,
        workdir,
        DATA_DIR.value,
        allow_changes=ALLOW_CHANGES.value,
        profile=PROFILE.value,
    )


def run(
    config: ConfigDict,
    workdir: Workdir,
    data_dir: str | None,
    *,
    allow_changes: bool = False,
    profile: int = 0,
) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the run's.
      workdir: where it is kept.
      data_dir: where TFDS keeps datasets; None: its own place.
      allow_changes: whether the checkpoint may be of another config.
      profile: steps to write a trace of before training; 0: none.
    """
    cfg = RunConfig.resolve(config)
    workdir.claim(config, allow_changes=allow_changes)
    mesh, corpus, examples, data, model, like = prepare(cfg, data_dir)
    data = sharding.place(data, sharding.replicated(mesh))
    recipe, numbers = cfg.recipe(), cfg.numbers()
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    facts(
        {
            "data": f"{corpus.builder.info.full_name}, {examples:,} training examples"
            + (f" in {len(data['train']):,} rows" if cfg.data.pack else ""),
            "devices": sharding.describe(mesh),
            "parameters": f"{model.count_parameters():,}"
            + (f", times {cfg.replicas} replicas" if cfg.replicas > 1 else ""),
            **(
                {"attention": f"{model.config.backend_at(data['train'].longest())}, as auto picked"}
                if cfg.model.attention_backend == "auto"
                else {}
            ),
            "workdir": str(workdir.path),
        }
    )

    with (
        workdir.locked(),
        StopRequests() as requests,
        jax.set_mesh(mesh),
        Checkpoints(workdir.checkpoints, cfg.keep_checkpoints) as checkpoints,
    ):
        step = checkpoints.latest()
        begun: dict[str, Any] = {}
        if step is None:
            init = each_replica(partial(init_state, model, recipe), cfg.replicas, in_axes=(0, 0))
            state = jax.jit(init, out_shardings=where)(cfg.seeds(), numbers)
        else:
            state, begun = checkpoints.restore(step, like), checkpoints.interval(step)
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
        flops = costs.step_flops(model, recipe, data["train"])
        flop_share = costs.share_of_peak(flops * cfg.replicas, mesh)
        train_steps = make_train_steps(make_train_step(model, recipe))
        train_steps = jax.jit(
            each_replica(train_steps, cfg.replicas, in_axes=(0, 0, None, None)),
            donate_argnums=0,
            out_shardings=(where, sharding.replicated(mesh)),
        )
        score = partial(evaluation.score, model)
        score = jax.jit(
            each_replica(score, cfg.replicas, in_axes=(0, None)),
            out_shardings=sharding.replicated(mesh),
        )
        with MetricsWriter(workdir.path, step or 0, cfg.replicas) as writer:
            if profile:
                state = write_profile(profile, state, train_steps, data["train"], workdir, cfg)
            try:
                state = train(
                    cfg,
                    state,
                    begun,
                    train_steps,
                    score,
                    data,
                    checkpoints,
                    writer,
                    requests,
                    flop_share,
                )
            except NonfiniteError as failure:
                raise UserError(explain(failure, model, cfg, data["train"], workdir)) from failure

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
                "flops_per_step": flops,
                "replicas": results,
            }
        )
        show_results(cfg, results)
        show_samples(cfg, model, corpus, state, data["validation"].head(3))
    return state


class Prepared(NamedTuple):
    """What a run is made of, before there is any array on a device.

    examples: of training.
    data: split → its rows.
    like: the state's shapes and shardings.
    """

    mesh: Mesh
    corpus: Corpus
    examples: int
    data: dict[str, Dataset]
    model: Model
    like: TrainState


def prepare(cfg: RunConfig, data_dir: str | None) -> Prepared:
    """Finds what can be wrong with a config and its data, before anything is compiled.

    Raises:
      UserError: something is.
    """
    mesh = sharding.make_mesh(cfg.mesh, cfg.replicas)
    sharding.check_batch(mesh, cfg.batch_size, cfg.accumulate)
    corpus = open_corpus(cfg.data, data_dir)
    splits = {"train": cfg.data.train, "validation": cfg.data.validation, "test": cfg.data.test}
    data = {name: corpus.load(split, cfg.batch_size) for name, split in splits.items()}
    for name, dataset in data.items():
        cfg.model.check_length(dataset.longest(), f"the longest example of data.{name}")
    examples = len(data["train"])
    if cfg.data.pack:
        data["train"] = pack(data["train"], cfg.data.pack)
    model = Model(cfg.model, corpus.tokenizer.vocab_size)
    like = abstract_state(model, cfg.recipe(), mesh, cfg.replicas, cfg.numbers())
    return Prepared(mesh, corpus, examples, data, model, like)


def train(
    cfg: RunConfig,
    state: TrainState,
    begun: dict[str, Any],
    train_steps: Callable,
    score: Callable,
    data: dict[str, Dataset],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    requests: StopRequests,
    flop_share: float | None,
) -> TrainState:
    """Takes steps until `cfg.steps`; evaluates, saves and logs where they are due.

    Validation at step i describes the parameters after i updates; train metrics are those
    of the interval that ends there. A save comes with an evaluation, so that the best
    checkpoint can be told. `flop_share` is what a step a second is of the devices' peak, and
    `begun` what an interrupted run had of the interval in which it stopped.

    Raises:
      Interrupted: somebody asked for it; the state is saved.
      NonfiniteError: more steps than may be left out had a NaN or Inf.
    """
    place = partial(sharding.place, where=sharding.replicated(jax.sharding.get_mesh()))
    nothing = jax.device_get(zero_sums(cfg.replicas))
    of_interval = {name: np.float32(total) for name, total in begun.get("sums", nothing).items()}
    step, sums = state.taken(), place(of_interval)
    started = time.perf_counter()
    # Compiles, and takes no step.
    state, sums = train_steps(state, sums, data["train"], place(np.array(0, np.int32)))
    facts({"compiled": f"in {time.perf_counter() - started:.1f} s"})
    watch, unread = Stopwatch(begun.get("seconds", 0.0)), None
    watchman, saved = Watchman(state, cfg.max_skipped_steps), step
    with TrainingBar(step, cfg.steps) as bar:

        def read(step: int, sums: Sums) -> None:
            """Waits for the end of an interval, and logs it."""
            each = by_replica(jax.block_until_ready(sums), cfg.replicas)
            seconds = watch.lap()
            metrics = [train_metrics(one, seconds, flop_share) for one in each]
            bar.update(step, metrics)
            writer.write(step, metrics)
            watchman.look(step, each, metrics, state)

        while step < cfg.steps:
            if requests.stop():
                if unread is not None:
                    read(*unread)
                if step > saved:
                    with watch.paused(sums):
                        totals = hosts.fetch(sums)
                        watchman.look_for_stopped(by_replica(totals, cfg.replicas), state)
                        totals = jax.tree.map(np.ndarray.tolist, totals)
                        checkpoints.save(state, {}, {"seconds": watch.seconds, "sums": totals})
                raise Interrupted(
                    f"stopped at step {step:,} of {cfg.steps:,}, and saved; "
                    "the same command goes on from there"
                )
            before, stop = sums, next_stop(step, cfg)
            n = place(np.array(stop - step, np.int32))
            with jax.transfer_guard("disallow"):  # nothing else goes to the device or back
                state, sums = train_steps(state, sums, data["train"], n)
            jax.block_until_ready(before)  # no more than one dispatch waits for another
            step = stop
            if unread is not None:  # only now: the device is at work on the next interval
                read(*unread)
                unread = None
            saves = step % cfg.save_every == 0 or step == cfg.steps
            # At saves too: a resumed run then logs the very intervals of one left alone.
            if step % cfg.log_every == 0 or saves:
                unread, sums = (step, sums), place(nothing)
            if step % cfg.eval_every == 0 or saves:
                if unread is not None:
                    read(*unread)
                    unread = None
                with watch.paused(sums):
                    scores = score(state.variables(), data["validation"])
                    each = by_replica(scores, cfg.replicas)
                    metrics = [one.metrics("validation") for one in each]
                    metrics = watchman.without_stopped(metrics)
                    bar.validated(step, metrics)
                    writer.write(step, metrics)
                    if saves:
                        sound = [one for k, one in enumerate(metrics) if k not in watchman.stopped]
                        checkpoints.save(state, mean_over(sound))
                        saved = step
    return state


def write_profile(
    steps: int,
    state: TrainState,
    train_steps: Callable,
    data: Dataset,
    workdir: Workdir,
    cfg: RunConfig,
) -> TrainState:
    """Writes a trace of `steps` steps for TensorBoard or xprof, taken for nothing else."""
    copy = jax.tree.map(jnp.copy, state)  # the steps take their argument's place
    sums, n = zero_sums(cfg.replicas), jnp.int32(steps)
    copy, sums = jax.block_until_ready(train_steps(copy, sums, data, jnp.int32(0)))
    with jax.profiler.trace(str(workdir.path / "profile")):
        jax.block_until_ready(train_steps(copy, sums, data, n))
    facts({"profile": f"{steps} steps in {workdir.path / 'profile'}"})
    return state


def explain(
    failure: NonfiniteError, model: Model, cfg: RunConfig, data: Dataset, workdir: Workdir
) -> str:
    """One line on a run that stopped for a NaN or Inf: where, what was in the batch, what to do."""
    step, state = failure.step, failure.state
    file = dump_batch(workdir.path / f"batch_of_step_{step}.npz", state, data, step)
    if cfg.debug_nans:
        operation = find_operation(model, cfg.recipe(), state, data, step)
        remedy = f"it comes from {operation}"
    else:
        remedy = "--config.debug_nans=true says which operation made it"
    return (
        f"the loss or a gradient of step {step:,} is NaN or Inf; its batch is in {file}; {remedy}; "
        "lower optimizer.learning_rate, or let --config.max_skipped_steps=N leave such steps out"
    )


class Stopwatch:
    """Seconds of training alone, after those that an interval already has."""

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last lap."""
        now = time.perf_counter()
        seconds = self.seconds + now - self.started
        self.seconds, self.started = 0.0, now
        return seconds

    @contextlib.contextmanager
    def paused(self, sums: Sums) -> Iterator[None]:
        """Leaves out what is done inside; what leads to `sums` belongs to what came before."""
        jax.block_until_ready(sums)
        self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()


def next_stop(step: int, cfg: RunConfig) -> int:
    """The step at which the next dispatch ends: no later than the next thing that is due."""
    due = ((step // every + 1) * every for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
    return min(cfg.steps, step + cfg.steps_per_call, *due)


def evaluate(
    cfg: RunConfig, state: TrainState, score: Callable, data: dict[str, Dataset]
) -> list[dict[str, Any]]:
    """Each replica's seed and final metrics on the validation and test splits."""
    watchman = Watchman(state, cfg.max_skipped_steps)
    results: list[dict[str, Any]] = [{"seed": int(seed)} for seed in np.atleast_1d(cfg.seeds())]
    for name in ("validation", "test"):
        scores = by_replica(score(state.variables(), data[name]), cfg.replicas)
        metrics = watchman.without_stopped([one.metrics(name) for one in scores])
        for result, one in zip(results, metrics, strict=True):
            result |= one
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
    decode = partial(evaluation.decode, model, length=length)
    decode = jax.jit(decode, compiler_options=evaluation.compiler_options())
    decoded = hosts.fetch(decode(variables, samples))
    text = corpus.tokenizer.decode
    rows = zip(
        *(map(text, each.tolist()) for each in (samples.source, samples.target, decoded)),
        strict=True,
    )
    table("samples", ("source", "target", "output"), list(rows))


if __name__ == "__main__":
    cli.run(main)
