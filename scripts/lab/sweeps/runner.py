"""Runs the programs of a sweep, each in its own process, and reports their progress."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab.sweeps.sweep import Program, averaged
from transformer.config import RUNTIME_KNOBS, RunConfig, continued, differences
from transformer.console import console, progress, table
from transformer.data.corpus import open_corpus
from transformer.errors import UserError, explained, needs
from transformer.run import Run
from transformer.training.interruption import PARENT, Interrupted
from transformer.workdir import Workdir

ROOT = Path(__file__).parents[3]
Call = tuple[list[list[str]], Path]  # arguments of `run_commands`


def is_done(program: Program, workdir: Path) -> bool:
    """Whether the folder holds the finished results of this program.

    Raises:
      UserError: the folder holds a run of another config, which nothing of this program replaces.
    """
    folder = Workdir(str(workdir))
    if not (folder.trained() or folder.results.exists()):
        return False
    try:
        saved = folder.read_record()["config"]
    except UserError:  # a damaged record, which its program will report
        return False
    config = continued(program.resolved(), saved)
    if changes := differences(saved, config):
        fault = f"{workdir} holds a run of another config ({'; '.join(changes)})"
        raise UserError(f"{fault}; choose another --workdir, or delete that folder")
    if differences(saved, config, RUNTIME_KNOBS):
        return False  # it is evaluated in another way
    return all(path.exists() for path in program.outputs(workdir))


def run_all(
    programs: Sequence[Program],
    root: Path,
    data_dir: str | None,
    *,
    jobs: int = 1,
    cluster: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Runs the programs that are not done; a failing program does not stop the others.

    On this machine `jobs` processes run at a time, each on its share of the cores; `cluster` is
    `slurm` or `local` to submit each program through submitit, whose executor gets `parameters`.
    Returns name → reason of each program that failed.
    """
    root = root.absolute()
    waiting = [each for each in programs if not is_done(each, root / each.name)]
    if done := len(programs) - len(waiting):
        console.print(f"{done} of {len(programs)} programs are already done")
    # Prepared once here: concurrent programs would prepare the same dataset several times.
    for data in {RunConfig.from_config_dict(each.resolved()).data for each in waiting}:
        open_corpus(data, data_dir)
    calls = []
    for each in waiting:
        folder = root / each.name
        for stale in each.outputs(folder):
            stale.unlink(missing_ok=True)
        shutil.rmtree(averaged(folder), ignore_errors=True)
        calls.append((each.commands(folder, data_dir), folder / "log.txt"))
    if cluster is None:
        submitted = on_this_machine(calls, jobs)
    else:
        submitted = through_submitit(calls, root, cluster, parameters or {})
    failures = {}
    with submitted as futures:
        left = {program.name: future for program, future in zip(waiting, futures, strict=True)}
        for number, (name, why) in enumerate(progress(_ended(left), len(waiting), "sweep"), 1):
            console.print(f"{number}/{len(waiting)}  {name}: {f'failed, {why}' if why else 'done'}")
            if why:
                failures[name] = why
    return failures


def check(failures: Mapping[str, str], root: Path) -> None:
    """Raises a UserError that names the programs that failed, if any."""
    if failures:
        named = "; ".join(f"{name} ({why})" for name, why in failures.items())
        raise UserError(
            f"programs failed: {named}; see log.txt in their folders under {root}, and give the "
            "command again to run them again"
        )


def show(title: str, programs: Sequence[Program], root: Path, data_dir: str | None) -> None:
    """Prints the commands of every program, and a table of the programs with their cost."""
    rows = []
    for program in programs:
        for command in program.commands(root / program.name, data_dir):
            print(shlex.join(["python", *command]))
        config = RunConfig.from_config_dict(program.resolved())
        flops = config.steps * Run(config, data_dir=data_dir).step_flops
        rows.append((program.name, str(config.replicas), f"{config.steps:,}", f"{flops:.3g}"))
    table(title, ("program", "runs", "steps", "FLOPs per run"), rows)


def stop(*_: Any) -> None:
    """Ends the programs on a signal; each saves a checkpoint."""
    raise Interrupted("it was asked to stop; give the same command again to resume")


def _ended(left: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The name of each future as it ends, and why it failed, if it did."""
    while left:
        time.sleep(0.5)
        for name in [name for name, future in left.items() if future.done()]:
            try:
                yield name, left.pop(name).result()
            except Exception as error:  # submitit has its own for a job that the cluster ended
                yield name, " ".join(str(error).split())[-200:]


def run_commands(
    commands: Sequence[Sequence[str]],
    log: Path,
    started: Callable[[subprocess.Popen], None] = lambda process: None,  # gets each process
) -> str | None:
    """Runs programs of the repository in turn; the last line of output of one that fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "120", PARENT: str(os.getpid())},
            )
            started(process)
            if process.wait() != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return lines[-1] if lines else f"exit status {process.returncode}"
    return None


@contextlib.contextmanager
def on_this_machine(calls: Sequence[Call], jobs: int) -> Iterator[list[Future]]:
    """A future for each call, `jobs` at a time; an exception terminates their processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[i::jobs] for i in range(jobs)] if 1 < jobs <= len(cores) else []
    started: list[subprocess.Popen] = []

    def pin() -> None:  # a thread, from which its processes inherit it
        if shares:
            os.sched_setaffinity(0, shares.pop())

    with ThreadPoolExecutor(jobs, initializer=pin) as pool:
        try:
            yield [pool.submit(run_commands, *call, started.append) for call in calls]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise


@contextlib.contextmanager
def through_submitit(
    calls: Sequence[Call], root: Path, cluster: str, parameters: Mapping[str, Any]
) -> Iterator[list[Any]]:
    """A submitit job for each call; the jobs outlive this process."""
    with needs("cluster"):
        import cloudpickle  # pyright: ignore[reportMissingImports]
        import submitit  # pyright: ignore[reportMissingImports]  # an extra
    # A job's process does not have scripts/ on its path, and could not import this module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with explained(f"--cluster={cluster}: {{reason}}"):
        executor = submitit.AutoExecutor(folder=root / "submitit", cluster=cluster)
        executor.update_parameters(name=root.name, **parameters)
        with executor.batch():
            jobs = [executor.submit(run_commands, *call) for call in calls]
    yield jobs
