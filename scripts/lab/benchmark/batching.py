"""Which examples the peers' batches hold: the same ones as ours, once an epoch."""

import numpy as np
from jaxtyping import Int

POOL = 10  # batches whose examples are sorted together by length


class Batches:
    """Rows of the training strings for each step, a function of (seed, step) alone.

    Args:
      lengths: tokens of each string.
      batch: strings a step; what is left over of an epoch waits for another order.
      seed: of the order.
      batching: `padded`: as they come; `bucketed`: strings of about one length together.
    """

    def __init__(self, lengths: Int[np.ndarray, "n"], batch: int, seed: int, batching: str):
        self.lengths, self.batch, self.seed, self.batching = lengths, batch, seed, batching
        pool = POOL if batching == "bucketed" else 1
        self.per_epoch = len(lengths) // (batch * pool) * pool
        if not self.per_epoch:
            raise ValueError(f"{len(lengths)} strings are too few for {pool} batches of {batch}")
        self.epoch = -1
        self.rows = np.zeros((0, batch), int)

    def __getitem__(self, step: int) -> Int[np.ndarray, "batch"]:
        epoch, within = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.rows = epoch, self.draw(epoch)
        return self.rows[within]

    def draw(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """The batches of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(len(self.lengths))[: self.per_epoch * self.batch]
        if self.batching == "padded":
            return rows.reshape(-1, self.batch)
        pools = rows.reshape(-1, POOL * self.batch)
        order = np.argsort(self.lengths[pools], axis=1, kind="stable")
        pools = np.take_along_axis(pools, order, axis=1).reshape(-1, POOL, self.batch)
        return shuffled(pools, rng)


def shuffled(pools: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The batches of each pool in random order, for a pool is not to end with its longest."""
    return np.concatenate([pool[rng.permutation(len(pool))] for pool in pools])


def by_length(lengths: Int[np.ndarray, "n"], batch: int) -> list[Int[np.ndarray, "rows"]]:
    """Rows to decode together: `batch` at a time of about one length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch] for first in range(0, len(order), batch)]
