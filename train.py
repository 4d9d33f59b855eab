"""Trains a model, or goes on with one that was interrupted.

Usage:
    python train.py --config=configs/toy_reverse.py [--config.model.norm=rms] [--workdir=runs/NAME]
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from transformer import cli
from transformer.config import RunConfig, continued
from transformer.console import console, facts, table
from transformer.data.batches import Dataset
from transformer.data.load import Corpus, Tokenizers, open_corpus
from transformer.data.rows import Rows, alone, learnable, pack, said
from transformer.data.streaming import Resident, Stream
from transformer.errors import UserError
from transformer.inference import evaluation
from transformer.metrics import figure, finalize, near_one, percent
from transformer.modules.model import Model
from transformer.parallel import hosts
from transformer.parallel.devices import check_memory, describe_mesh
from transformer.parallel.mesh import check_batch, make_mesh, place, replicated
from transformer.training import costs
from transformer.training.checkpoint import Checkpoints
from transformer.training.health import NonfiniteError, Watchman, dump_batch, find_operation
from transformer.training.interruption import StopRequests
from transformer.training.loop import Loop, Programs, make_programs
from transformer.training.metrics import MetricsWriter, by_replica, read_metrics
from transformer.training.step import TrainState, abstract_state, zero_sums
from transformer.training.workdir import Workdir

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
    cli.set_up_jax(RunConfig.from_config_dict(CONFIG.value))
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
        exits=True,
    )


def run(
    config: ConfigDict,
    workdir: Workdir,
    data_dir: str | None,
    *,
    allow_changes: bool = False,
    profile: int = 0,
    exits: bool = False,
) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the run's.
      workdir: where it is kept.
      data_dir: where TFDS keeps datasets; None: its own place.
      allow_changes: whether the checkpoint may be of another config.
      profile: steps to write a trace of before training; 0: none.
      exits: whether a request to stop may end the process, where there is nothing to save.
    """
    with StopRequests(exits) as requests:
        cfg = RunConfig.from_config_dict(config)
        workdir.claim(config, allow_changes=allow_changes)
        if workdir.trained():
            config = continued(config, workdir.known_config())
            cfg = RunConfig.from_config_dict(config)
        prepared = prepare(cfg, data_dir, workdir.tokenizers if workdir.trained() else None)
        identity = prepared.corpus.identity()
        if workdir.trained() and not allow_changes:
            workdir.check_corpus(identity)
        mesh, model = prepared.mesh, prepared.model
        show_facts(cfg, prepared, workdir)
        with (
            workdir.locked(),
            jax.set_mesh(mesh),
            Checkpoints(workdir.checkpoints, cfg.keep_checkpoints, cfg.best_metric) as checkpoints,
        ):
            programs = make_programs(cfg, model, prepared.like)
            feed = make_feed(cfg, prepared)
            trace(programs, cfg, prepared, feed)
            state, begun = begin(cfg, prepared, programs, checkpoints, workdir)
            # Only now: nothing stands in the way of training.
            hosts.once(partial(prepared.corpus.tokenizers.save, workdir.tokenizers))
            workdir.write_config(config, identity)
            flops = costs.step_flops(model, cfg.recipe(), prepared.example(cfg.batch_size))
            with MetricsWriter(workdir.path, state.taken(), cfg.replicas) as writer:
                if profile:
                    write_profile(profile, state, programs, feed, workdir, cfg)
                try:
                    loop = Loop(
                        cfg,
                        programs,
                        feed,
                        prepared.data["validation"],
                        state,
                        begun,
                        checkpoints=checkpoints,
                        writer=writer,
                        requests=requests,
                        flop_share=costs.share_of_peak(flops * cfg.replicas, mesh),
                    )
                    state = loop.run()
                    checkpoints.wait()
                    requests.all_is_saved(cfg.steps)
                except NonfiniteError as failure:
                    raise UserError(explain(failure, model, cfg, feed, workdir)) from failure

            if hosts.first():
                from transformer.inference import plots  # matplotlib is not needed before

                curve = workdir.plots / "learning_curve.png"
                plots.learning_curve(read_metrics(workdir.metrics), curve)
            results = evaluate(cfg, state, programs, prepared.data)
            workdir.write_results(
                {
                    "step": cfg.steps,
                    "devices": describe_mesh(mesh),
                    "parameters": model.count_parameters(),
                    "flops_per_step": flops,
                    "replicas": results,
                }
            )
            show_results(cfg, results)
            samples = prepared.data["validation"].head(3)
            show_samples(cfg, model, prepared.corpus.tokenizers, state, samples)
    return state


class Prepared(NamedTuple):
    """What a run is made of, before there is any array on a device.

    excluded: why examples of training were left out → how many.
    examples: of training.
    rows: of training.
    data: validation and test → their rows.
    like: the state's shapes and shardings.
    """

    mesh: Mesh
    corpus: Corpus
    excluded: dict[str, int]
    examples: int
    rows: Rows
    data: dict[str, Dataset]
    model: Model
    like: TrainState

    def example(self, batch_size: int) -> Dataset:
        """A dataset whose batches have the shapes of the run's."""
        return Dataset(*self.rows.take(np.zeros(1, int)), batch_size, self.rows.packed)


