"""`UserError`, the exception for errors that the user can fix, and helpers that raise it."""

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake of the user, or a fault of their disk or devices.

    The message is one line with the cause and the remedy. Programs print it and exit with status 2
    (`transformer.cli.run`).
    """

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython shows in a notebook in place of a traceback."""
        return [f"error: {self}"]


def check_choice(table: Collection[str], name: str, knob: str) -> None:
    """Raises a UserError that lists the names of `table` unless `name` is one of them."""
    if name not in table:
        raise UserError(f"{knob}={name}: choose one of {', '.join(table)}{nearest(name, table)}")


def choose(table: Mapping[str, Entry], name: str, knob: str) -> Entry:
    """Returns the entry of `table` called `name`; see `check_choice`."""
    check_choice(table, name, knob)
    return table[name]


def within(knob: str, value: int | float, least: int | float, most: int | float) -> None:
    """Raises a UserError unless `least` ≤ `value` ≤ `most`."""
    if not value >= least:  # NaN is not
        raise UserError(f"{knob}={value}: it must be at least {shown(least)}")
    if value > most:
        raise UserError(f"{knob}={value}: it must be at most {shown(most)}")


def shown(number: int | float) -> str:
    """Returns a bound as text: 1,048,576 or 3.40282e+38."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the most similar of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: BaseException) -> str:
    """The message of an exception on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def explained(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, by default of any, into a UserError.

    `{reason}` in the message becomes that of the exception. A UserError passes unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        raise UserError(message.replace("{reason}", reason(error))) from error


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Raises a UserError for a package that is imported inside and not installed.

    Args:
      extra: the extra of this package that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is not installed: pip install -e '.[{extra}]'"
        ) from error
