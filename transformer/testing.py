"""Checks of what a model's outputs depend on: `leaks` and the properties that follow from it.

Every check takes a model of anyone as a function of arrays, on any backend, and returns what is
wrong, or an empty list. A model of two inputs is checked in each: `lambda target: model(source,
target)` and `lambda source: model(source, target)`.

    found = future_leaks(lambda tokens: model(tokens), tokens)
    assert not found, "\\n".join(map(str, found))

The checks change one token at a time and look at all outputs. They find what the given tokens show:
use several lengths, and more than one seed of the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

# Tokens [B, S] to outputs [B, T, …], such as logits.
Model = Callable[[Any], Any]


class Leak(NamedTuple):
    """An output that depends on a token that it must not read."""

    row: int
    output: int  # its position
    reads: int  # the position of the token
    magnitude: float  # the largest change of the output

    def __str__(self) -> str:
        return (
            f"row {self.row}: output {self.output} reads token {self.reads} ({self.magnitude:.2g})"
        )


class Difference(NamedTuple):
    """An output that differs between two ways to compute it."""

    row: int
    output: int  # its position
    magnitude: float  # the largest difference

    def __str__(self) -> str:
        return f"row {self.row}: output {self.output} differs by {self.magnitude:.2g}"


def leaks(
    model: Model,
    tokens: Int[np.ndarray, "B S"],
    may_read: Bool[np.ndarray, "*B T S"],
    *,
    tolerance: float = 1e-6,
) -> list[Leak]:
    """Returns the outputs that change with a token that they may not read.

    Args:
      model: a function of the tokens. It is called once for each position.
      tokens: a batch. Each token is replaced in turn by another one of the batch.
      may_read: for each output, which tokens it may depend on; for all rows or for each.
      tolerance: changes up to this fraction of the largest output are rounding.
    """
    tokens, found = np.asarray(tokens), []
    kinds = np.unique(tokens)
    other = kinds[(np.searchsorted(kinds, tokens) + 1) % len(kinds)]
    if len(kinds) < 2:
        raise ValueError("all tokens are equal: use at least two kinds, to change one into another")
    usual = np.asarray(model(tokens))
    allowed = np.broadcast_to(may_read, (len(tokens), usual.shape[1], tokens.shape[1]))
    for position in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, position] = other[:, position]
        magnitudes = _magnitudes(usual, model(changed), tolerance)
        for row, output in np.argwhere((magnitudes > 0) & ~allowed[..., position]).tolist():
            found.append(Leak(row, output, position, float(magnitudes[row, output])))
    return sorted(found)


def _magnitudes(one: Any, other: Any, tolerance: float) -> np.ndarray:
    """The largest difference at each position [B, T]; 0 where it is rounding, ∞ for a NaN."""
    one, other = (np.asarray(each, np.float64) for each in (one, other))
    apart = np.abs(one - other)
    apart[~np.isfinite(apart)] = np.inf
    apart = apart.reshape(*apart.shape[:2], -1).max(-1)
    largest = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return np.where(apart > tolerance * largest, apart, 0.0)


def future_leaks(
    model: Model, tokens: Int[np.ndarray, "B T"], *, window: int | None = None
) -> list[Leak]:
    """Returns the outputs that depend on a later token, or on one that a `window` excludes.

    Output t may read the tokens up to t, or the last `window` of them.
    """
    back = np.arange(tokens.shape[1])[:, None] - np.arange(tokens.shape[1])
    return leaks(model, tokens, (back >= 0) & (back < (window or tokens.shape[1])))


def padding_leaks(
    model: Model, tokens: Int[np.ndarray, "B S"], is_padding: Bool[np.ndarray, "B S"]
) -> list[Leak]:
    """Returns the outputs that depend on padding. Those at padding may depend on anything.

    The model must take the padding from elsewhere than the tokens, since these are changed.
    """
    outputs = np.asarray(model(tokens)).shape[1]
    free = is_padding[:, :, None] if outputs == tokens.shape[1] else False
    return leaks(model, tokens, ~is_padding[:, None, :] | free | np.zeros((outputs, 1), bool))


def packing_leaks(
    model: Model,
    tokens: Int[np.ndarray, "B S"],
    segments: Int[np.ndarray, "B S"],
    output_segments: Int[np.ndarray, "B T"] | None = None,
) -> list[Leak]:
    """Returns the outputs that depend on another example of their packed row.

    Examples are numbered by `segments` from 1 on; 0 is padding, whose outputs may depend on
    anything. `output_segments` are those of the outputs, if they are not at the tokens' positions.
    """
    own = segments if output_segments is None else output_segments
    return leaks(model, tokens, (own[:, :, None] == segments[:, None, :]) | (own == 0)[..., None])


def differences(one: Any, other: Any, *, tolerance: float = 1e-5) -> list[Difference]:
    """Returns where two outputs [B, T, …] differ: cached and uncached, packed and apart.

    Differences up to `tolerance` times the largest output are rounding.
    """
    found = _magnitudes(one, other, tolerance)
    places = np.argwhere(found > 0).tolist()
    return [Difference(row, output, float(found[row, output])) for row, output in places]


def permutation_differences(
    model: Model, tokens: Int[np.ndarray, "B S"], order: Sequence[int], *, tolerance: float = 1e-5
) -> list[Difference]:
    """Returns where a model of sets is not permutation equivariant: attention without positions.

    The outputs of permuted tokens must be the permuted outputs.
    """
    order = np.asarray(order)
    return differences(
        np.asarray(model(tokens))[:, order], model(tokens[:, order]), tolerance=tolerance
    )


def nonfinite_gradients(loss: Callable[[Any], Any], parameters: Any) -> list[str]:
    """Returns the names of the parameters whose gradients are not finite.

    Use a batch in which some row may attend to nothing. `parameters` is any pytree of arrays.
    """
    gradients = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(parameters))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, gradient in gradients
        if not np.isfinite(np.asarray(gradient, np.float32)).all()
    ]
