"""Checkpoints of the train state, by Orbax, written while training goes on.

Orbax writes a checkpoint into a temporary folder and renames it when it is whole, so one
that was cut off is never seen. It does not notice when a file is damaged later; a manifest
of sizes and checksums, written into each checkpoint before the renaming, does. A damaged one is
set aside when training goes on, which it then does from the newest that is sound.

Several hosts write a checkpoint together, each the arrays of its devices, into a folder that all
of them see. Orbax waits for the last; the first host then seals and renames.
"""

import contextlib
import json
import shutil
import threading
import zlib
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
from transformer.files import checksum
from transformer.metrics import METRICS
from transformer.parallel import hosts
from transformer.training.step import TrainState

MANIFEST = "manifest.json"
# Where a checkpoint that is to go is first moved to: deleted where it stands, one that was cut
# off in the middle of that would be taken for a damaged one.
TRASH = "trash"
GRACE = 10  # seconds for the last checkpoint to end, of one of several processes that failed
DAMAGED = "damaged"  # where those go whose files are not as they were written
# Orbax writes these once more after the manifest; what they say is not part of the state.
UNSEALED = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}


def merit(metrics: Any, best: str) -> Any:
    """What makes one checkpoint better than another: a metric of validation, then the loss.

    One without it is worse than any other.

    Args:
      metrics: of the checkpoint; empty where it was written between two evaluations.
      best: one of `metrics.METRICS`.
    """
    value = METRICS[best].better * (metrics or {}).get(f"validation/{best}", np.nan)
    return (-np.inf, 0.0) if np.isnan(value) else (value, -metrics["validation/loss"])


@dataclass(frozen=True)
class Kept(policy.PreservationPolicy):
    """Which checkpoints stay: the newest, and of those with metrics the latest few and the best.

    One without metrics was written because the run was asked to stop. The next save takes its
    place, so that a run which was stopped ends with the checkpoints of one that was not.
    """

    latest: int
    best: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Says of each, in the order of steps, whether it stays."""
        regular = [each for each in checkpoints if each.metrics]
        kept = {each.step for each in (*regular[-self.latest :], *checkpoints[-1:])}
        if regular:
            kept.add(max((merit(each.metrics, self.best), each.step) for each in regular)[1])
        return [each.step in kept for each in checkpoints]


class Checkpoints:
    """The checkpoints under one directory; leaving the `with` block waits for the last save.

    Args:
      directory: where they are.
      keep: the latest so many are kept, and the best by validation. None: they are
        only read, and nothing there is touched, be it of a run that is still training.
      best: the metric of validation that tells it, one of `metrics.METRICS`.
    """

    def __init__(self, directory: Path, keep: int | None, best: str):
        if keep is None and not directory.is_dir():
            raise UserError(f"{directory} is not there: the run has not saved anything yet")
        if keep is None:
            check_metrics(directory)
        else:
            hosts.once(partial(clean, directory))
        self.directory, self.writes, self.best = directory, keep is not None, best
        self.sealing: tuple[int, dict[str, Any]] | None = None
        with quiet():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=Kept(keep or 1, best),
                best_fn=lambda metrics: merit(metrics, best)[0],
                async_options=ocp.AsyncOptions(post_finalization_callback=self.seal),
                todelete_subdir=TRASH,
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
                read_only=keep is None,
            )
            self.manager = ocp.CheckpointManager(
                directory.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
            )

        # It would ask JAX with the number of a step; `interruption` does with that of a dispatch.
        self.manager.reached_preemption = lambda step: False

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
            clear_trash(self.directory)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        interval: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to write `state` as the checkpoint of its step; returns once it is copied.

        Args:
          state: the run's.
          metrics: of validation; empty where the run stops between two of them.
          interval: what has been added up since the last line of metrics, as JSON has it; None:
            nothing has.
        """
        step = state.taken()
        with explained(f"checkpoint {self.directory / str(step)}, or the one before it,"):
            self.manager.wait_until_finished()
            if hosts.first():
                clear_trash(self.directory)
            if step in self.manager.all_steps():  # of a run that stopped before it was validated
                self.manager.delete(step)
            self.sealing = step, {"interval": dict(interval or {})}
            self.manager.save(step, args=ocp.args.StandardSave(state), metrics=dict(metrics))

    def wait(self) -> None:
        """Waits until the last save is done."""
        with explained(f"the last checkpoint in {self.directory}"):
            self.manager.wait_until_finished()

    def seal(self) -> None:
        """Writes the manifest of the checkpoint that is about to be renamed into place."""
        assert self.sealing is not None
        step, sealed = self.sealing
        folder = self.directory / f"{step}.orbax-checkpoint-tmp"
        sealed |= {"files": checksums(folder)}
        manifest = {"sealed": sealed, "crc32": zlib.crc32(json.dumps(sealed).encode())}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def find(self, which: str) -> int:
        """The step that `latest`, `best` or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self.manager.all_steps())
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
        """The state saved at `step`, placed as `like` says.

        Args:
          step: one of those saved.
          like: shapes, dtypes and shardings; the mesh may be another than at saving.

        Raises:
          UserError: the checkpoint is damaged or of another model.
        """
        folder = self.directory / str(step)
        hosts.once(partial(self.verified, step))
        wanted, structure = by_name(like)
        try:
            # The saved tree, whose names may be those of an earlier version.
            saved: Any = self.manager.item_metadata(step)
            there = by_name(saved, wanted)[0]
            check_arrays(folder, there, wanted)
            target = jax.tree_util.tree_map_with_path(
                lambda path, _: wanted[renamed.array_name(path, wanted)], dict(saved)
            )
            state: Any = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        except UserError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON each have their own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {folder} cannot be restored: {reason}") from error
        restored = by_name(state, wanted)[0]
        return jax.tree.unflatten(structure, [restored[name] for name in wanted])

    def interval(self, step: int) -> dict[str, Any]:
        """What had been added up at `step` since the last line of metrics; see `save`."""
        return hosts.once(partial(read_manifest, self.directory / str(step)))["interval"]

    def verified(self, step: int) -> dict[str, Any]:
        """What the manifest says of the checkpoint at `step`, whose files are as they were written.

        Raises:
          UserError: they are not.
        """
        folder = self.directory / str(step)
        try:
            return verify(folder)
        except DamageError as fault:
            others = [other for other in sorted(self.manager.all_steps()) if other != step]
            remedy = f"to go on from step {others[-1]}" if others else "and train anew"
            raise UserError(
                f"checkpoint {folder} is damaged ({fault}); delete it {remedy}"
            ) from fault


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise when they cannot write into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if hosts.several():
            reason += "; if another process is gone, give all the same command again; if not"
        raise UserError(
            f"{what} could not be written: {reason}; free space, or choose another --workdir"
        ) from error


def clear_trash(directory: Path) -> None:
    """Deletes the checkpoints that are no longer kept."""
    shutil.rmtree(directory / TRASH, ignore_errors=True)


def clean(directory: Path) -> None:
    """Clears the trash, and sets aside damaged checkpoints until the newest is a sound one.

    Of those before it only the metrics are looked at, all of which Orbax reads when it opens
    the directory.

    Raises:
      UserError: there were checkpoints, and not one is sound.
    """
    clear_trash(directory)
    newest, faults = True, []
    for folder in reversed(finished(directory)):
        try:
            read_metrics(folder)
            if newest:
                verify(folder)
            newest = False
        except DamageError as fault:
            aside = directory / DAMAGED / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.replace(aside)
            console.print(f"checkpoint {folder} is damaged ({fault}): moved to {aside}")
            faults.append(f"{folder.name}: {fault}")
    if newest and faults:
        raise UserError(
            f"no checkpoint in {directory} is sound ({'; '.join(faults)}); they are in "
            f"{directory / DAMAGED} now: put one back, or give the command again to train anew"
        )


def finished(directory: Path) -> list[Path]:
    """The folders of the checkpoints, in the order of their steps."""
    folders = [folder for folder in directory.glob("[0-9]*") if folder.name.isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name))


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics saved with a checkpoint.

    Raises:
      DamageError: they cannot be read.
    """
    try:
        metrics = json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))
        dict.items(metrics)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"metrics/metrics: {type(error).__name__}") from error
    return metrics


