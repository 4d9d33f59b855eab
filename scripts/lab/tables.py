"""Markdown tables, and repeated measurements as text."""

import statistics
from collections.abc import Callable, Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table; `align` has `l` or `r` per column, by default `l` for the first alone."""
    rule = [{"l": "---", "r": "---:"}[each] for each in align or "l" + "r" * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows)) + "\n"


def spread(values: Sequence[float], write: Callable[[float], str] = "{:,.0f}".format) -> str:
    """The median of the values with the lowest and the highest: `12 [10, 15]`."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{write(middle)} [{write(low)}, {write(high)}]"
