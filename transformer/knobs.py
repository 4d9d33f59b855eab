"""Constraints on knobs, declared in the annotations of their dataclass fields.

steps: Annotated[int, Range(1, 2**31 - 1)] = 1_800
norm: Annotated[str, Choice(NORMS)] = "layer"
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from transformer.errors import UserError, check_choice, shown, within


@dataclass(frozen=True)
class Range:
    """An interval from `least` to `most`, without `most` if `exclusive`."""

    least: int | float
    most: int | float = math.inf
    exclusive: bool = False

    def check(self, knob: str, value: int | float) -> None:
        """Raises a UserError for a value that is out of range, or NaN."""
        if self.exclusive and not self.least <= value < self.most:
            least, most = shown(self.least), shown(self.most)
            raise UserError(f"{knob}={value}: it must be at least {least} and below {most}")
        within(knob, value, self.least, self.most)


class Choice:
    """A name in a table, which plugins may extend.

    built_in: the names without plugins.
    """

    def __init__(self, table: Collection[str]):
        self.table, self.built_in = table, frozenset(table)

    def check(self, knob: str, value: str) -> None:
        """Raises a UserError for a name that is not in the table."""
        check_choice(self.table, value, knob)


# Upper limits catch typos, such as sizes that would take hours to trace.
Count = Annotated[int, Range(1, 2**31 - 1)]
Size = Annotated[int, Range(1, 2**20)]
SizeOrZero = Annotated[int, Range(0, 2**20)]
Rate = Annotated[float, Range(0, 1, exclusive=True)]


def constraints(config: type) -> dict[str, list[Range | Choice]]:
    """Returns the constraints of each field of a dataclass, by name."""
    hints = get_type_hints(config, include_extras=True)
    return {  # `Size | None` and `Sequence[Size]` hold theirs inside
        name: [c for part in (hint, *get_args(hint)) for c in getattr(part, "__metadata__", ())]
        for name, hint in hints.items()
    }


def constrained(config: Any, prefix: str) -> Iterator[tuple[str, Any, Range | Choice]]:
    """Yields (knob, value, constraint) for each value of a config.

    None satisfies every constraint, and each entry of a sequence is a value.

    Args:
      config: an instance of a dataclass.
      prefix: the prefix of the knobs' names, such as `model.`.
    """
    for name, declared in constraints(type(config)).items():
        value = getattr(config, name)
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None:
                yield from ((prefix + name, each, constraint) for constraint in declared)


def validate(config: Any, prefix: str) -> None:
    """Raises a UserError for the first value that violates its constraint."""
    for knob, value, constraint in constrained(config, prefix):
        constraint.check(knob, value)
