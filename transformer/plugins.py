"""Modules of other people that add entries to the tables, such as `NORMS["mine"] = MyNorm`.

A run's config names them (`plugins`), for whoever loads the run needs them too. A folder of a run
may come from anybody: what it names is imported only if the command names it again.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path

from transformer.errors import UserError

_loaded: set[str] = set()


def load(names: Iterable[str]) -> None:
    """Imports modules that are installed or on PYTHONPATH.

    Raises:
      UserError: one is not there, or fails.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"plugins={names}: names of modules, such as ('my_norms',)")
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever another's module may raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"plugins: {name} cannot be imported ({type(error).__name__}: {reason}); install "
                "it, or name its folder in PYTHONPATH"
            ) from error
        _loaded.add(name)


def check(names: Iterable[str], run: Path) -> None:
    """Raises a UserError for a plugin of a saved run that `load` was not asked for."""
    missing = ",".join(name for name in names if name not in _loaded)
    if missing:
        raise UserError(
            f"{run} was trained with {missing}, which is not imported on a folder's word alone: "
            f"name it too, by --plugins={missing} or transformer.load(…, plugins=({missing!r},))"
        )
