"""A trained model, back from its folder."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from transformer import hosts
from transformer.checkpoint import Checkpoints
from transformer.config import RunConfig
from transformer.data.load import Corpus, open_corpus
from transformer.model import Model, Params
from transformer.training import abstract_state
from transformer.workdir import Workdir


class Trained(NamedTuple):
    """A run at one of its checkpoints.

    variables: what the model is evaluated with; of a population with a first axis of replicas.
    stopped: of each replica, whether a NaN or Inf stopped it: its parameters are old.
    """

    cfg: RunConfig
    corpus: Corpus
    model: Model
    step: int
    variables: Params
    stopped: list[bool]


def load(
    workdir: Workdir, mesh: Mesh, checkpoint: str = "latest", data_dir: str | None = None
) -> Trained:
    """Restores a run by its own saved config.

    Args:
      workdir: the run's folder.
      mesh: the devices; any that the parameters fit on.
      checkpoint: latest, best, or the number of a step.
      data_dir: where TFDS keeps datasets; None for its own place.

    Raises:
      UserError: the folder holds no run, or the checkpoint is missing or damaged.
    """
    cfg = RunConfig.resolve(workdir.read_config())
    corpus = open_corpus(cfg.data, data_dir)
    model = Model(cfg.model, corpus.tokenizer.vocab_size)
    like = abstract_state(model, cfg.recipe(), mesh, cfg.replicas, cfg.numbers())
    with Checkpoints(workdir.checkpoints, keep=None) as checkpoints:
        step = checkpoints.find(checkpoint)
        state = checkpoints.restore(step, like)
    stopped = np.atleast_1d(hosts.fetch(state.skipped)) > cfg.max_skipped_steps
    return Trained(cfg, corpus, model, step, state.variables(), stopped.tolist())
