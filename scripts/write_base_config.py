"""Writes `configs/base.py` from the dataclasses that define the knobs.

Usage:
    python scripts/write_base_config.py
"""

import ast
import inspect
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from transformer.config import RunConfig, sections

BASE = Path(__file__).parent.parent / "configs" / "base.py"
WIDTH = 100

HEADER = '''"""Every knob with its default and meaning; the other config files change some.

Written by `python scripts/write_base_config.py` from the dataclasses that define the knobs.

Usage:
    python train.py --config=configs/base.py --config.model.norm=rms
"""

from transformer.config import default_config


def get_config():
    config = default_config()
'''


def comments(config: type) -> dict[str, str]:
    """Returns the comment of each field of a dataclass, from its lines or the lines above it."""
    source = textwrap.dedent(inspect.getsource(config))
    lines = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    (definition,) = ast.parse(source).body
    for node in getattr(definition, "body", ()):
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while lines.get(first - 1, ("", False))[1]:
                first -= 1
            numbers = range(first, (node.end_lineno or first) + 1)
            words = " ".join(lines[number][0] for number in numbers if number in lines)
            found[ast.unparse(node.target)] = words
    return found


def shown(config: type, prefix: str) -> Iterator[str]:
    """Yields the lines of the knobs of a config, then those of its sections."""
    meanings = comments(config)
    for each in fields(config):
        if is_dataclass(each.default_factory):
            continue
        meaning = meanings[each.name]
        line = f"    config.{prefix}{each.name} = {literal(each.default)}"
        if len(line) + len(meaning) + 4 <= WIDTH:
            yield f"{line}  # {meaning}"
        else:
            yield textwrap.fill(meaning, WIDTH, initial_indent="    # ", subsequent_indent="    # ")
            yield line
    for name, section in sections(config).items():
        yield f"\n    # {(section.__doc__ or '').splitlines()[0]}"
        yield from shown(section, f"{name}.")


def literal(value: Any) -> str:
    """Returns a value as ruff formats it."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_}" if type(value) is int else repr(value)


def base_config() -> str:
    """Returns the text of `configs/base.py`."""
    return "\n".join((HEADER, *shown(RunConfig, ""), "", "    return config", ""))


if __name__ == "__main__":
    BASE.write_text(base_config(), encoding="utf-8")
