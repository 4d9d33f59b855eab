"""Checkpoints of the train state, by Orbax, written while training goes on.

Orbax writes a checkpoint into a temporary folder and renames it when it is whole, so one
that was cut off is never seen. It does not notice when a file is damaged later; a manifest
of sizes and checksums, written into each checkpoint before the renaming, does.

Several hosts write a checkpoint together, each the arrays of its devices, into a folder that all
of them see. Orbax waits for the last; the first host then seals and renames.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from transformer import hosts
from transformer.errors import UserError
from transformer.training import TrainState

MANIFEST = "manifest.json"
# Where a checkpoint that is to go is first moved to: deleted where it stands, one that was cut
# off in the middle of that would be taken for a damaged one.
TRASH = "trash"
# Orbax writes these once more after the manifest; what they say is not part of the state.
UNSEALED = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}


def merit(metrics: Any) -> Any:
    """What makes one checkpoint better than another: sequence accuracy, then loss."""
    return metrics["validation/sequence_accuracy"], -metrics["validation/loss"]


class Checkpoints:
    """The checkpoints under one directory; leaving the `with` block waits for the last save.

    Args:
      directory: where they are.
      keep: the latest so many are kept, and the best by validation. None: they are
        only read, and nothing there is touched, be it of a run that is still training.
    """

    def __init__(self, directory: Path, keep: int | None):
        if keep is None and not directory.is_dir():
            raise UserError(f"{directory} is not there: the run has not saved anything yet")
        if keep is not None and hosts.first():
            clear_trash(directory)
        check_metrics(directory)
        self.directory, self.writes = directory, keep is not None
        self.sealing: tuple[int, TrainState] | None = None
        kept = [policy.LatestN(keep), policy.BestN(get_metric_fn=merit, n=1)]
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(kept),
                best_fn=lambda metrics: merit(metrics)[0],
                async_options=ocp.AsyncOptions(post_finalization_callback=self.seal),
                todelete_subdir=TRASH,
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
                read_only=keep is None,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with explained(f"the last checkpoint in {self.directory}"):
            self.manager.close()
        if self.writes and hosts.first():
            clear_trash(self.directory)

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to write `state` as the checkpoint of its step; returns once it is copied."""
        step = state.taken()
        with explained(f"checkpoint {self.directory / str(step)}, or the one before it,"):
            self.manager.wait_until_finished()
            if hosts.first():
                clear_trash(self.directory)
            self.sealing = step, jax.tree.map(jax.api_util.shaped_abstractify, state)
            self.manager.save(step, args=ocp.args.StandardSave(state), metrics=dict(metrics))

    def seal(self) -> None:
        """Writes the manifest of the checkpoint that is about to be renamed into place."""
        assert self.sealing is not None
        step, state = self.sealing
        folder = self.directory / f"{step}.orbax-checkpoint-tmp"
        sealed = {"arrays": shapes_of(state), "files": checksums(folder)}
        manifest = {"sealed": sealed, "crc32": zlib.crc32(json.dumps(sealed).encode())}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))

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
            return max(steps, key=lambda step: merit(self.manager.metrics(step)))
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
        saved = hosts.once(partial(self.verified, step))
        wanted = shapes_of(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {folder} is of another config: {name} is {saved.get(name)} there "
                    f"and {wanted.get(name)} here; choose another --workdir"
                )
        try:
            state: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax, TensorStore and JSON each have their own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {folder} cannot be restored: {reason}") from error
        return state

    def verified(self, step: int) -> dict[str, str]:
        """The shapes of the arrays saved at `step`, whose files are as they were written.

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
        raise UserError(
            f"{what} could not be written: {reason}; free space, or choose another --workdir"
        ) from error


def clear_trash(directory: Path) -> None:
    """Deletes the checkpoints that are no longer kept."""
    shutil.rmtree(directory / TRASH, ignore_errors=True)


def check_metrics(directory: Path) -> None:
    """Raises a UserError for a checkpoint whose metrics cannot be read.

    Orbax reads those of every checkpoint when it opens the directory.
    """
    for folder in directory.glob("[0-9]*"):
        if folder.name.isdigit():
            try:
                merit(json.loads((folder / "metrics" / "metrics").read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"checkpoint {folder} is damaged (metrics/metrics: {type(error).__name__}); "
                    "delete it to go on from another"
                ) from error


def shapes_of(state: TrainState) -> dict[str, str]:
    """`.params['…/kernel']` → `float32[64, 4, 16]` for each array of a state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def checksums(folder: Path) -> dict[str, list[int]]:
    """Path inside `folder` → [bytes, CRC-32] of each file that the manifest covers."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in UNSEALED:
            crc = 0
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    crc = zlib.crc32(part, crc)
            found[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return found


class DamageError(Exception):
    """What is wrong with the files of a checkpoint."""


def verify(folder: Path) -> dict[str, str]:
    """The shapes of a checkpoint's arrays, if each of its files is as it was written.

    Raises:
      DamageError: one is not, and which.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sealed = manifest["sealed"]
        intact = manifest["crc32"] == zlib.crc32(json.dumps(sealed).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{MANIFEST}: {type(error).__name__}") from error
    if not intact:
        raise DamageError(f"{MANIFEST} has changed")
    present = checksums(folder)
    for name, checksum in sealed["files"].items():
        if name not in present:
            raise DamageError(f"{name} is missing")
        if present[name] != checksum:
            raise DamageError(f"{name} has changed")
    return sealed["arrays"]
