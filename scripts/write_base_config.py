"""`python scripts/write_base_config.py` writes `configs/base.py` from the knobs' dataclasses."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from transformer.config import RunConfig, sections

BASE = Path(__file__).parent.parent / "configs" / "base.py"
WIDTH = 100

HEADER = '''"""Every knob with its default and meaning; the other config files change some.

Written by `python scripts/write_base_config.py` from the dataclasses that define the knobs.

    python train.py --config=configs/base.py --config.model.norm=rms
"""

from transformer.config import default_config


def get_config():
    config = default_config()
'''


def comments(config: type) -> dict[str, str]:
    """The comment of each field of a dataclass, from its lines or the lines above it."""
    source, found = textwrap.dedent(inspect.getsource(config)), {}
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            words = [line.partition("#")[2].strip() for line in lines[first : node.end_lineno]]
            found[ast.unparse(node.target)] = " ".join(filter(None, words))
    return found


def shown(config: type, prefix: str) -> Iterator[str]:
    """Yields the lines of the knobs of a config, then those of its sections."""
    meanings = comments(config)
    for each in fields(config):
        if is_dataclass(each.default_factory):
            continue
        value, meaning = repr(each.default).replace("'", '"'), meanings[each.name]
        if type(each.default) is int:
            value = f"{each.default:_}"
        line = f"    config.{prefix}{each.name} = {value}"
        if len(line) + len(meaning) + 4 <= WIDTH:
            yield f"{line}  # {meaning}"
        else:
            yield textwrap.fill(meaning, WIDTH, initial_indent="    # ", subsequent_indent="    # ")
            yield line
    for name, section in sections(config).items():
        yield f"\n    # {(section.__doc__ or '').splitlines()[0]}"
        yield from shown(section, f"{name}.")


def base_config() -> str:
    """The text of `configs/base.py`."""
    return "\n".join((HEADER, *shown(RunConfig, ""), "", "    return config", ""))


if __name__ == "__main__":
    BASE.write_text(base_config(), encoding="utf-8")
