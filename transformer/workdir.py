"""The folder of a run: its config, its metrics, its checkpoints, its plots."""

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
from transformer.parallel import hosts
from transformer.strict_json import dumps


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
        """`known_config`, to be resolved.

        Raises:
          UserError: the folder is no run's, or the run has a plugin that nobody has named.
        """
        config = self.known_config()
        plugins.check(config.plugins, self.path)
        return config

    def known_config(self) -> Any:
        """The config that the run was started with, with the defaults of newer knobs.

        Raises:
          UserError: the folder is no run's.
        """
        try:
            return saved_config(self.read_record()["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config} is damaged ({error}); restore it or train anew"
            ) from error

    def read_record(self) -> dict[str, Any]:
        """What `write_config` wrote.

        Raises:
          UserError: the folder is no run's.
        """
        try:
            record = json.loads(self.config.read_text(encoding="utf-8"))
            if not (isinstance(record["config"], dict) and isinstance(record["corpus"], dict)):
                raise TypeError("it is no record of a run")
            return record
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} holds no run: train first, or name a run's folder"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config} is damaged ({error}); restore it or train anew"
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
            f"{name} {own.get(name)} → {identity[name]}"
            for name in identity
            if own.get(name) != identity[name]
        ]
        if changed:
            raise UserError(
                f"{self.path} was trained on other data ({'; '.join(changed)}); bring those back, "
                "or choose another --workdir"
            )

    def claim(self, config: ConfigDict, *, allow_changes: bool) -> None:
        """Makes the folder, if it may be this run's own; what is in it stays as it is.

        Args:
          config: the resolved config.
          allow_changes: go on with checkpoints of another config.

        Raises:
          UserError: it holds checkpoints of another config, or an average of another run's.
          OSError: it cannot be written to.
        """
        if self.trained() and "averaged" in self.read_record():
            raise UserError(
                f"{self.path} holds an average of checkpoints, from which no training goes on; "
                "choose another --workdir"
            )
        if self.trained():
            before = self.known_config()
            changes = differences(before, continued(config, before))
            kept = [each for each in changes if each.partition(":")[0] in fixed_knobs(config)]
            if kept:
                raise UserError(
                    f"{self.path} holds a run with other tokens ({'; '.join(kept)}), which it "
                    "keeps to its end; choose another --workdir"
                )
            if changes and not allow_changes:
                raise UserError(
                    f"{self.path} holds a run of another config ({'; '.join(changes)}); choose "
                    "another --workdir, or --allow_changes to go on from its checkpoint"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self.plots.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps others from training in this folder. The system lets go of it when a process dies.

        Raises:
          UserError: another does.
        """
        hosts.once(self.lock)
        try:
            yield
        finally:
            if self.holding is not None:
                self.holding.close()

    def lock(self) -> None:
        """Takes the lock, a file that says who holds it."""
        file = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            import fcntl  # not on every system, and only needed here

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if not isinstance(error, BlockingIOError):
                console.print(
                    f"{self.path} cannot be locked ({error}): see that nothing else uses it"
                )
                file.close()
                return
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(
                f"{self.path} is in use by {holder}: wait for its end, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.holding = file

    def write_config(self, config: ConfigDict, identity: Mapping[str, str]) -> None:
        """Writes `config.json`: the config, its data (`Corpus.identity`), what it is made with."""
        record = {"config": config.to_dict(), "corpus": dict(identity)}
        record |= {"versions": versions(), "commit": commit()}
        write_json(self.config, record)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`: what the finished run came to."""
        write_json(self.results, results)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a file that is never seen half written, null for NaN.

    Of several hosts the first does.
    """
    if not hosts.first():
        return
    fresh = path.with_suffix(".tmp")
    fresh.write_text(dumps(record, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def versions() -> dict[str, str]:
    """What the run was made with."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def commit() -> str | None:
    """The commit of this code, with `+` if files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            # Without locks: of a process that is killed meanwhile one would stay.
            ("git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
