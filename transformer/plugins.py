"""Plugins: users' modules that add entries to tables, such as `NORMS["mine"] = MyNorm`.

The config of a run names them, since whoever loads the run needs them. The folder of a run may come
from a stranger: its plugins are imported only if the command names them too.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path

from transformer.errors import UserError, explained

_loaded: set[str] = set()


def load(names: Iterable[str]) -> None:
    """Imports modules that are installed or on PYTHONPATH."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"plugins={names}: names of modules, such as ('my_norms',)")
    for name in names:
        remedy = "install it, or name its folder in PYTHONPATH"
        with explained(f"plugins: {name} cannot be imported ({{kind}}: {{reason}}); {remedy}"):
            importlib.import_module(name)
        _loaded.add(name)


def check(names: Iterable[str], run: Path) -> None:
    """Raises a UserError for a plugin of a saved run that was not loaded."""
    missing = ",".join(name for name in names if name not in _loaded)
    if missing:
        raise UserError(
            f"{run} was trained with {missing}, which is not imported because a folder says so: "
            f"name it too, by --plugins={missing} or transformer.load(…, plugins=({missing!r},))"
        )
