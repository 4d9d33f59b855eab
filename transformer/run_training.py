"""The steps of `Run.train`: claim the folder, restore or initialise, train, write the results."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from transformer.config import RunConfig, continued
from transformer.console import console, facts
from transformer.errors import UserError
from transformer.init_from import initial_state
from transformer.metrics import figure
from transformer.parallel import hosts
from transformer.parallel.mesh import describe_mesh, place
from transformer.parallel.replicas import is_stopped
from transformer.training.checkpoint import Checkpoints
from transformer.training.health import NonfiniteError, explain_failure
from transformer.training.interruption import StopRequests
from transformer.training.loop import TrainingLoop
from transformer.training.metrics import MetricsWriter, read_metrics
from transformer.training.optimizer import make_schedule
from transformer.training.step import TrainState, frozen_names
from transformer.workdir import write_json

if TYPE_CHECKING:
    from transformer.run import Run

MANY_PASSES = 200  # over the training data, above which `train.py` suggests fewer


def train(run: "Run", *, allow_changes: bool, profile: int, exits: bool) -> list[dict[str, Any]]:
    """See `Run.train`."""
    with StopRequests(exits) as requests:
        run.state = None  # until the last step: `Run.evaluate` then restores the latest
        run.allow_changes = allow_changes
        config = ConfigDict(asdict(run.config))
        run.workdir.claim(config, allow_changes=allow_changes)
        if run.is_trained:  # keeps the old behaviour of knobs added since it started
            saved = run.workdir.read_record()["config"]
            run.config = RunConfig.from_config_dict(continued(config, saved))
        run.check()
        facts(describe(run))
        directory, keep = run.workdir.checkpoints, run.config.keep_checkpoints
        with (
            run.workdir.locked(),
            jax.set_mesh(run.mesh),
            Checkpoints(directory, keep, run.config.best_metric) as checkpoints,
        ):
            run.trace()
            state, interval = start(run, checkpoints)
            # Written only after every check has passed.
            hosts.once(partial(run.corpus.tokenizers.save, run.workdir.tokenizers))
            run.workdir.write_config(ConfigDict(asdict(run.config)), run.corpus.identity())
            # Of fewer steps, if the run continues.
            hosts.once(partial(run.workdir.results.unlink, missing_ok=True))
            with MetricsWriter(run.workdir.path, state.taken(), run.config.replicas) as writer:
                if profile:
                    write_profile(run, state, profile)
                try:
                    loop = TrainingLoop(run, state, interval, checkpoints, writer, requests)
                    run.state = loop.train()
                    checkpoints.wait()
                    requests.all_is_saved(run.state.taken())
                except NonfiniteError as failure:
                    raise UserError(explain_failure(run, failure.state)) from failure
            return finish(run)


def describe(run: "Run") -> dict[str, str]:
    """Describes data, devices and model, for `console.facts`."""
    config, corpus, (examples, excluded) = run.config, run.corpus, run.examples
    rows = f" in {len(run.rows):,} rows" if config.data.pack_length else ""
    others = "".join(f", {len(data):,} of {name}" for name, data in run.data.items())
    replicas = f", times {config.replicas} replicas" if config.replicas > 1 else ""
    count, trained = run.model.count_parameters, ""
    if config.freeze:
        trained = f", of which {count(frozen_names(run.model, config)):,} trained"
    backend = run.model.config.auto_backend(max(run.rows.widths))
    is_auto = config.model.attention_backend == "auto"
    return {
        "data": f"{corpus.dataset.name}, {len(examples):,} training examples{rows}{others}",
        "left out": "; ".join(filter(None, (corpus.left_out(), excluded))),
        "unknown": corpus.unknown(config.data.train, config.data.validation, config.data.test),
        "passes": describe_passes(run),
        "devices": describe_mesh(run.mesh),
        "parameters": f"{count():,}{trained}{replicas}",
        "attention": f"{backend}, as auto picked" if is_auto else "",
        "best": f"by validation/{config.best_metric}",
        "workdir": str(run.workdir.path),
    }


def describe_passes(run: "Run") -> str:
    """Says how often training reads each example, and suggests sizes if that is absurd."""
    config, rows, examples = run.config, len(run.rows), len(run.examples[0])
    passes = config.steps * config.batch_size / rows
    said = f"{figure(passes)} over {examples:,} examples"
    if passes <= MANY_PASSES:
        return said
    steps = int(float(f"{max(1, MANY_PASSES / 4 * rows / config.batch_size):.2g}"))
    said += f": more than {MANY_PASSES} seldom help; consider steps={steps} or patience"
    tokens = sum(len(side.values) for side in run.corpus.tokens(config.data.train))
    if config.data.dataset == "files" and run.model.count_parameters() > 10 * tokens:
        said += f", and, for {tokens:,} tokens, a smaller model: configs/translate_small.py"
    return said


def start(run: "Run", checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to train from, and the sums of an interrupted interval."""
    step, config = max(checkpoints.steps(), default=None), run.config
    if step is None:
        return initial_state(run), {}
    state = checkpoints.restore(step, run.abstract_state)
    seeds, saved_seeds = config.seeds().tolist(), hosts.fetch(state.seed).tolist()
    folder = run.workdir.path
    if seeds != saved_seeds or step > config.steps:
        found = f"seed {saved_seeds} and step {step:,}"
        asked = f"seed={seeds} and steps={config.steps}, which cannot resume from it"
        raise UserError(f"{folder} has {found}, the config {asked}; choose another --workdir")
    old = RunConfig.from_config_dict(run.workdir.read_config())
    check_changes(state, old, config, str(folder))
    if config.replicas == 1 and config.patience != old.patience:  # goes on
        state = state._replace(ended=place(np.array(0, np.int32), state.ended.sharding))
    at = f"at step {step:,} of {config.steps:,}"
    stopped = is_stopped(state.skipped, config.max_skipped_steps)
    if not (stopped | np.atleast_1d(hosts.fetch(state.ended) > 0)).all():
        facts({"resuming": at})
    elif config.steps > old.steps:
        raise UserError(
            f"{folder} stopped early {at} (patience={config.patience}), and takes no more steps; "
            f"raise patience with --allow_changes, or start another run with init_from={folder}"
        )
    else:
        facts({"finished": f"stopped early {at} (patience={config.patience})"})
    # From the config, not from the checkpoint: --allow_changes may have changed them.
    where = {name: leaf.sharding for name, leaf in run.abstract_state.hparams.items()}
    return state._replace(hparams=place(config.hparams(), where)), checkpoints.interval(step)