def prepare(cfg: RunConfig, data_dir: str | None, saved: Path | None = None) -> Prepared:
    """Finds what can be wrong with a config and its data, before anything is compiled.

    Args:
      cfg: the run's.
      data_dir: where TFDS keeps datasets.
      saved: where a run that goes on keeps its tokenizers.

    Raises:
      UserError: something is.
    """
    mesh = make_mesh(cfg.mesh, cfg.replicas)
    check_batch(mesh, cfg.batch_size, cfg.accumulation_steps)
    corpus = open_corpus(cfg.data, data_dir, saved)
    pairs = corpus.tokens(cfg.data.train)
    kept, excluded = learnable(pairs, cfg.data.max_length)
    rows = alone(pairs, kept)
    held_out = {"validation": cfg.data.validation, "test": cfg.data.test}
    data = {name: corpus.load(split, cfg.batch_size) for name, split in held_out.items()}
    longest = {"train": max(rows.widths)} | {name: each.longest() for name, each in data.items()}
    for name, length in longest.items():
        cfg.model.check_length(length, f"the longest example of data.{name}")
    if cfg.data.pack_length:
        rows = pack(rows, cfg.data.pack_length)
    model = Model.of(cfg.model, *corpus.tokenizers)
    like = abstract_state(model, cfg.recipe(), mesh, cfg.replicas, cfg.numbers())
    check_memory(like)
    return Prepared(mesh, corpus, excluded, len(kept), rows, data, model, like)


def make_feed(cfg: RunConfig, prepared: Prepared) -> Resident | Stream:
    """What the steps read: rows on the devices, or what worker processes make of them."""
    rows, mesh = prepared.rows, prepared.mesh
    if not cfg.data.num_workers:
        data = Dataset.of(rows, cfg.batch_size)
        return Resident(place(data, replicated(mesh)))
    return Stream(
        rows,
        cfg.batch_size,
        cfg.seeds(),
        steps=cfg.steps,
        workers=cfg.data.num_workers,
        mesh=mesh,
    )


def show_facts(cfg: RunConfig, prepared: Prepared, workdir: Workdir) -> None:
    """Prints what is about to be trained, on what."""
    rows, model = prepared.rows, prepared.model
    splits = cfg.data.train, cfg.data.validation, cfg.data.test
    unknown = prepared.corpus.unknown(*splits)
    left_out = "; ".join(filter(None, (prepared.corpus.left_out(), said(prepared.excluded))))
    facts(
        {
            "data": f"{prepared.corpus.name}, {prepared.examples:,} training examples"
            + (f" in {len(rows):,} rows" if cfg.data.pack_length else "")
            + "".join(f", {len(data):,} of {name}" for name, data in prepared.data.items()),
            **({"left out": left_out} if left_out else {}),
            **({"unknown": unknown} if unknown else {}),
            "devices": describe_mesh(prepared.mesh),
            "parameters": f"{model.count_parameters():,}"
            + (f", times {cfg.replicas} replicas" if cfg.replicas > 1 else ""),
            **(
                {"attention": f"{model.config.backend_at(max(rows.widths))}, as auto picked"}
                if cfg.model.attention_backend == "auto"
                else {}
            ),
            "best": f"by validation/{cfg.best_metric}",
            "workdir": str(workdir.path),
        }
    )


def trace(programs: Programs, cfg: RunConfig, prepared: Prepared, feed: Resident | Stream) -> None:
    """Traces the step, which finds what is wrong with it before anything is compiled.

    Args:
      programs: the run's.
      cfg: the run's.
      prepared: the run's.
      feed: its training data.

    Raises:
      UserError: a choice cannot be computed as it is here, such as an attention backend.
    """
    small = (jax.device_get(zero_sums(cfg.replicas)), np.array(0, np.int32))
    sums, steps = place(small, replicated(prepared.mesh))
    # Each is where it will be: the compiler then takes this trace, and makes none of its own.
    programs.train_steps.trace(prepared.like, sums, feed.blank(), steps)


