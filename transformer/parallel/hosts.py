"""Several hosts: each runs the whole program as one process, with a part of the devices.

`first` and `once` are for actions that one process must do alone, such as writing a file.
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from transformer.errors import UserError, explained
from transformer.knobs import Range

PATIENCE = 300  # seconds for all processes to arrive
SILENCE = 10  # seconds before a process that waits says so
ALL_FLAGS = "--coordinator=HOST:PORT, --processes=N and --process=I"


def join(
    coordinator: str | None, processes: int | None, process: int | None, *, interruptible: bool
) -> None:
    """Connects this process to others, if flags or environment name several processes.

    Must be called before JAX initialises its devices. `coordinator` is HOST:PORT of process 0, or
    `auto`: JAX detects everything. An `interruptible` program handles requests to stop.
    """
    given = [flag for flag in (coordinator, processes, process) if flag is not None]
    here = os.environ
    in_cluster = (  # where JAX detects several processes by itself
        int(here.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # a step of several tasks (`srun`)
        or "," in here.get("TPU_WORKER_HOSTNAMES", "")  # a worker of a TPU slice under GKE
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= here.keys()  # of an indexed Job
    )
    if not given and not in_cluster:
        return
    where: dict[str, Any] = {}
    if given not in ([], ["auto"]):
        if processes is None or process is None or not re.fullmatch(r".+:\d+", coordinator or ""):
            raise UserError(
                f"several processes need all of {ALL_FLAGS}; or none of them under SLURM or "
                "Kubernetes; or --coordinator=auto alone"
            )
        Range(0, processes - 1).check("--process", process)
        if process:
            find(str(coordinator))
        where = {"coordinator_address": coordinator, "num_processes": processes}
        where |= {"process_id": process, "cluster_detection_method": "deactivate"}
    # With the service SIGTERM does not end a process; see `interruption`.
    jax.config.update("jax_enable_preemption_service", interruptible)
    message = f"the other processes are not found: {{reason}}; name them by {ALL_FLAGS}"
    with explained(message, OSError, RuntimeError, ValueError):
        jax.distributed.initialize(**where, initialization_timeout=PATIENCE)


def find(coordinator: str) -> None:
    """Waits until process 0 answers; JAX itself would abort without an exception."""
    host, _, port = coordinator.rpartition(":")
    began, silent = time.monotonic(), True
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            waited, fault = time.monotonic() - began, f"--coordinator={coordinator}: {error}"
            if waited > PATIENCE:
                remedy = "start process 0 there, and see that this host reaches it"
                raise UserError(f"{fault}: no answer in {PATIENCE} s; {remedy}") from error
            if silent and waited > SILENCE:
                silent = False
                print(f"{fault}: waiting for process 0, {PATIENCE} s at most", file=sys.stderr)
        time.sleep(0.2)


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return not several() or jax.process_index() == 0


def once(function: Callable[[], Any]) -> Any:
    """Calls `function` on the first host; all return its result (JSON), or raise if it fails."""
    if not several():
        return function()
    result, fault, message = None, None, None
    if first():
        try:
            result = function()
        except Exception as error:  # of any kind: the other processes must not wait forever
            fault, message = error, str(error)
            if not isinstance(error, UserError):
                message = f"the first process failed: {type(error).__name__}: {error}"
    text = np.frombuffer(json.dumps([result, message]).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    result, message = json.loads(np.asarray(text).tobytes())
    if message is not None:
        raise fault or UserError(message)
    return result


def in_turn(function: Callable[[], Any]) -> Any:
    """Calls `function` on the first host, then on the others, which may reuse its files."""
    here: list[Any] = []
    once(lambda: here.append(function()))
    return here[0] if here else function()


def fetch(tree: Any) -> Any:
    """Returns the arrays of `tree` as NumPy arrays, gathered on every host."""

    def whole(leaf: Any) -> np.ndarray:
        there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if there and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
