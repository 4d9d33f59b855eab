"""Checkpoints of the train state, written by Orbax while training continues.

Orbax renames a checkpoint's folder when it is complete, so that an interrupted save is never seen.
Orbax does not notice when a file changes later: a manifest has sizes and checksums. Several hosts
write a checkpoint together, each its own shards, into a shared folder.
"""

import json
import shutil
import threading
import zlib
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
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
from transformer.errors import UserError, choose, explained
from transformer.files import checksum
from transformer.inference.text_metrics import VALIDATION_METRICS
from transformer.parallel import hosts
from transformer.parallel.mesh import place
from transformer.training.step import TrainState

MANIFEST = "manifest.json"
METRICS_FILE = "metrics/metrics"  # written by Orbax
ARRAYS = "default"  # the folder that Orbax writes a single pytree to
DAMAGED = "damaged"  # the subfolder for damaged checkpoints
TRASH = "trash"  # from where Orbax deletes: an interrupted deletion does not look like damage
CHUNK = 2**24  # bytes of an array, for `small_files`
GRACE = 10  # seconds to finish a save when another of several processes may be gone


class DamageError(Exception):
    """A file of a checkpoint is missing or has changed. The message names it."""


def merit(metrics: Any, best: str) -> Any:
    """The key by which checkpoints are ranked: the validation metric `best`, then the loss."""
    value = VALIDATION_METRICS[best].better * (metrics or {}).get(f"validation/{best}", np.nan)
    return (-np.inf, 0.0) if np.isnan(value) else (value, -metrics["validation/loss"])


@dataclass(frozen=True)
class PreservationPolicy(policy.PreservationPolicy):
    """Keeps the newest checkpoint, and of those with metrics the `latest` few and the best.

    A checkpoint without metrics was saved because the run was asked to stop; the next save replaces
    it. An interrupted run thus ends with the checkpoints of an uninterrupted one.
    """

    latest: int
    best: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        regular = [each for each in checkpoints if each.metrics]
        kept = {each.step for each in (*regular[-self.latest :], *checkpoints[-1:])}
        if regular:
            kept.add(max((merit(each.metrics, self.best), each.step) for each in regular)[1])
        return [each.step in kept for each in checkpoints]


class Manager(ocp.CheckpointManager):
    """A manager that leaves the check for preemption to `interruption.StopRequests`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class SealingHandler(ocp.StandardCheckpointHandler):
    """Saves a pytree, and adds the manifest once all hosts have written."""

    sealed: dict[str, Any]  # the interval and the metrics of the checkpoint that is being saved

    def finalize(self, directory: Any) -> None:  # called by Orbax on one host
        super().finalize(directory)
        arrays = Path(directory)  # not yet renamed to `ARRAYS`
        files = {f"{ARRAYS}/{name}": each for name, each in _checksums(arrays).items()}
        sealed = self.sealed | {"files": files}
        manifest = {"sealed": sealed, "crc32": zlib.crc32(json.dumps(sealed).encode())}
        (arrays / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


@ocp.args.register_with_handler(SealingHandler, for_save=True)
class Save(ocp.args.StandardSave):
    """Arguments of a save by `SealingHandler`."""


@ocp.args.register_with_handler(SealingHandler, for_restore=True)
class Restore(ocp.args.StandardRestore):
    """Arguments of a restore by `SealingHandler`."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in a folder. Leaving the `with` block waits for the last save.

    The `keep` latest ones are kept, and the best by the validation metric `best`. If `keep` is
    None, the folder is only read, which is safe while another process trains. With `small_files`
    each array is written in chunks to files of its own, which needs no copy of all in memory.
    """

    def __init__(self, directory: Path, keep: int | None, best: str, *, small_files: bool = False):
        self.directory, self.writes, self.best = directory, keep is not None, best
        self.chunks = ocp.SaveArgs(chunk_byte_size=CHUNK) if small_files else ocp.SaveArgs()
        if not self.writes and not directory.is_dir():
            raise UserError(f"{directory} is not there: the run has not saved anything yet")
        hosts.once(partial(check, directory, self.writes))
        self.handler, path = SealingHandler(use_ocdbt=not small_files), directory.absolute()
        with quiet():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=PreservationPolicy(keep or 1, best),
                best_fn=lambda metrics: merit(metrics, best)[0],
                todelete_subdir=TRASH,
                cleanup_tmp_directories=self.writes,
                create=self.writes,
                read_only=not self.writes,
            )
            self.manager = Manager(path, options=options, item_handlers=self.handler)

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, Exception) and hosts.several():
            # Another process may be gone, and Orbax would wait for it.
            closing = threading.Thread(target=self.manager.close, daemon=True)
            closing.start()
            closing.join(GRACE)
            return
        with self._writing():
            self.manager.close()
        if self.writes and hosts.first():
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def _writing(self) -> AbstractContextManager[None]:
        remedy = "free space, or choose another --workdir"
        if hosts.several():
            remedy = f"if another process is gone, repeat the command for all; if not, {remedy}"
        message = f"a checkpoint in {self.directory} could not be written: {{reason}}; {remedy}"
        return explained(message, OSError, ValueError, RuntimeError)  # of Orbax and TensorStore

    def save(self, state: TrainState, metrics: Mapping[str, float], interval: Mapping = {}) -> None:
        """Saves `state` asynchronously as the checkpoint of its step; returns once it is copied.

        The validation metrics are empty if the run stops between two evaluations; `interval` is
        what was accumulated since the last line of metrics, as JSON.
        """
        step = state.taken()
        with self._writing():
            self.manager.wait_until_finished()
            if hosts.first():
                shutil.rmtree(self.directory / TRASH, ignore_errors=True)
            if step in self.steps():  # saved by a run that stopped before validation
                self.manager.delete(step)
            self.handler.sealed = {"interval": dict(interval), "metrics": dict(metrics)}
            save_args = jax.tree.map(lambda _: self.chunks, state)
            self.manager.save(step, args=Save(state, save_args), metrics=dict(metrics))

    def wait(self) -> None:
        with self._writing():
            self.manager.wait_until_finished()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def find(self, which: str | int) -> int:
        """The step that `latest`, `best` or a number names."""
        if not (steps := self.steps()):
            raise UserError(f"{self.directory} holds no finished checkpoint; wait for the first")
        best = max(steps, key=lambda step: (merit(self.manager.metrics(step), self.best), step))
        named = {"latest": steps[-1], "best": best} | {str(step): step for step in steps}
        return choose(named, str(which), f"{self.directory}: checkpoint")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, maybe on another mesh, with the shardings of `like`."""
        folder, wanted = self.directory / str(step), by_name(like)
        hosts.once(partial(self._verify, step))
        with explained(f"checkpoint {folder} cannot be restored: {{reason}}"):
            saved: Any = self.manager.item_metadata(step)
            there = by_name(saved, wanted)
            added = {name: wanted[name] for name in renamed.ADDED if name not in there}
            check_arrays(folder, there | added, wanted)
            target = jax.tree_util.tree_map_with_path(
                lambda path, _: wanted[renamed.array_name(path, wanted)], dict(saved)
            )
            restored = by_name(self.manager.restore(step, args=Restore(target)), wanted)
            for name, array in added.items():
                value = np.full(array.shape, renamed.ADDED[name], array.dtype)
                restored[name] = place(value, array.sharding)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])

    def interval(self, step: int) -> dict[str, Any]:
        return hosts.once(partial(read_manifest, self.directory / str(step)))["interval"]

    def _verify(self, step: int) -> None:
        folder, others = self.directory / str(step), [each for each in self.steps() if each != step]
        remedy = f"to resume from step {others[-1]}" if others else "and train from the start"
        message = f"checkpoint {folder} is damaged ({{reason}}); delete it {remedy}"
        with explained(message, DamageError):
            verify(folder)


