"""The folder of a run: config, metrics, checkpoints, tokenizers, plots."""

import contextlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from transformer import plugins
from transformer.config import continued, differences, fixed_knobs, saved_config
from transformer.console import console
from transformer.errors import UserError
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
        self.holding: IO[str] | None = None  # the lock, where this process has it

    def read_config(self) -> ConfigDict:
        """Returns `known_config` of a run whose plugins have been imported.

        Raises:
          UserError: the folder holds no run, or a plugin was not named by the command.
        """
        config = self.known_config()
        plugins.check(config.plugins, self.path)
        return config

    def known_config(self) -> Any:
        """Returns the config that the run was started with, with the defaults of newer knobs.

        Raises:
          UserError: the folder holds no run.
        """
        record = self.read_record()
        with self.undamaged():
            return saved_config(record["config"])

    def read_record(self) -> dict[str, Any]:
        """Returns what `write_config` wrote.

        Raises:
          UserError: the folder holds no run.
        """
        with self.undamaged():
            record = json.loads(self.config.read_text(encoding="utf-8"))
            if not (isinstance(record["config"], dict) and isinstance(record["corpus"], dict)):
                raise TypeError("it is not the record of a run")
            return record

    @contextlib.contextmanager
    def undamaged(self) -> Iterator[None]:
        """Turns errors of reading `config.json` into a UserError."""
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} holds no run: train first, or name a run's folder"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config} is damaged ({error}); restore it or train from the start"
            ) from error

    def trained(self) -> bool:
        """Whether it has checkpoints."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def check_corpus(self, identity: Mapping[str, str]) -> None:
        """Compares data (`Corpus.identity`, or a part of it) with what the run was trained on.

        Raises:
          UserError: they differ.
        """
        own = self.read_record()["corpus"]
        changed = [
            f"{name} {own.get(name)} → {value}"
            for name, value in identity.items()
            if own.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} was trained on other data ({'; '.join(changed)}); bring those back, "
                "or choose another --workdir"
            )

    def claim(self, config: ConfigDict, *, allow_changes: bool) -> None:
        """Creates the folder if this run may use it; its contents stay as they are.

        Args:
          config: the resolved config.
          allow_changes: whether it may hold checkpoints of another config.

        Raises:
          UserError: it holds checkpoints of another config, or an average.
          OSError: it cannot be written to.
        """
        if self.trained():
            self.check_claim(config, allow_changes)
        self.path.mkdir(parents=True, exist_ok=True)
        self.plots.mkdir(exist_ok=True)

    def check_claim(self, config: ConfigDict, allow_changes: bool) -> None:
        """Raises a UserError unless `config` may resume the run in this folder."""
        if "averaged" in self.read_record():
            raise UserError(
                f"{self.path} holds an average of checkpoints, which cannot be trained further; "
                "choose another --workdir"
            )
        before = self.known_config()
        changes = differences(before, continued(config, before))
        fixed = [each for each in changes if each.partition(":")[0] in fixed_knobs(config)]
        if fixed:
            raise UserError(
                f"{self.path} holds a run with other tokens ({'; '.join(fixed)}), which it "
                "keeps to its end; choose another --workdir"
            )
        if changes and not allow_changes:
            raise UserError(
                f"{self.path} holds a run of another config ({'; '.join(changes)}); choose "
                "another --workdir, or --allow_changes to resume from its checkpoint"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, which the system releases when the process ends.

        Raises:
          UserError: another process holds it.
        """
        hosts.once(self.lock)
        try:
            yield
        finally:
            if self.holding is not None:
                self.holding.close()

    def lock(self) -> None:
        """Takes the lock, on a file that says who holds it."""
        file = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            import fcntl  # not on every system

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(
                f"{self.path} is in use by {holder}: wait for its end, or choose another --workdir"
            ) from error
        except (ImportError, OSError) as error:
            console.print(f"{self.path} cannot be locked ({error}): see that nothing else uses it")
            file.close()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.holding = file

    def write_config(self, config: ConfigDict, identity: Mapping[str, str]) -> None:
        """Writes `config.json`: the config, `Corpus.identity`, versions and the commit."""
        record = {"config": config.to_dict(), "corpus": dict(identity)}
        write_json(self.config, record | {"versions": versions(), "commit": commit()})

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`."""
        write_json(self.results, results)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, on the first of several hosts."""
    if hosts.first():
        write_atomically(path, (to_json(record, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def commit() -> str | None:
    """Returns the commit of this code, with `+` if files differ from it, if it is a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            # Without locks, which would outlive a process that is killed meanwhile.
            ("git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