def check_changes(state: TrainState, old: RunConfig, new: RunConfig, folder: str) -> None:
    """Refuses to resume a replica that has stopped; says where the learning rate jumps."""
    counts = state.step, state.skipped, state.ended
    step, skipped, ended = (np.atleast_1d(hosts.fetch(each)) for each in counts)
    limits = old.max_skipped_steps, new.max_skipped_steps
    for k, configs in enumerate(zip(old.single_runs(), new.single_runs(), strict=True)):
        if limits[0] < skipped[k] <= limits[1]:
            raise UserError(
                f"max_skipped_steps={limits[1]}: replica {k} stopped when it was {limits[0]}, and "
                f"has missed steps since; leave it at {limits[0]}, or choose another --workdir"
            )
        if len(step) > 1 and ended[k] and new.patience != old.patience:
            raise UserError(
                f"patience={new.patience}: replica {k} stopped early when it was {old.patience}, "
                "and has missed steps since; leave it, or choose another --workdir"
            )
        done = jnp.int32(step[k] - skipped[k])
        before, now = (
            float(make_schedule(c.optimizer.schedule, c.steps, c.optimizer)(done)) for c in configs
        )
        if abs(now - before) > 0.01 * max(now, before):
            console.print(
                f"the learning rate jumps after {done:,} updates, from {before:.3g} to {now:.3g}, "
                "since the config has changed; with optimizer.schedule=constant or inverse_sqrt it "
                f"does not depend on steps, and a new run with --config.init_from={folder} starts "
                "with a warm-up (a warm restart)" + (f" (replica {k})" if len(step) > 1 else "")
            )


def write_profile(run: "Run", state: TrainState, steps: int) -> None:
    """Writes a trace of `steps` steps for TensorBoard or xprof; `state` stays as it is."""
    folder = run.workdir.path / "profile"
    window = run.feed.empty_window()  # if streamed, rows of padding, which take as long
    copy = jax.tree.map(jnp.copy, state)  # `train_steps` donates its argument
    copy, sums = jax.block_until_ready(run.train_steps(copy, run.zero_sums(), window, jnp.int32(0)))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(run.train_steps(copy, sums, window, jnp.int32(steps)))
    facts({"profile": f"{steps} steps in {folder}"})


def finish(run: "Run") -> list[dict[str, Any]]:
    """Plots the learning curve, evaluates the last state, writes and returns the results."""
    assert run.state is not None
    if hosts.first():
        from transformer.inference import plots  # imports matplotlib

        curve = run.workdir.plots / "learning_curve.png"
        name = run.workdir.path.resolve().name
        plots.learning_curve(read_metrics(run.workdir.metrics), curve, name)
    results: list[Any] = [{"seed": int(seed)} for seed in np.atleast_1d(run.config.seeds())]
    for split in run.data:
        for result, metrics in zip(results, run.evaluate_replicas(split), strict=True):
            result |= metrics
    step, ended = run.state.taken(), np.atleast_1d(hosts.fetch(run.state.ended))
    if len(ended) > 1 and ended.any():
        for result, own in zip(results, ended.tolist(), strict=True):
            result |= {"step": own or step}
    record = {"step": step, "devices": describe_mesh(run.mesh)}
    record |= {"parameters": run.model.count_parameters(), "flops_per_step": run.step_flops}
    write_json(run.workdir.results, record | {"replicas": results})
    return results
