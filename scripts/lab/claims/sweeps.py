"""What the claims take from sweeps: their records, and how long a step of a variant takes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.claims.page import Setting
from lab.sweeps import report, runner
from lab.sweeps.report import Record
from lab.sweeps.sweep import Program, Run, Sweep, all_runs, load_sweep, plan
from lab.timing import in_process, interleaved
from transformer.config import RunConfig
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.modules.model import Model, Params
from transformer.parallel.mesh import one_device_mesh
from transformer.training.metrics import by_replica
from transformer.training.step import init_state, make_train_step, make_train_steps, zero_sums
from transformer.training.trained import load
from transformer.training.workdir import Workdir

STEPS, ROUNDS = 10, 5  # of training, in a timing; of timings, in a process
REPLICAS = 8  # as `scripts/sweep.py` groups them unless told otherwise, so that both share runs


def file_of(name: str) -> str:
    """The path of a shipped sweep."""
    return str(runner.ROOT / "configs" / "ablations" / f"{name}.py")


def records(setting: Setting, name: str) -> dict[str, list[Record]]:
    """Every variant's seeds of a shipped sweep, which is carried out where it is not yet.

    Raises:
      UserError: one of its programs failed.
    """
    sweep = load_sweep(file_of(name))
    programs = plan(sweep, REPLICAS)
    root = setting.root / name
    outcomes = runner.run_all(
        programs, root, setting.data_dir, jobs=setting.jobs, cluster=None, cluster_parameters={}
    )
    failed = [each.program.name for each in outcomes if each.failure is not None]
    if failed:
        raise UserError(
            f"of the sweep {name} failed: {', '.join(failed)}; see log.txt in their folders "
            f"under {root}, and give the command again"
        )
    found: dict[str, list[Record]] = {variant: [] for variant in sweep.variants}
    for program, replica, run in all_runs(programs):
        found[run.variant].append(report.read(sweep, program, replica, run, root))
    return {name: sorted(each, key=lambda one: one.run.seed) for name, each in found.items()}


def target_of(name: str) -> float:
    """The validation accuracy that a shipped sweep is run to."""
    return load_sweep(file_of(name)).target


def trained(setting: Setting, name: str, variant: str) -> list[tuple[Model, Params]]:
    """Each seed of a variant as it ended; `records` has been called before."""
    found, loaded = [], {}
    for program, replica, run in all_runs(plan(load_sweep(file_of(name)), REPLICAS)):
        if run.variant == variant:
            if program.name not in loaded:
                workdir = Workdir(str(setting.root / name / program.name))
                loaded[program.name] = load(workdir, one_device_mesh())
            one = loaded[program.name]
            variables = by_replica(one.variables, one.cfg.replicas)[replica]
            found.append((one.model, jax.tree.map(jnp.asarray, variables)))
    return found


def trainer(sweep: Sweep, variant: str, data_dir: str | None, steps: int) -> Callable[[], Any]:
    """A call that takes so many training steps of a variant, as `train.py` does."""
    overrides = {**sweep.overrides, **sweep.variants[variant]}
    alone = Program(variant, sweep.config, overrides, (Run(variant, 0),), ())
    cfg = RunConfig.from_config_dict(alone.resolved())
    corpus = open_corpus(cfg.data, data_dir)
    data = jax.device_put(corpus.load(cfg.data.train, cfg.batch_size))
    model, step_config = Model.of(cfg.model, *corpus.tokenizers), cfg.step_config()
    state = jax.jit(partial(init_state, model, step_config))(np.uint32(0), {})
    train_steps = jax.jit(make_train_steps(make_train_step(model, step_config)))
    return lambda: train_steps(state, zero_sums(), data, jnp.int32(steps))


def seconds_a_step(name: str, variants: Sequence[str], data_dir: str | None) -> dict[str, float]:
    """Of each variant of a shipped sweep: a single run on all cores of this process, in turns."""
    sweep = load_sweep(file_of(name))
    calls = {variant: trainer(sweep, variant, data_dir, STEPS) for variant in variants}
    return {
        variant: float(np.median(found)) / STEPS
        for variant, found in interleaved(calls, ROUNDS).items()
    }


def step_times(
    name: str, variants: Sequence[str], data_dir: str | None, processes: int
) -> dict[str, list[float]]:
    """`seconds_a_step` in each of several fresh processes."""
    found = [in_process(None, seconds_a_step, name, variants, data_dir) for _ in range(processes)]
    return {variant: [each[variant] for each in found] for variant in variants}


def curves(records: Sequence[Record]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and the mean, the lowest and the highest validation accuracy over seeds."""
    values = np.array([[y for _, y in seed.curve] for seed in records])
    return [x for x, _ in records[0].curve], values.mean(0), values.min(0), values.max(0)


def in_seconds(curve: tuple, seconds_a_step: Sequence[float]) -> tuple:
    """A curve over seconds of training instead of steps."""
    steps, *band = curve
    return ([step * float(np.median(seconds_a_step)) for step in steps], *band)
