"""`UserError`, for errors that the user can fix, and helpers that raise it."""

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(Exception):
    """A mistake of the user, or a fault of their disk or devices; any function may raise it.

    The message is one line with the cause and the remedy. Programs print it and exit with status 2
    (`transformer.cli.run`).
    """

    def _render_traceback_(self) -> list[str]:  # shown by IPython instead of a traceback
        return [f"error: {self}"]


def check_choice(table: Collection[str], name: str, knob: str) -> None:
    """Raises a UserError that lists the names of `table` unless `name` is one of them."""
    if name not in table:
        raise UserError(f"{knob}={name}: choose one of {', '.join(table)}{nearest(name, table)}")


def choose(table: Mapping[str, Entry], name: str, knob: str) -> Entry:
    """Returns the entry of `table` called `name`; see `check_choice`."""
    check_choice(table, name, knob)
    return table[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the most similar of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: BaseException) -> str:
    """Returns the message of an exception on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Returns whether Python or XLA ran out of memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def explained(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, by default of any, into a UserError.

    `{kind}` and `{reason}` in the message become those of the exception. A UserError passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        message = message.replace("{kind}", type(error).__name__)
        raise UserError(message.replace("{reason}", reason(error))) from error


def needs(extra: str) -> contextlib.AbstractContextManager[None]:
    """Raises a UserError for a package that is imported inside and that `extra` would install."""
    return explained(f"{{reason}}: pip install -e '.[{extra}]'", ImportError)
