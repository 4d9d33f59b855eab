"""A trained model, back from its folder."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from transformer.config import RunConfig
from transformer.data.corpus import Tokenizers, saved_tokenizers
from transformer.modules.model import Model, Params
from transformer.parallel import hosts
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import TrainState, abstract_state
from transformer.workdir import Workdir


class Trained(NamedTuple):
    """A run at one of its checkpoints.

    variables: what the model is evaluated with; of a population with a first axis of replicas.
    stopped: of each replica, whether a NaN or Inf stopped it: its parameters are old.
    """

    cfg: RunConfig
    tokenizers: Tokenizers
    model: Model
    step: int
    variables: Params
    stopped: list[bool]


def load(workdir: Workdir, mesh: Mesh, checkpoint: str = "latest") -> Trained:
    """Restores a run by its own saved config. Its dataset need not be there.

    Args:
      workdir: the run's folder.
      mesh: the devices; any that the parameters fit on.
      checkpoint: latest, best, or the number of a step.

    Raises:
      UserError: the folder holds no run, or the checkpoint is missing or damaged.
    """
    cfg, tokenizers, model, like = outline(workdir, mesh)
    with Checkpoints(workdir.checkpoints, None, cfg.best_metric) as checkpoints:
        step = checkpoints.find(checkpoint)
        state = checkpoints.restore(step, like)
    stopped = np.atleast_1d(hosts.fetch(state.skipped)) > cfg.max_skipped_steps
    return Trained(cfg, tokenizers, model, step, state.variables(), stopped.tolist())


def outline(workdir: Workdir, mesh: Mesh) -> tuple[RunConfig, Tokenizers, Model, TrainState]:
    """A run without its arrays: config, tokenizers, model, the state's shapes on `mesh`.

    Raises:
      UserError: the folder holds no run.
    """
    cfg = RunConfig.from_config_dict(workdir.read_config())
    tokenizers = saved_tokenizers(cfg.data, workdir.tokenizers)
    workdir.check_corpus(tokenizers.digests())
    model = Model.of(cfg.model, *tokenizers)
    like = abstract_state(model, cfg.step_config(), mesh, cfg.replicas, cfg.hparams())
    return cfg, tokenizers, model, like
