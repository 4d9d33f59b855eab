"""The one kind of error that a person can cause."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake of the person at the keyboard, or a fault of their disk or devices.

    Its message is one line that names the cause and the remedy. The command
    lines print it and exit with status 2 (`transformer.cli.run`).
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it in a notebook, instead of a traceback."""
        return [f"error: {self}"]


def choose(table: Mapping[str, Entry], name: str, knob: str) -> Entry:
    """The entry of `table` called `name`; otherwise an error that lists the names."""
    if name in table:
        return table[name]
    raise UserError(f"{knob}={name}: choose one of {', '.join(table)}{nearest(name, table)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the one of `names` most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