def check(directory: Path, set_aside: bool) -> None:
    """Checks the metrics of all checkpoints, which Orbax reads when it opens the folder.

    With `set_aside`, moves damaged checkpoints away until the newest is intact.
    """
    folders = {int(path.name): path for path in directory.glob("[0-9]*") if path.name.isdigit()}
    is_newest = True
    for _, folder in sorted(folders.items(), reverse=True):
        try:
            _read_json(folder, METRICS_FILE)
            if is_newest and set_aside:
                verify(folder)
            is_newest = False
        except DamageError as fault:
            what = f"checkpoint {folder} is damaged ({fault})"
            if not set_aside:
                remedy = "delete it, or resume training, which sets it aside"
                raise UserError(f"{what}; {remedy}") from fault
            aside = directory / DAMAGED / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.replace(aside)
            console.print(f"{what}: moved to {aside}")
    if is_newest and folders:
        fault = f"no checkpoint in {directory} is intact; all were moved to {directory / DAMAGED}"
        raise UserError(f"{fault}: put one back, or repeat the command to train from the start")


def by_name(tree: Any, known: Container[str] = ()) -> dict[str, Any]:
    """`renamed.array_name` → array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {renamed.array_name(path, known): leaf for path, leaf in leaves}


def check_arrays(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a UserError unless names, shapes and dtypes of the arrays agree."""
    saved, wanted = (
        {name: f"{np.dtype(array.dtype)}{list(array.shape)}" for name, array in arrays.items()}
        for arrays in (saved, wanted)
    )
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name), wanted.get(name)
        if there != here:
            fault = f"is of another config: {name} is {there} there and {here} here"
            raise UserError(f"checkpoint {folder} {fault}; choose another --workdir")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `SealingHandler` sealed: `interval`, `metrics` and `files`."""
    name = MANIFEST if (folder / MANIFEST).exists() else f"{ARRAYS}/{MANIFEST}"  # 0.1: top level
    manifest = _read_json(folder, name)
    sealed = manifest.get("sealed")
    if manifest.get("crc32") != zlib.crc32(json.dumps(sealed).encode()):
        raise DamageError(f"{name} has changed")
    return sealed


def verify(folder: Path) -> None:
    """Raises a DamageError unless every file is as it was written."""
    manifest, present = read_manifest(folder), _checksums(folder)
    metrics = _read_json(folder, METRICS_FILE)
    if json.dumps(manifest.get("metrics", metrics)) != json.dumps(metrics):  # NaN ≠ NaN
        raise DamageError(f"{METRICS_FILE} has changed")
    for name, written in manifest["files"].items():
        if present.get(name) != written:
            raise DamageError(f"{name} {'has changed' if name in present else 'is missing'}")


def _read_json(folder: Path, name: str) -> Any:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        dict.items(content)  # a TypeError for other than an object
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamageError(f"{name}: {type(error).__name__}") from error
    return content


def _checksums(folder: Path) -> dict[str, list[int]]:  # path → [bytes, CRC-32] of each file
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum(path) for path in files}