def check_metrics(directory: Path) -> None:
    """Raises a UserError for a checkpoint whose metrics cannot be read.

    Orbax reads those of every checkpoint when it opens the directory.
    """
    for folder in finished(directory):
        try:
            read_metrics(folder)
        except DamageError as fault:
            raise UserError(
                f"checkpoint {folder} is damaged ({fault}); delete it, or let training go on, "
                "which sets it aside"
            ) from fault


def by_name(tree: Any, known: Container[str] = ()) -> tuple[dict[str, Any], Any]:
    """Returns the arrays of a tree by `renamed.array_name`, in its order, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {renamed.array_name(path, known): leaf for path, leaf in leaves}, structure


def check_arrays(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError unless the names, shapes and dtypes of two states agree."""

    def described(arrays: Mapping[str, Any], name: str) -> str | None:
        array = arrays.get(name)
        return None if array is None else f"{np.dtype(array.dtype)}{list(array.shape)}"

    for name in sorted(saved.keys() | wanted.keys()):
        there, here = described(saved, name), described(wanted, name)
        if there != here:
            raise UserError(
                f"checkpoint {folder} is of another config: {name} is {there} there and {here} "
                "here; choose another --workdir"
            )


def checksums(folder: Path) -> dict[str, list[int]]:
    """Path inside `folder` → [bytes, CRC-32] of each file that the manifest covers."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in UNSEALED:
            found[str(path.relative_to(folder))] = checksum(path)
    return found


class DamageError(Exception):
    """What is wrong with the files of a checkpoint."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says.

    interval: what had been added up since the last line of metrics.
    files: path → bytes and CRC-32.

    Raises:
      DamageError: it cannot be read, or is not as it was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sealed = manifest["sealed"]
        intact = manifest["crc32"] == zlib.crc32(json.dumps(sealed).encode())
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{MANIFEST}: {type(error).__name__}") from error
    if not intact:
        raise DamageError(f"{MANIFEST} has changed")
    return sealed


def verify(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says, if each of its files is as it was written.

    Raises:
      DamageError: one is not, and which.
    """
    sealed = read_manifest(folder)
    present = checksums(folder)
    for name, written in sealed["files"].items():
        if name not in present:
            raise DamageError(f"{name} is missing")
        if present[name] != written:
            raise DamageError(f"{name} has changed")
    return sealed
