"""Constraints on knobs, as in `norm: Annotated[str, Choice(NORMS)] = "layer"`."""

import difflib
import fnmatch
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from transformer.errors import UserError, check_choice


@dataclass(frozen=True)
class Range:
    """An interval from `least` to `most`, without `most` if `exclusive`."""

    least: int | float
    most: int | float = math.inf
    exclusive: bool = False

    def check(self, knob: str, value: int | float) -> None:
        least, most = self.least, self.most
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in (least, most))
        if self.exclusive and not least <= value < most:
            raise UserError(f"{knob}={value}: it must be at least {low} and below {high}")
        if not value >= least:  # NaN is not
            raise UserError(f"{knob}={value}: it must be at least {low}")
        if value > most:
            raise UserError(f"{knob}={value}: it must be at most {high}")


class Choice:
    """A name in a table, which plugins may extend; `built_in` are the names without plugins."""

    def __init__(self, table: Collection[str]):
        self.table, self.built_in = table, frozenset(table)

    def check(self, knob: str, value: str) -> None:
        check_choice(self.table, value, knob)


# Upper limits catch typos, such as sizes that would take hours to trace.
Count = Annotated[int, Range(1, 2**31 - 1)]
Size = Annotated[int, Range(1, 2**20)]
SizeOrZero = Annotated[int, Range(0, 2**20)]
Rate = Annotated[float, Range(0, 1, exclusive=True)]


def constrained(config: Any, prefix: str) -> Iterator[tuple[str, Any, Range | Choice]]:
    """Yields (knob, value, constraint) for each value, and entry of a sequence, but None."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        parts = (hint, *get_args(hint))  # `Size | None` and `Sequence[Size]` hold theirs inside
        declared = [c for part in parts for c in getattr(part, "__metadata__", ())]
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None:
                yield from ((prefix + name, each, constraint) for constraint in declared)


def validate(config: Any, prefix: str) -> None:
    """Raises a UserError for the first value that violates its constraint."""
    for knob, value, constraint in constrained(config, prefix):
        constraint.check(knob, value)


def match_names(patterns: Sequence[str], names: Collection[str], knob: str) -> set[str]:
    """The names that a pattern matches, such as `decoder/*`; a UserError if one matches none."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else map(str, patterns):
        own = fnmatch.filter(names, pattern)
        if not own:
            close = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise UserError(f"{knob}: {pattern!r} matches no parameter; the nearest are {close}")
        found.update(own)
    return found
