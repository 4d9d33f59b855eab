"""Requests to stop: SIGTERM and SIGINT end a run with a checkpoint.

Clusters send SIGTERM before they reclaim a machine; users type ^C. The current dispatch ends, a
checkpoint is written, and the exit status says that the same command resumes the run. Python runs
signal handlers only between bytecode instructions, and waiting for the device is a single one. A
thread therefore reads signals as they arrive, so that a second ^C ends the process immediately.
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
    """A run has stopped on request; the message is one line that says at which step.

    Like KeyboardInterrupt it is not an `Exception`, so that handlers of errors do not catch it.
    """

    def _render_traceback_(self) -> list[str]:
        """Shown by IPython in a notebook instead of a traceback."""
        return [str(self)]


def end_with_parent() -> None:
    """Requests a stop when the parent process, a sweep, has ended."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class StopRequests:
    """Receives requests to stop during a `with` block, also while a checkpoint is written.

    Only the main thread of a program can receive signals; in another thread this does nothing.

    something_to_save: whether there are steps that no checkpoint has. If not, and if `exits`, a
      request ends the process immediately, also during compilation.

    Args:
      exits: whether a request may end the process: in programs, not in notebooks. With several
        processes none ends alone.
    """

    def __init__(self, exits: bool = False):
        self.exits, self.state = exits, "stopped before the first step, nothing to save"
        self.asked: signal.Signals | None = None
        self.something_to_save = False
        self.boundaries = 0

    def __enter__(self) -> "StopRequests":
        self.before = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self.read, self.write = socket.socketpair()
        self.write.setblocking(False)
        self.old_descriptor = signal.set_wakeup_fd(self.write.fileno(), warn_on_full_buffer=False)
        # With several processes JAX handles SIGTERM and notifies the others.
        noticed = [signal.SIGINT] if hosts.several() else [signal.SIGINT, signal.SIGTERM]
        for each in noticed:
            self.before[each] = signal.signal(each, lambda *_: None)
        threading.Thread(target=self.listen, args=(frozenset(noticed),), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)
        if self.before:
            signal.set_wakeup_fd(self.old_descriptor)
            self.write.close()  # ends the thread

    def listen(self, noticed: frozenset[signal.Signals]) -> None:
        """Reads the numbers of signals as they arrive."""
        began = 0.0
        with self.read:
            while number := self.read.recv(1):
                if number[0] not in noticed:
                    continue
                if self.asked is None:
                    began = time.monotonic()
                    self.take(signal.Signals(number[0]))
                elif time.monotonic() - began > ONCE:
                    leave(128 + number[0])

    def take(self, asked: signal.Signals) -> None:
        """Handles the first request."""
        if self.exits and not self.something_to_save and not hosts.several():
            say(f"{asked.name}: {self.state}")
            leave(RESUME)
        self.asked = asked
        say(f"{asked.name}: stopping with a checkpoint; a second one stops at once")
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    def all_is_saved(self, step: int) -> None:
        """From now on a request ends the process; an earlier one raises Interrupted."""
        self.state = f"stopped after step {step:,}, the last one, which is saved"
        self.state += "; the same command evaluates it"
        self.something_to_save = False
        if self.asked and not hosts.several():
            raise Interrupted(self.state)

    def stop(self) -> bool:
        """Whether training stops now; called at the end of every dispatch.

        Several processes agree: they stop at the first dispatch that none of them has passed.
        """
        self.boundaries += 1
        if hosts.several():
            return multihost_utils.reached_preemption_sync_point(self.boundaries)
        return self.asked is not None


def leave(status: int) -> None:
    """Ends the process immediately; shows the cursor, which a progress bar may have hidden."""
    console.show_cursor(True)
    os._exit(status)


def say(text: str) -> None:
    """Prints on a new line, also below a progress bar."""
    print(f"\n{text}", file=sys.stderr, flush=True)
