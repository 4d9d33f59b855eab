"""The folder of a run: config, metrics, checkpoints, tokenizers, plots."""

import contextlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from transformer.config import continued, differences, fixed_knobs, loaded_plugins, saved_config
from transformer.console import console
from transformer.errors import UserError, explained
from transformer.files import to_json, write_atomically
from transformer.parallel import hosts


class Workdir:
    """The paths inside a run's folder."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tokenizers = self.path / "tokenizers"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.results = self.path / "results.json"

    def read_record(self) -> dict[str, Any]:
        """Returns what `write_config` wrote, its config with today's knobs; see `saved_config`."""
        if not self.config.exists():
            raise UserError(f"{self.path} holds no run: train first, or name a run's folder")
        message = f"{self.config} is damaged ({{reason}}); restore it or train from the start"
        with explained(message, ValueError, KeyError, TypeError):
            record = json.loads(self.config.read_text(encoding="utf-8"))
            if not (isinstance(record["config"], dict) and isinstance(record["corpus"], dict)):
                raise TypeError("it is not the record of a run")
            return record | {"config": saved_config(record["config"])}

    def read_config(self) -> Any:
        """Returns the config that the run was started with; its plugins must be imported."""
        config = self.read_record()["config"]
        # The folder may come from a stranger: it alone does not cause an import.
        if missing := ",".join(name for name in config.plugins if name not in loaded_plugins):
            raise UserError(
                f"{self.path} was trained with {missing}, which is imported only if the command "
                f"names it too: --plugins={missing}, of train.py --config.plugins, or "
                f"transformer.load(…, plugins=({missing!r},))"
            )
        return config

    def trained(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def check_corpus(self, identity: Mapping[str, str]) -> None:
        """Raises a UserError if `identity`, of a `Corpus` or a part, is not that of the run."""
        own = self.read_record()["corpus"]
        pairs = [(name, own.get(name), value) for name, value in identity.items()]
        if changed := [f"{name} {old} → {new}" for name, old, new in pairs if old != new]:
            fault = f"{self.path} was trained on other data ({'; '.join(changed)})"
            raise UserError(f"{fault}; bring those back, or choose another --workdir")

    def claim(self, config: ConfigDict, *, allow_changes: bool) -> None:
        """Creates the folder; a UserError if it has checkpoints that `config` may not resume."""
        if self.trained():
            record, other, fault = self.read_record(), "choose another --workdir", ""
            changes = differences(record["config"], continued(config, record["config"]))
            fixed = [each for each in changes if each.partition(":")[0] in fixed_knobs(config)]
            steps = record["config"].steps, config.steps
            longer = steps[0] < steps[1] and changes == [f"steps: {steps[0]} → {steps[1]}"]
            if "averaged" in record:
                fault = f"an average of checkpoints, which cannot be trained further; {other}"
            elif "imported" in record:
                fault = f"an imported model; {other}, and name this folder in --config.init_from"
            elif fixed:
                fault = f"a run with other tokens ({'; '.join(fixed)}), kept to its end; {other}"
            elif changes and not (longer or allow_changes):
                fault = f"a run of another config ({'; '.join(changes)}); {other}, "
                fault += "or --allow_changes to resume from its checkpoint"
            if fault:
                raise UserError(f"{self.path} holds {fault}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.plots.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock, a file that says by whom; the system frees it when the process ends."""
        with contextlib.ExitStack() as held:
            hosts.once(lambda: self._lock(held))
            yield

    def _lock(self, held: contextlib.ExitStack) -> None:
        file = held.enter_context((self.path / "lock").open("a+", encoding="utf-8"))
        try:
            import fcntl  # not on every system

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            fault = f"{self.path} is in use by {file.read().strip()}"
            raise UserError(f"{fault}: wait for its end, or choose another --workdir") from error
        except (ImportError, OSError) as error:
            console.print(f"{self.path} cannot be locked ({error}): see that nothing else uses it")
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    def write_config(self, config: ConfigDict, identity: Mapping[str, str]) -> None:
        """Writes `config.json`: the config, `Corpus.identity`, versions and the commit."""
        record = {"config": config.to_dict(), "corpus": dict(identity)}
        write_json(self.config, record | {"versions": versions(), "commit": commit()})


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, on the first of several hosts."""
    if hosts.first():
        write_atomically(path, (to_json(record, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}


def commit() -> str | None:
    """Returns the commit of this code, with `+` if files differ from it, if it is a checkout."""
    # Without locks, which would outlive a process that is killed meanwhile.
    git = ("git", "--no-optional-locks", "-C", str(Path(__file__).parent))
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        head = run((*git, "rev-parse", "HEAD")).stdout.strip()
        return head + "+" * bool(run((*git, "status", "--porcelain")).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None
