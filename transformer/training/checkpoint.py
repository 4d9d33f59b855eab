"""Checkpoints of the train state, written by Orbax while training continues.

Orbax writes a checkpoint into a temporary folder and renames it when it is complete, so that an
interrupted save is never seen. A manifest (`integrity.py`) is added before the renaming. Training
that resumes sets damaged checkpoints aside and continues from the newest intact one.

Several hosts write a checkpoint together, each its own shards, into a shared folder.
"""

import contextlib
import shutil
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from transformer import renamed
from transformer.console import console, quiet
from transformer.errors import UserError
from transformer.metrics import METRICS
from transformer.parallel import hosts
from transformer.training.integrity import (
    DamageError,
    read_manifest,
    read_metrics,
    verify,
    write_manifest,
)
from transformer.training.step import TrainState

DAMAGED = "damaged"  # the subfolder for damaged checkpoints
# Orbax moves a checkpoint here before it deletes it: an interrupted deletion leaves no folder that
# looks like a damaged checkpoint.
TRASH = "trash"
GRACE = 10  # seconds to finish a save when another of several processes may be gone


def merit(metrics: Any, best: str) -> Any:
    """Returns the key by which checkpoints are ranked: the validation metric `best`, then the loss.

    Args:
      metrics: the checkpoint's metrics; empty if it was saved between two evaluations.
      best: one of `METRICS`.
    """
    value = METRICS[best].better * (metrics or {}).get(f"validation/{best}", np.nan)
    return (-np.inf, 0.0) if np.isnan(value) else (value, -metrics["validation/loss"])


