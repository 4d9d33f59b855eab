"""The steps of `Run.train`: claim the folder, restore or initialise, train, write the results."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from transformer.config import RunConfig, continued
from transformer.console import facts
from transformer.errors import UserError
from transformer.parallel import hosts
from transformer.parallel.devices import describe_mesh
from transformer.parallel.mesh import place
from transformer.training import costs
from transformer.training.checkpoint import Checkpoints
from transformer.training.health import HealthMonitor, NonfiniteError, explain_failure
from transformer.training.interruption import StopRequests
from transformer.training.loop import Intervals, TrainingLoop, write_profile
from transformer.training.metrics import MetricsWriter, read_metrics
from transformer.training.resume import check_same_run, check_stopped, report_jump
from transformer.training.step import TrainState
from transformer.workdir import write_json

if TYPE_CHECKING:
    from transformer.run import Run


def train(run: "Run", *, allow_changes: bool, profile: int, exits: bool) -> list[dict[str, Any]]:
    """See `Run.train`."""
    with StopRequests(exits) as requests:
        run.state = None  # until the last step: `Run.evaluate` then restores the latest
        claim(run, allow_changes)
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
            run.state = run_loop(run, state, interval, checkpoints, requests, profile)
            return finish(run, run.state)


def claim(run: "Run", allow_changes: bool) -> None:
    """Claims the folder; a run in it keeps the old behaviour of knobs added since it started."""
    config = ConfigDict(asdict(run.config))
    run.allow_changes = allow_changes
    run.workdir.claim(config, allow_changes=allow_changes)
    if run.is_trained:
        saved = run.workdir.read_record()["config"]
        run.config = RunConfig.from_config_dict(continued(config, saved))


def describe(run: "Run") -> dict[str, str]:
    """Describes data, devices and model, for `console.facts`."""
    config, corpus, (examples, excluded) = run.config, run.corpus, run.examples
    unknown = corpus.unknown(config.data.train, config.data.validation, config.data.test)
    left_out = "; ".join(filter(None, (corpus.left_out(), excluded)))
    backend = run.model.config.backend_at(max(run.rows.widths))
    found = {
        "data": f"{corpus.dataset.name}, {len(examples):,} training examples"
        + (f" in {len(run.rows):,} rows" if config.data.pack_length else "")
        + "".join(f", {len(data):,} of {name}" for name, data in run.data.items()),
        "left out": left_out,
        "unknown": unknown,
        "devices": describe_mesh(run.mesh),
        "parameters": f"{run.model.count_parameters():,}"
        + (f", times {config.replicas} replicas" if config.replicas > 1 else ""),
        "attention": f"{backend}, as auto picked"
        if config.model.attention_backend == "auto"
        else "",
        "best": f"by validation/{config.best_metric}",
        "workdir": str(run.workdir.path),
    }
    return {name: value for name, value in found.items() if value}


def start(run: "Run", checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to train from, and the sums of an interrupted interval.

    Raises:
      UserError: the newest checkpoint is another run's, or damaged.
    """
    step, config = checkpoints.latest(), run.config
    if step is None:
        return run.init(config.seeds(), config.hparams()), {}
    state = checkpoints.restore(step, run.abstract_state)
    check_same_run(state, config.seeds(), config.steps, run.workdir.path)
    old = RunConfig.from_config_dict(run.workdir.read_config())
    check_stopped(state, old.max_skipped_steps, config.max_skipped_steps)
    report_jump(state, *([one.step_config() for one in c.single_runs()] for c in (old, config)))
    facts({"resuming": f"at step {step:,} of {config.steps:,}"})
    # From the config, not from the checkpoint: --allow_changes may have changed them.
    where = {name: leaf.sharding for name, leaf in run.abstract_state.hparams.items()}
    return state._replace(hparams=place(config.hparams(), where)), checkpoints.interval(step)


def run_loop(
    run: "Run",
    state: TrainState,
    interval: Mapping[str, Any],
    checkpoints: Checkpoints,
    requests: StopRequests,
    profile: int,
) -> TrainState:
    """Trains to the last step and returns the final state, which is saved.

    Raises:
      UserError: the loss or a gradient became NaN or Inf.
      Interrupted: on request.
    """
    config = run.config
    with MetricsWriter(run.workdir.path, state.taken(), config.replicas) as writer:
        if profile:
            folder = run.workdir.path / "profile"
            write_profile(run.train_steps, state, run.zero_sums(), run.feed, profile, folder)
        try:
            loop = TrainingLoop(
                Intervals(config.steps, config.log_every, config.eval_every, config.save_every),
                state,
                interval,
                train_steps=run.train_steps,
                zero_sums=run.zero_sums(),
                validate=partial(run.evaluate_replicas, "validation"),
                data=run.feed,
                monitor=HealthMonitor(state, config.max_skipped_steps),
                checkpoints=checkpoints,
                writer=writer,
                requests=requests,
                peak_share=costs.share_of_peak(run.step_flops * config.replicas, run.mesh),
            )
            state = loop.run()
            checkpoints.wait()
            requests.all_is_saved(config.steps)
        except NonfiniteError as failure:
            step_config = config.step_config() if config.debug_nans else None
            explained = explain_failure(failure, run.feed, run.workdir.path, run.model, step_config)
            raise UserError(explained) from failure
    return state


def finish(run: "Run", state: TrainState) -> list[dict[str, Any]]:
    """Plots the learning curve, evaluates the last state, writes and returns the results."""
    if hosts.first():
        from transformer.inference import plots  # imports matplotlib

        curve = run.workdir.plots / "learning_curve.png"
        plots.learning_curve(read_metrics(run.workdir.metrics), curve)
    results: list[dict[str, Any]] = [
        {"seed": int(seed)} for seed in np.atleast_1d(run.config.seeds())
    ]
    for split in run.data:
        for result, metrics in zip(results, run.evaluate_replicas(split, state), strict=True):
            result |= metrics
    record = {
        "step": run.config.steps,
        "devices": describe_mesh(run.mesh),
        "parameters": run.model.count_parameters(),
        "flops_per_step": run.step_flops,
        "replicas": results,
    }
    write_json(run.workdir.results, record)
    return results
