"""Being asked to stop: SIGTERM and SIGINT end a run with a checkpoint, and not with a loss.

A cluster says SIGTERM before it takes a machine away, a person types ^C. Either is remembered,
the dispatch in hand ends, a checkpoint is written, and the exit status says that the same command
goes on from there. Python runs a signal's handler only between two of its own instructions, and
the training loop waits for the device inside of one; a thread therefore reads the signals as they
come, so that a second ^C ends the process at once.
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

PARENT = "TRANSFORMER_PARENT"  # the environment's variable with the process to live as long as

ONCE = 0.2  # seconds in which a request that comes twice, as from a scheduler, is one

RESUME = 75  # the exit status EX_TEMPFAIL of BSD's sysexits.h: not done, try again


class Interrupted(BaseException):
    """A run has stopped because it was asked to. Its message is one line that says where.

    No `Exception`, as KeyboardInterrupt is none: what is caught on the way is a fault of something.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it in a notebook, instead of a traceback."""
        return [str(self)]


def end_with_parent() -> None:
    """Asks this process to stop once the one that started it for a sweep is gone."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class StopRequests:
    """The requests to stop that come while the `with` block lasts, the writing of a checkpoint too.

    Only the main thread of a program can ask for signals; in another, none are noticed here.

    something_to_save: whether there is what no checkpoint has. If not, a request ends the process
      at once, wherever it is, such as inside of the compiler; if it may.

    Args:
      exits: whether it may: a program's, not a notebook's. Of several processes none ends alone.
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
        # Of several processes each SIGTERM goes to JAX, which tells the others.
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
            self.write.close()  # which ends the thread

    def listen(self, noticed: frozenset[signal.Signals]) -> None:
        """Takes the numbers of signals as they come."""
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
        """Takes the first request."""
        if self.exits and not self.something_to_save and not hosts.several():
            say(f"{asked.name}: {self.state}")
            leave(RESUME)
        self.asked = asked
        say(f"{asked.name}: stopping with a checkpoint; a second one stops at once")
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    def all_is_saved(self, step: int) -> None:
        """From here on a request ends the process; one that came meanwhile raises Interrupted."""
        self.state = f"stopped after step {step:,}, the last one, which is saved"
        self.state += "; the same command evaluates it"
        self.something_to_save = False
        if self.asked and not hosts.several():
            raise Interrupted(self.state)

    def stop(self) -> bool:
        """Whether training stops here; to be asked at the end of every dispatch.

        Several processes all answer alike: at the first dispatch that none of them has passed.
        """
        self.boundaries += 1
        if hosts.several():
            return multihost_utils.reached_preemption_sync_point(self.boundaries)
        return self.asked is not None


def leave(status: int) -> None:
    """Ends the process at once, with the cursor that a progress bar had hidden."""
    console.show_cursor(True)
    os._exit(status)


def say(text: str) -> None:
    """Prints a line of its own, also below a progress bar."""
    print(f"\n{text}", file=sys.stderr, flush=True)
