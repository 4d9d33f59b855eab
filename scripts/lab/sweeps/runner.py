"""Carries out the programs of a sweep, each in a process of its own, and watches them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lab.sweeps.sweep import Program
from transformer.config import RunConfig, continued, differences
from transformer.console import console
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.training.interruption import PARENT
from transformer.training.metrics import read_metrics
from transformer.training.workdir import Workdir

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Outcome:
    """How a program ended: nothing to say, or why it failed."""

    program: Program
    failure: str | None


def is_done(program: Program, workdir: Path) -> bool:
    """Whether the folder holds the finished results of this very program."""
    folder = Workdir(str(workdir))
    evaluated = [folder.path / f"eval_{split}.json" for split in program.splits]
    if not all(path.exists() for path in (folder.results, *evaluated)):
        return False
    try:
        saved = folder.known_config()
        return not differences(saved, continued(program.resolved(), saved))
    except UserError:  # a damaged record, which its program will name; the others go on
        return False


def carry_out(
    commands: Sequence[Sequence[str]],
    log: Path,
    cores: Sequence[int] = (),
    begun: Callable[[subprocess.Popen], None] = lambda process: None,
) -> str | None:
    """Runs command lines one after another, their output in `log`.

    Args:
      commands: Python files of the repository and their arguments.
      log: written anew.
      cores: the CPU cores to stay on, where the system can be told so; none: all.
      begun: is told of each process.

    Returns:
      None, or the last line of the one that failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "120", PARENT: str(os.getpid())},
            )
            begun(process)
            if cores and hasattr(os, "sched_setaffinity"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, cores)
            if process.wait() != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return lines[-1] if lines else f"exit status {process.returncode}"
    return None


def run_all(
    programs: Sequence[Program],
    root: Path,
    data_dir: str | None,
    *,
    jobs: int,
    cluster: str | None,
    cluster_parameters: Mapping[str, Any],
) -> list[Outcome]:
    """Carries out what is not done; a program that fails does not stop the others.

    Args:
      programs: of the sweep.
      root: the sweep's folder, where each program has one of its own name.
      data_dir: where TFDS keeps datasets.
      jobs: processes at a time on this machine, each with its share of the cores.
      cluster: None; or `slurm` or `local`, to submit each program through submitit.
      cluster_parameters: for submitit's executor.
    """
    waiting = [each for each in programs if not is_done(each, root / each.name)]
    if len(waiting) < len(programs):
        console.print(
            f"{len(programs) - len(waiting)} of {len(programs)} programs are done already"
        )
    # Once, and not by every program that starts: they would be in each other's way.
    for data in {RunConfig.from_config_dict(each.resolved()).data for each in waiting}:
        open_corpus(data, data_dir)
    for each in waiting:  # a result that is there will be that of this run
        folder = Workdir(str(root / each.name))
        for result in (folder.results, *folder.path.glob("eval_*.json")):
            result.unlink(missing_ok=True)
    if cluster is None:
        submitted = on_this_machine(waiting, root, data_dir, jobs)
    else:
        submitted = through_submitit(waiting, root, data_dir, cluster, cluster_parameters)
    with submitted as futures:
        failures = watch(waiting, futures, root)
    return [Outcome(each, failures.get(each.name)) for each in programs]


@contextlib.contextmanager
def on_this_machine(
    programs: Sequence[Program], root: Path, data_dir: str | None, jobs: int
) -> Iterator[list[Future]]:
    """A future for each program, `jobs` of them at a time; none outlives an interruption."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[i::jobs] for i in range(jobs)] if 1 < jobs <= len(cores) else [[]] * jobs
    free = list(shares)
    begun: list[subprocess.Popen] = []

    def one(program: Program) -> str | None:
        share = free.pop()
        try:
            place = root / program.name
            commands = program.commands(place, data_dir)
            return carry_out(commands, place / "log.txt", share, begun.append)
        finally:
            free.append(share)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield [pool.submit(one, program) for program in programs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in begun:
                process.terminate()
            raise


def parameter(text: str) -> tuple[str, int | str]:
    """`timeout_min=60` → ("timeout_min", 60)"""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--cluster_parameters: {text!r} is not of the form name=value")
    return name, int(value) if value.isdigit() else value


@contextlib.contextmanager
def through_submitit(
    programs: Sequence[Program],
    root: Path,
    data_dir: str | None,
    cluster: str,
    parameters: Mapping[str, Any],
) -> Iterator[list[Any]]:
    """A submitit job for each program; they go on if this process is ended."""
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError(
            "submitit is not installed; pip install -e '.[cluster]', or leave out --cluster"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=root / "submitit", cluster=cluster)
        executor.update_parameters(name=root.name, **parameters)
        with executor.batch():
            jobs = [
                executor.submit(
                    carry_out,
                    program.commands(root.absolute() / program.name, data_dir),
                    root.absolute() / program.name / "log.txt",
                )
                for program in programs
            ]
    except (RuntimeError, ValueError, TypeError, OSError, NameError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--cluster={cluster}: {reason}") from error
    yield jobs


def watch(programs: Sequence[Program], futures: Sequence[Any], root: Path) -> dict[str, str]:
    """Shows how far the whole is until all have ended; name → why, of those that failed."""
    steps = [program.resolved().steps for program in programs]
    started, failures, ended = time.monotonic(), {}, set()
    bar = Progress(
        TextColumn("[bold]sweep"),
        BarColumn(bar_width=28),
        TextColumn(
            "{task.percentage:.0f}% of the steps, {task.fields[ended]} of "
            f"{len(programs)} programs"
        ),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=sum(steps), ended=0)
        while len(ended) < len(programs):
            time.sleep(0.5)
            taken = sum(
                total if i in ended else min(last_step(root / program.name), total)
                for i, (program, total) in enumerate(zip(programs, steps, strict=True))
            )
            bar.update(task, completed=taken, ended=len(ended))
            for i, (program, future) in enumerate(zip(programs, futures, strict=True)):
                if i in ended or not future.done():
                    continue
                ended.add(i)
                failure = ending(future)
                if failure is not None:
                    failures[program.name] = failure
                left = (time.monotonic() - started) * (len(programs) / len(ended) - 1)
                console.print(
                    f"{len(ended)}/{len(programs)}  {program.name}: "
                    + ("done" if failure is None else f"failed, {failure}")
                    + ("" if console.is_terminal else f"; about {left:.0f} s left")
                )
        bar.update(task, completed=sum(steps), ended=len(ended))
    return failures


def ending(future: Any) -> str | None:
    """What a program that ended has to say: nothing, or why it failed."""
    try:
        return future.result()
    except Exception as error:  # submitit has its own for a job that the cluster ended
        return " ".join(str(error).split())[-200:]


def last_step(workdir: Path) -> int:
    """The last step that a run has logged."""
    try:
        rows = read_metrics(Workdir(str(workdir)).metrics)
    except (UserError, OSError):
        return 0
    return rows[-1]["step"] if rows else 0


def read_results(workdir: Path) -> dict[str, Any]:
    """What a finished program wrote.

    Raises:
      UserError: it is not there or cannot be read.
    """
    path = Workdir(str(workdir)).results
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete the folder and run again"
        ) from error
