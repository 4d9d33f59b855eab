"""JSON that any reader takes: NaN and the infinities, for which it has no words, are null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """A value of mappings, sequences, text and numbers as JSON (RFC 8259)."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value, None in the place of each number that is not finite."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of numbers as it was before `dumps`, but for infinities, which are NaN now."""
    return {name: math.nan if value is None else value for name, value in row.items()}