def begin(
    cfg: RunConfig,
    prepared: Prepared,
    programs: Programs,
    checkpoints: Checkpoints,
    workdir: Workdir,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to train from, new or the newest saved, and what it has of an interval.

    Raises:
      UserError: the newest checkpoint is another run's, or damaged.
    """
    step, numbers = checkpoints.latest(), cfg.numbers()
    if step is None:
        return programs.init(cfg.seeds(), numbers), {}
    state = checkpoints.restore(step, prepared.like)
    seed, seeds = hosts.fetch(state.seed).tolist(), cfg.seeds().tolist()
    if seed != seeds or step > cfg.steps:
        raise UserError(
            f"the checkpoint in {workdir.path} has seed {seed} and step {step}, "
            f"the config seed={seeds} and steps={cfg.steps}: another run; "
            "choose another --workdir"
        )
    check_stopped(cfg, state, workdir)
    say_jump(cfg, state, workdir)
    facts({"resuming": f"at step {step:,} of {cfg.steps:,}"})
    # Not the checkpoint's: --allow_changes may have brought others.
    where = {name: leaf.sharding for name, leaf in prepared.like.numbers.items()}
    return state._replace(numbers=place(numbers, where)), checkpoints.interval(step)


def say_jump(cfg: RunConfig, state: TrainState, workdir: Workdir) -> None:
    """Says so if changes of the config have the learning rate jump, as `steps` of a schedule do."""
    old, updates = RunConfig.from_config_dict(workdir.read_config()), state.step - state.skipped
    for k, done in enumerate(np.atleast_1d(hosts.fetch(updates))):
        before, now = (
            float(recipe.learning_rate(recipe.numbers, jnp.int32(done)))
            for recipe in (
                (each if cfg.replicas == 1 else each.replica(k)).recipe() for each in (old, cfg)
            )
        )
        if abs(now - before) > 0.01 * max(now, before):
            console.print(
                f"the learning rate jumps after {done:,} updates, from {before:.3g} to {now:.3g}, "
                "for the config has changed; with optimizer.schedule=constant or inverse_sqrt it "
                "does not depend on steps" + (f" (replica {k})" if cfg.replicas > 1 else "")
            )


def check_stopped(cfg: RunConfig, state: TrainState, workdir: Workdir) -> None:
    """Raises a UserError if a replica that had stopped for a NaN or Inf would go on.

    It has missed the steps that the others have taken since.
    """
    before = workdir.read_config().max_skipped_steps
    skipped = np.atleast_1d(hosts.fetch(state.skipped))
    revived = np.flatnonzero((skipped > before) & (skipped <= cfg.max_skipped_steps))
    if revived.size:
        raise UserError(
            f"max_skipped_steps={cfg.max_skipped_steps}: replica {revived[0]} stopped when it was "
            f"{before}, and has missed steps since; leave it at {before}, or choose another "
            "--workdir"
        )


def write_profile(
    steps: int,
    state: TrainState,
    programs: Programs,
    feed: Resident | Stream,
    workdir: Workdir,
    cfg: RunConfig,
) -> None:
    """Writes a trace of `steps` steps for TensorBoard or xprof, taken for nothing else."""
    data = feed.blank()  # of a stream rows of padding, which take as long as any
    copy = jax.tree.map(jnp.copy, state)  # the steps take their argument's place
    sums = zero_sums(cfg.replicas)
    copy, sums = jax.block_until_ready(programs.train_steps(copy, sums, data, jnp.int32(0)))
    with jax.profiler.trace(str(workdir.path / "profile")):
        jax.block_until_ready(programs.train_steps(copy, sums, data, jnp.int32(steps)))
    facts({"profile": f"{steps} steps in {workdir.path / 'profile'}"})


def explain(
    failure: NonfiniteError,
    model: Model,
    cfg: RunConfig,
    feed: Resident | Stream,
    workdir: Workdir,
) -> str:
    """One line on a run that stopped for a NaN or Inf: where, what was in the batch, what to do."""
    step, state = failure.step, failure.state
    data = feed.at(step, state.seed)
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


def evaluate(
    cfg: RunConfig, state: TrainState, programs: Programs, data: dict[str, Dataset]
) -> list[dict[str, Any]]:
    """Each replica's seed and final metrics on the validation and test splits."""
    watchman = Watchman(state, cfg.max_skipped_steps)
    results: list[dict[str, Any]] = [{"seed": int(seed)} for seed in np.atleast_1d(cfg.seeds())]
    put = partial(place, where=replicated(jax.sharding.get_mesh()))
    for name in ("validation", "test"):
        scores = evaluation.in_parts(programs.score, state.variables(), data[name], put)
        scores = by_replica(scores, cfg.replicas)
        metrics = [
            finalize(one, name, smoothing)
            for one, smoothing in zip(scores, cfg.smoothings(), strict=True)
        ]
        metrics = watchman.without_stopped(metrics)
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
                near_one(over_all("perplexity")),
                percent(over_all("token_accuracy")),
                percent(over_all("sequence_accuracy")),
            )
        )
    columns = ("split", "loss", "perplexity", "tokens right", "sequences right")
    table(f"after {cfg.steps:,} steps", columns, rows)


def show_samples(
    cfg: RunConfig, model: Model, tokenizers: Tokenizers, state: TrainState, samples: Dataset
) -> None:
    """Prints what the model, or the first replica, makes of a few sources."""
    length = cfg.model.reach(samples.source.shape[1] + cfg.decode_margin)
    variables = by_replica(state.variables(), cfg.replicas)[0]
    decode = partial(evaluation.decode, model, length=length)
    decode = jax.jit(decode, compiler_options=evaluation.compiler_options())
    decoded = hosts.fetch(decode(variables, samples))
    text = tokenizers.target.decode
    rows = zip(
        map(tokenizers.source.decode, samples.source.tolist()),
        *(map(text, each.tolist()) for each in (samples.target, decoded.tokens)),
        strict=True,
    )
    table("samples", ("source", "target", "output"), list(rows))


if __name__ == "__main__":
    cli.run(main)
