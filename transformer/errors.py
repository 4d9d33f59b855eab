"""The one kind of error that a person can cause."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
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


def within(knob: str, value: int | float, least: int | float, most: int | float) -> None:
    """Raises a UserError unless `least` ≤ `value` ≤ `most`."""
    if not value >= least:  # NaN is not
        raise UserError(f"{knob}={value}: it must be at least {shown(least)}")
    if value > most:
        raise UserError(f"{knob}={value}: it must be at most {shown(most)}")


def shown(number: int | float) -> str:
    """A bound as a person reads it: 1,048,576 or 3.40282e+38."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the one of `names` most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns the absence of a package that is imported inside into a UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is not installed: pip install -e '.[{extra}]'"
        ) from error
