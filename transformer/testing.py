"""Checks of what a model's outputs depend on, for a model of any library.

A model is a function from inputs [B, S, …] to outputs [B, T, …]. It is given NumPy arrays of tokens
or of vectors, and returns an array of NumPy, JAX or PyTorch, such as logits. A model of two inputs
is checked in each of them:

    found = future_leaks(lambda target: model(source, target), target)
    found += packing_leaks(
        lambda source: model(source, target), source, source_segments, target_segments
    )
    assert not found, "\\n".join(map(str, found))

The checks return what is wrong, with its position and magnitude, or an empty list. They show
dependence for the given inputs and parameters. A weight or scale that is initially 0 hides what its
layer reads, so give such parameters random values first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from transformer.errors import UserError

Model = Callable[[Any], Any]
Array = np.ndarray | jax.Array


class Leak(NamedTuple):
    """An output that depends on an input that it must not read."""

    row: int
    output: int  # its position
    reads: int  # the position of the input
    magnitude: float  # the largest change of the output; NaN if the output is

    def __str__(self) -> str:
        place = f"row {self.row}: output {self.output} reads input {self.reads}"
        return f"{place} ({self.magnitude:.2g})"


class Difference(NamedTuple):
    """An output on which two computations disagree."""

    row: int
    output: int  # its position
    magnitude: float  # the largest difference; NaN if an output is

    def __str__(self) -> str:
        return f"row {self.row}: output {self.output} differs by {self.magnitude:.2g}"


def influence(
    model: Model, inputs: Shaped[Array, "B S *F"], *, atol: float = 0.0
) -> Float[np.ndarray, "B T S"]:
    """Returns the largest change of each output when one input changes into another.

    The model is called S + 2 times, always with arrays of one shape. A call replaces the inputs at
    one position of all rows, each by one other input of the batch. An output that another value
    would change, or only another row, may not show; use several batches. Where an output is NaN,
    its change is.

    Args:
      model: a function of the inputs.
      inputs: a batch.
      atol: by how much two calls with the same inputs may differ.

    Raises:
      UserError: all inputs are equal, or no output changes with any input, which shows nothing; or
        two calls with the same inputs differ.
    """
    inputs, changes = _checked(inputs), []
    usual, others = _call(model, inputs), _others(inputs)
    if not np.allclose(_call(model, inputs), usual, rtol=0.0, atol=atol, equal_nan=True):
        raise UserError(
            "two calls with the same inputs differ, so every input would show as a leak: switch "
            "dropout off, with eval() or deterministic=True, or fix its random keys; for "
            "rounding, such as of a GPU's atomic additions, raise atol"
        )
    for position in range(inputs.shape[1]):
        changed = inputs.copy()
        changed[:, position] = others[:, position]
        changes.append(_largest(_distance(usual, _call(model, changed))))
    found = np.stack(changes, axis=-1)
    if not found.any():
        raise UserError(
            "no output changes with any input, so no leak could show: let the model use its "
            "argument, and give parameters that are 0 random values"
        )
    return found


def leaks(
    model: Model,
    inputs: Shaped[Array, "B S *F"],
    may_read: Bool[Array, "*B T S"],
    *,
    atol: float = 0.0,
) -> list[Leak]:
    """Returns the outputs that change with an input that they may not read.

    Args:
      model: a function of the inputs; see `influence`, also for errors.
      inputs: a batch.
      may_read: which inputs each output may depend on, for all rows or for each.
      atol: changes up to this are rounding. None is expected of masked attention, which adds exact
        zeros, but may be of a convolution by FFT, or of a GPU's atomic additions.
    """
    found, allowed = influence(model, inputs, atol=atol), np.asarray(may_read, bool)
    if allowed.shape not in (found.shape, found.shape[1:]):
        needed = f"these inputs and outputs need {found.shape[1:]} or {found.shape}"
        raise UserError(f"the rule has the shape {allowed.shape}, and {needed}")
    if allowed.all():
        raise UserError("every output may read every input, so no leak could show")
    places = np.argwhere(~(found <= atol) & ~allowed).tolist()
    return [
        Leak(row, output, reads, float(found[row, output, reads])) for row, output, reads in places
    ]


def future_leaks(
    model: Model, inputs: Shaped[Array, "B T *F"], *, window: int | None = None, atol: float = 0.0
) -> list[Leak]:
    """Returns the outputs that depend on a later input, or on one before the `window`.

    Output t may read the inputs up to t, or the last `window` of them. See `leaks` for `atol`.
    """
    if window is not None and window < 1:
        raise UserError(f"window={window}: it must be at least 1")
    length = _checked(inputs).shape[1]
    back = np.arange(length)[:, None] - np.arange(length)
    return leaks(model, inputs, (back >= 0) & (back < (window or length)), atol=atol)


def padding_leaks(
    model: Model,
    inputs: Shaped[Array, "B S *F"],
    input_padding: Bool[Array, "B S"],
    output_padding: Bool[Array, "B T"],
    *,
    atol: float = 0.0,
) -> list[Leak]:
    """Returns the outputs that depend on padding; those of padding may depend on anything.

    The model must be told what padding is by a mask or by lengths: one that recognises padding by
    its token sees none in the changed inputs. Compare that one's outputs with and without padding
    by `differences`.
    """
    segments = (1 - np.asarray(each, int) for each in (input_padding, output_padding))
    return packing_leaks(model, inputs, *segments, atol=atol)


def packing_leaks(
    model: Model,
    inputs: Shaped[Array, "B S *F"],
    input_segments: Int[Array, "B S"],
    output_segments: Int[Array, "B T"],
    *,
    atol: float = 0.0,
) -> list[Leak]:
    """Returns the outputs that depend on another example of their packed row, or on padding.

    Segments number the examples of a row from 1. Segment 0 is padding, whose outputs may depend on
    anything.
    """
    own, outputs = np.asarray(input_segments), np.asarray(output_segments)
    shape = _checked(inputs).shape[:2]
    if own.shape != shape or outputs.ndim != 2 or len(outputs) != len(own):
        shapes = f"not of shapes {own.shape} and {outputs.shape}"
        raise UserError(f"padding or segments must be [B, S] = {list(shape)} and [B, T], {shapes}")
    own, outputs = own[:, None, :], outputs[:, :, None]
    return leaks(model, inputs, (outputs == own) | (outputs == 0), atol=atol)


def differences(
    found: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-5
) -> list[Difference]:
    """Returns where outputs [B, T, …] differ by more than `atol` + `rtol` · |expected|.

    For outputs of two computations: with and without a cache, packed and not, padded and not.
    """
    return _listed(_excess(_array(found), _array(expected), rtol, atol))


def _excess(
    found: Float[np.ndarray, "..."], expected: Float[np.ndarray, "..."], rtol: float, atol: float
) -> Float[np.ndarray, "B T"]:
    if found.shape != expected.shape or found.ndim < 2:
        shapes = f"shapes {found.shape} and {expected.shape}"
        raise UserError(f"outputs of {shapes} cannot be compared: both must be the same [B, T, …]")
    close = np.isclose(found, expected, rtol=rtol, atol=atol)
    return _largest(np.where(close, 0.0, _distance(found, expected)))


def _listed(magnitudes: Float[np.ndarray, "B T"]) -> list[Difference]:
    places = np.argwhere(magnitudes != 0).tolist()
    return [Difference(row, output, float(magnitudes[row, output])) for row, output in places]


def cache_differences(
    model: Model,
    step: Callable[[Any, Any], tuple[Any, Any]],
    cache: Any,
    inputs: Shaped[Array, "B T *F"],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> list[Difference]:
    """Returns where decoding with a cache differs from one call with all inputs.

    Args:
      model: a function of all inputs: teacher forcing, without a cache.
      step: (inputs [B, 1, …] of one position, cache) → (outputs [B, 1, …], next cache).
      cache: that of the first step.
      inputs: a batch.
      rtol: relative tolerance.
      atol: absolute tolerance.
    """
    inputs, outputs = _checked(inputs), []
    _others(inputs)  # refuses equal inputs
    for position in range(inputs.shape[1]):
        output, cache = step(inputs[:, [position]], cache)
        outputs.append(_array(output))
    found = np.concatenate(outputs, axis=1)
    return differences(found, _call(model, inputs), rtol=rtol, atol=atol)


def permutation_differences(
    model: Model, inputs: Shaped[Array, "B S *F"], *, rtol: float = 1e-4, atol: float = 1e-5
) -> list[Difference]:
    """Returns where a model is not permutation equivariant, as attention without positions is.

    Swapping two neighbours must swap their outputs and leave the others. The outputs are those that
    fail for some swap, each with its largest difference, at its position without the swap.
    """
    inputs, changed = _checked(inputs), False
    _others(inputs)  # refuses equal inputs
    usual = _call(model, inputs)
    worst = np.zeros(usual.shape[:2])
    if usual.shape[1] != inputs.shape[1]:
        raise UserError(f"{inputs.shape[1]} inputs need as many outputs, not {usual.shape[1]}")
    for position in range(inputs.shape[1] - 1):
        order = np.arange(inputs.shape[1])
        order[[position, position + 1]] = position + 1, position
        swapped = _call(model, inputs[:, order])
        changed |= bool(_distance(swapped, usual).any())
        worst = np.maximum(worst, _excess(swapped[:, order], usual, rtol, atol))
    if not changed:
        raise UserError("no output changes with the order of the inputs, so nothing could show")
    return _listed(worst)


def nonfinite_gradients(gradients: Any) -> list[str]:
    """Returns the names of the arrays that hold a NaN or an infinity.

    Take the gradients of a batch in which some query may attend to no key. `gradients` is any
    pytree: of `jax.grad`, or {name: parameter.grad} of a PyTorch module.
    """
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    if not leaves:
        raise UserError("there are no gradients, of which none could show")
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [name(path) for path, leaf in leaves if not np.isfinite(_array(leaf)).all()]


def _array(value: Any) -> Float[np.ndarray, "*X"]:
    """An array of any library, as one of NumPy."""
    if not hasattr(value, "shape"):
        kind = type(value).__name__
        raise UserError(f"expected an array [B, T, …], such as logits, and got a {kind}")
    if hasattr(value, "detach"):  # of PyTorch; NumPy knows neither its devices nor its bfloat16
        value = value.detach().cpu()
        value = value if value.is_complex() else value.double()
    value = np.asarray(value)
    if np.iscomplexobj(value):
        raise UserError("expected real numbers: give real and imaginary parts as two channels")
    return value.astype(np.float64)


def _checked(inputs: Any) -> np.ndarray:
    """The inputs, or a UserError if they have no rows or no positions."""
    inputs = np.asarray(inputs)
    if inputs.ndim < 2 or not inputs.size:
        raise UserError(f"inputs must be [B, S, …], not of shape {inputs.shape}")
    return inputs


def _call(model: Model, inputs: Shaped[np.ndarray, "B S *F"]) -> Float[np.ndarray, "B T *X"]:
    """The model's outputs; a copy of the inputs is theirs to change."""
    outputs = _array(model(inputs.copy()))
    if outputs.ndim < 2 or len(outputs) != len(inputs):
        raise UserError(f"outputs must be [{len(inputs)}, T, …], not of shape {outputs.shape}")
    return outputs


def _others(inputs: Shaped[np.ndarray, "B S *F"]) -> Shaped[np.ndarray, "B S *F"]:
    """For each input the next of those that occur in the batch, in sorted order."""
    flat = inputs.reshape(inputs.shape[0] * inputs.shape[1], -1)
    kinds, which = np.unique(flat, axis=0, return_inverse=True)
    if len(kinds) < 2:
        raise UserError("all inputs are equal: give at least two kinds, to change one into another")
    return kinds[(which.reshape(-1) + 1) % len(kinds)].reshape(inputs.shape)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|one - other|; 0 also between equal infinities, NaN where one is NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(one == other, 0.0, np.abs(one - other))


def _largest(values: Float[np.ndarray, "B T *X"]) -> Float[np.ndarray, "B T"]:
    return values.max(axis=tuple(range(2, values.ndim)), initial=0.0)