@dataclass(frozen=True)
class PreservationPolicy(policy.PreservationPolicy):
    """Keeps the newest checkpoint, and of those with metrics the latest few and the best.

    A checkpoint without metrics was saved because the run was asked to stop; the next save replaces
    it. An interrupted run thus ends with the checkpoints of an uninterrupted one.
    """

    latest: int
    best: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether to keep each checkpoint, in the order of steps."""
        regular = [each for each in checkpoints if each.metrics]
        kept = {each.step for each in (*regular[-self.latest :], *checkpoints[-1:])}
        if regular:
            kept.add(max((merit(each.metrics, self.best), each.step) for each in regular)[1])
        return [each.step in kept for each in checkpoints]


class Manager(ocp.CheckpointManager):
    """A manager that leaves the check for preemption to `interruption.StopRequests`."""

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        return False


class SealingHandler(ocp.StandardCheckpointHandler):
    """Saves a pytree, and adds the manifest once all hosts have written.

    metrics, interval: those of the checkpoint that is being saved.
    """

    metrics: Mapping[str, float]
    interval: Mapping[str, Any]

    def finalize(self, directory: Any) -> None:
        """Completes the files, then writes the manifest; called by Orbax on one host."""
        super().finalize(directory)
        write_manifest(Path(directory), self.metrics, self.interval)


@ocp.args.register_with_handler(SealingHandler, for_save=True)
class Save(ocp.args.StandardSave):
    """Arguments of a save by `SealingHandler`."""


@ocp.args.register_with_handler(SealingHandler, for_restore=True)
class Restore(ocp.args.StandardRestore):
    """Arguments of a restore by `SealingHandler`."""


class Checkpoints:
    """The checkpoints in a folder. Leaving the `with` block waits for the last save.

    Args:
      directory: the folder.
      keep: the number of latest checkpoints to keep besides the best; None: opens the folder
        read-only, which is safe while another process trains.
      best: the validation metric that orders checkpoints, one of `METRICS`.
    """

    def __init__(self, directory: Path, keep: int | None, best: str):
        if keep is None and not directory.is_dir():
            raise UserError(f"{directory} is not there: the run has not saved anything yet")
        if keep is None:
            check_metrics(directory)
        else:
            hosts.once(partial(set_damaged_aside, directory))
        self.directory, self.writes, self.best = directory, keep is not None, best
        self.handler = SealingHandler()
        with quiet():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=PreservationPolicy(keep or 1, best),
                best_fn=lambda metrics: merit(metrics, best)[0],
                todelete_subdir=TRASH,
                cleanup_tmp_directories=self.writes,
                create=self.writes,
                read_only=not self.writes,
            )
            self.manager = Manager(
                directory.absolute(), options=options, item_handlers=self.handler
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, Exception) and hosts.several():
            # Another process may be gone, and Orbax would wait for it.
            closing = threading.Thread(target=self.manager.close, daemon=True)
            closing.start()
            closing.join(GRACE)
            return
        with explained(f"the last checkpoint in {self.directory}"):
            self.manager.close()
        if self.writes and hosts.first():
            empty_trash(self.directory)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        interval: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` asynchronously as the checkpoint of its step; returns once it is copied.

        Args:
          state: the train state.
          metrics: validation metrics; empty if the run stops between two evaluations.
          interval: what was accumulated since the last line of metrics, as JSON; None: nothing.
        """
        step = state.taken()
        with explained(f"checkpoint {self.directory / str(step)}, or the one before it,"):
            self.manager.wait_until_finished()
            if hosts.first():
                empty_trash(self.directory)
            if step in self.steps():  # saved by a run that stopped before validation
                self.manager.delete(step)
            self.handler.metrics, self.handler.interval = metrics, interval or {}
            self.manager.save(step, args=Save(state), metrics=dict(metrics))

    def wait(self) -> None:
        """Waits until the last save is complete."""
        with explained(f"the last checkpoint in {self.directory}"):
            self.manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, if any."""
        return self.manager.latest_step()

    def find(self, which: str | int) -> int:
        """Returns the step that `latest`, `best` or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        which, steps = str(which), self.steps()
        if not steps:
            raise UserError(
                f"{self.directory} holds no finished checkpoint; "
                "train first, or wait for the first save"
            )
        if which == "latest":
            return steps[-1]
        if which == "best":
            return max(steps, key=lambda step: (merit(self.manager.metrics(step), self.best), step))
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise UserError(
            f"checkpoint {which!r}: {self.directory} holds "
            f"{', '.join(map(str, steps))}; name one, or latest, or best"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state saved at `step`.

        Args:
          step: the step of a checkpoint.
          like: shapes, dtypes and shardings; the mesh may differ from that of the save.

        Raises:
          UserError: the checkpoint is damaged, or of another config.
        """
        folder = self.directory / str(step)
        hosts.once(partial(self.verify, step))
        wanted, structure = by_name(like)
        try:
            # The saved tree, whose names may be those of an earlier version.
            saved: Any = self.manager.item_metadata(step)
            check_arrays(folder, by_name(saved, wanted)[0], wanted)
            target = jax.tree_util.tree_map_with_path(
                lambda path, _: wanted[renamed.array_name(path, wanted)], dict(saved)
            )
            state: Any = self.manager.restore(step, args=Restore(target))
        except UserError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON raise different types
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {folder} cannot be restored: {reason}") from error
        restored = by_name(state, wanted)[0]
        return jax.tree.unflatten(structure, [restored[name] for name in wanted])

    def interval(self, step: int) -> dict[str, Any]:
        """Returns the `interval` of `save`."""
        return hosts.once(partial(read_manifest, self.directory / str(step)))["interval"]

    def verify(self, step: int) -> None:
        """Raises a UserError unless the files of a checkpoint are as they were written."""
        folder = self.directory / str(step)
        try:
            verify(folder)
        except DamageError as fault:
            others = [other for other in self.steps() if other != step]
            remedy = f"to resume from step {others[-1]}" if others else "and train from the start"
            raise UserError(
                f"checkpoint {folder} is damaged ({fault}); delete it {remedy}"
            ) from fault


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the errors of Orbax and TensorStore when a write fails into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if hosts.several():
            reason += "; if another process is gone, give all the same command again; if not"
        raise UserError(
            f"{what} could not be written: {reason}; free space, or choose another --workdir"
        ) from error


def empty_trash(directory: Path) -> None:
    """Deletes the checkpoints that are no longer kept."""
    shutil.rmtree(directory / TRASH, ignore_errors=True)


def set_damaged_aside(directory: Path) -> None:
    """Moves damaged checkpoints away until the newest is intact.

    Older checkpoints have only their metrics checked, which Orbax reads when it opens the folder.

    Raises:
      UserError: there were checkpoints, and none is intact.
    """
    empty_trash(directory)
    is_newest, faults = True, []
    for folder in reversed(finished(directory)):
        try:
            read_metrics(folder)
            if is_newest:
                verify(folder)
            is_newest = False
        except DamageError as fault:
            aside = directory / DAMAGED / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.replace(aside)
            console.print(f"checkpoint {folder} is damaged ({fault}): moved to {aside}")
            faults.append(f"{folder.name}: {fault}")
    if is_newest and faults:
        raise UserError(
            f"no checkpoint in {directory} is intact ({'; '.join(faults)}); they were moved to "
            f"{directory / DAMAGED}: put one back, or repeat the command to train from the start"
        )


def check_metrics(directory: Path) -> None:
    """Raises a UserError for a checkpoint whose metrics, which Orbax reads first, are damaged."""
    for folder in finished(directory):
        try:
            read_metrics(folder)
        except DamageError as fault:
            raise UserError(
                f"checkpoint {folder} is damaged ({fault}); delete it, or resume training, which "
                "sets it aside"
            ) from fault


def finished(directory: Path) -> list[Path]:
    """Returns the folders of the checkpoints, in the order of their steps."""
    folders = [folder for folder in directory.glob("[0-9]*") if folder.name.isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name))


def by_name(tree: Any, known: Container[str] = ()) -> tuple[dict[str, Any], Any]:
    """Returns `renamed.array_name` → array, in the tree's order, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {renamed.array_name(path, known): leaf for path, leaf in leaves}, structure


def check_arrays(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError unless names, shapes and dtypes of the arrays agree."""

    def described(array: Any) -> str | None:
        return None if array is None else f"{np.dtype(array.dtype)}{list(array.shape)}"

    for name in sorted(saved.keys() | wanted.keys()):
        there, here = described(saved.get(name)), described(wanted.get(name))
        if there != here:
            raise UserError(
                f"checkpoint {folder} is of another config: {name} is {there} there and {here} "
                "here; choose another --workdir"
            )
