"""Checkpoints of the train state, by Orbax, written while training goes on."""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from transformer.errors import UserError
from transformer.training import TrainState


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
        self.directory = directory
        kept = [policy.LatestN(keep), policy.BestN(get_metric_fn=merit, n=1)]
        if keep is None and not directory.is_dir():
            raise UserError(f"{directory} is not there: the run has not saved anything yet")
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(kept),
                best_fn=lambda metrics: merit(metrics)[0],
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
                read_only=keep is None,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.manager.close()

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to write `state` as the checkpoint of its step; returns once it is copied."""
        self.manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=dict(metrics))

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def find(self, which: str) -> int:
        """The step that `latest`, `best` or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = self.manager.all_steps()
        if not steps:
            raise UserError(
                f"{self.directory} holds no finished checkpoint; "
                "train first, or wait for the first save"
            )
        if which == "latest":
            return max(steps)
        if which == "best":
            return max(steps, key=lambda step: merit(self.manager.metrics(step)))
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise UserError(
            f"checkpoint {which!r}: {self.directory} holds "
            f"{', '.join(map(str, sorted(steps)))}; name one, or latest, or best"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, placed as `like` says.

        Args:
          step: one of those saved.
          like: shapes, dtypes and shardings; the mesh may be another than at saving.

        Raises:
          UserError: the checkpoint is damaged or of another model.
        """
        try:
            with quiet_failure():
                state: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
            return state
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            reason = " ".join(str(error).split())[:200]
            others = sorted(set(self.manager.all_steps()) - {step})
            remedy = f"delete it to go on from step {others[-1]}" if others else "train anew"
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be restored: it is damaged, or "
                f"of another config; {remedy} ({type(error).__name__}: {reason})"
            ) from error


@contextlib.contextmanager
def quiet_failure() -> Iterator[None]:
    """Drops what Orbax's other reads print when one of them has failed.

    They end in threads of their own, find the event loop closed, and each prints a
    traceback that says nothing of the cause.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except Exception:
            time.sleep(0.5)  # for those under way to end
            raise
