"""Output on the terminal: tables, progress, and streams whose reader may leave."""

import contextlib
import errno
import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track
from rich.table import Table

Item = TypeVar("Item")

console = Console(highlight=False, soft_wrap=True)


class TolerantFile(io.FileIO):
    """A standard stream that discards its output once the reader has gone (`| head`)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self.fileno() == 1:
            message = "standard output is closed: the program continues, and its output is lost"
            print(message, file=sys.stderr, flush=True)
        return len(data)


def tolerate_closed_output() -> None:
    """Lets the program continue when nobody reads `sys.stdout` or `sys.stderr` any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None: closed from the start
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
        buffer = io.BufferedWriter(TolerantFile(number, "w", closefd=False))
        encoding = stream and stream.encoding
        # "replace": an ASCII terminal lacks characters.
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True))


def facts(rows: Mapping[str, str]) -> None:
    """Prints one name and its value per line; an empty value is left out."""
    for name, value in rows.items():
        if value:
            console.print(f"[bold]{name:<12}[/bold]{escape(value)}")


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False
) -> None:
    """Prints a column of text and columns of numbers; each row as a list if they do not fit.

    `text`: all columns are of text.
    """
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i and not text else "left", overflow="fold")
    rows = [list(map(escape, row)) for row in rows]
    for row in rows:
        drawn.add_row(*row)
    needed = console.measure(drawn, options=console.options.update(width=1_000))
    if not console.is_terminal:
        drawn.width = needed.maximum
    elif needed.minimum > console.width:
        console.print(f"[bold]{escape(title)}[/bold]")
        for row in rows:
            cells = zip(columns, row, strict=True)
            console.print("\n  ".join(f"{name}: {cell}" for name, cell in cells))
        return
    console.print(drawn)


def progress(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    """Yields `items`, of which there are `total`, with a progress bar."""
    hidden = not console.is_terminal
    return track(items, what, total, console=console, transient=True, disable=hidden)


@contextlib.contextmanager
def status(what: str, done: str) -> Iterator[None]:
    """Shows an activity while it lasts, then that it is done and how long it took."""
    started, columns = time.perf_counter(), (SpinnerColumn(), TextColumn(what), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(f"{what} …")
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        bar.add_task(what)
        yield
    facts({done: f"in {time.perf_counter() - started:.1f} s"})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what libraries log when all is well, and their warnings, as of retried downloads."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
