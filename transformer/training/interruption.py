"""Requests to stop: SIGTERM and SIGINT end a run with a checkpoint.

The exit status says that the same command resumes the run. Python runs signal handlers only between
bytecode instructions, and waiting for the device is a single one. A thread therefore reads signals
as they arrive, so that a second ^C ends the process immediately.
"""

import os
import signal
import socket
import sys
import threading
import time

from jax.experimental import multihost_utils

from transformer.console import console
from transformer.parallel import hosts

PARENT = "TRANSFORMER_PARENT"  # environment variable: id of the process whose end stops this one
ONCE = 0.2  # seconds within which repeated signals, as from a scheduler, count as one
RESUME = 75  # exit status, EX_TEMPFAIL of BSD's sysexits.h: try again


class Interrupted(BaseException):
    """A run has stopped on request. Like KeyboardInterrupt it is not an `Exception`."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in a notebook
        return [str(self)]


def end_with_parent() -> None:
    """Requests a stop when the parent process, a sweep, has ended."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent := os.environ.pop(PARENT, None):
        threading.Thread(target=watch, args=(int(parent),), daemon=True).start()


class StopRequests:
    """Receives requests to stop during a `with` block, also while a checkpoint is written.

    Does nothing outside the main thread, which alone can receive signals. A request may end the
    process only if `exits`, as in programs, not in notebooks; with several processes none ends
    alone.
    """

    def __init__(self, exits: bool = False):
        self.exits, self.state = exits, "stopped before the first step, nothing to save"
        # Whether there are steps that no checkpoint has. If not, and if `exits`, a request ends
        # the process immediately, also during compilation.
        self.something_to_save = False
        self.asked: signal.Signals | None = None
        self.before = {}  # signal → its former handler
        self.boundaries = 0

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self.read, self.write = socket.socketpair()
            self.write.setblocking(False)
            self.old_wakeup = signal.set_wakeup_fd(self.write.fileno(), warn_on_full_buffer=False)
            # With several processes JAX handles SIGTERM and notifies the others.
            noticed = [signal.SIGINT] if hosts.several() else [signal.SIGINT, signal.SIGTERM]
            self.before = {each: signal.signal(each, lambda *_: None) for each in noticed}
            threading.Thread(target=self.listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)
        if self.before:
            signal.set_wakeup_fd(self.old_wakeup)
            self.write.close()  # ends the thread

    def listen(self) -> None:
        began = 0.0
        with self.read:
            while number := self.read.recv(1):
                if number[0] not in self.before:
                    continue
                if self.asked is None:
                    began = time.monotonic()
                    self.take(signal.Signals(number[0]))
                elif time.monotonic() - began > ONCE:
                    leave(128 + number[0])

    def take(self, asked: signal.Signals) -> None:
        """Handles the first request."""
        self.asked = asked  # first, as nobody may read what is printed
        leaves = self.exits and not self.something_to_save and not hosts.several()
        what = self.state if leaves else "stopping with a checkpoint; a second one stops at once"
        # On a new line, also below a progress bar.
        print(f"\n{asked.name}: {what}", file=sys.stderr, flush=True)
        if leaves:
            leave(RESUME)
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    def all_is_saved(self, step: int) -> None:
        """From now on a request ends the process; an earlier one raises Interrupted."""
        last = f"stopped after step {step:,}, the last one, which is saved"
        self.state, self.something_to_save = f"{last}; the same command evaluates it", False
        if self.asked and not hosts.several():
            raise Interrupted(self.state)

    def stop(self) -> bool:
        """Whether training stops now; called at the end of every dispatch."""
        self.boundaries += 1
        if hosts.several():  # they stop at the first dispatch that none of them has passed
            return multihost_utils.reached_preemption_sync_point(self.boundaries)
        return self.asked is not None


def leave(status: int) -> None:
    """Ends the process immediately; shows the cursor, which a progress bar may have hidden."""
    console.show_cursor(True)
    os._exit(status)
