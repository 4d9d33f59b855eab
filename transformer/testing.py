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
    """An output that two ways to compute it do not agree on."""

    row: int
    output: int  # its position
    magnitude: float  # the largest difference; NaN if an output is

    def __str__(self) -> str:
        return f"row {self.row}: output {self.output} differs by {self.magnitude:.2g}"


def influence(model: Model, inputs: Shaped[Array, "B S *F"]) -> Float[np.ndarray, "B T S"]:
    """Returns the largest change of each output when one input changes into another.

    The model is called S + 2 times, always with arrays of one shape. A call replaces the inputs at
    one position of all rows by other ones of the batch; an influence between rows thus shows as
    one between positions. A change from or to NaN is NaN.

    Raises:
      UserError: all inputs are equal, or no output changes with any input, which shows nothing; or
        two calls with the same inputs differ.
    """
    inputs, changes = _checked(inputs), []
    usual, others = _call(model, inputs), _others(inputs)
    if not np.allclose(_call(model, inputs), usual, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(
            "two calls with the same inputs differ, so every input would show as a leak: switch "
            "dropout off, with eval() or deterministic=True, or fix its random keys"
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
    found = influence(model, inputs)
    try:
        allowed = np.broadcast_to(np.asarray(may_read), found.shape)
    except ValueError as error:
        _, outputs, length = found.shape
        raise UserError(
            f"{outputs} outputs and {length} inputs do not fit to a rule of shape "
            f"{np.shape(may_read)}: it needs one of shape [{outputs}, {length}]"
        ) from error
    if allowed.all():
        raise UserError("every output may read every input, so no leak could show")
    places = np.argwhere(~(found <= atol) & ~allowed).tolist()
    return [
        Leak(row, output, reads, float(found[row, output, reads])) for row, output, reads in places
    ]


def future_leaks(
    model: Model, inputs: Shaped[Array, "B T *F"], *, window: int | None = None
) -> list[Leak]:
    """Returns the outputs that depend on a later input, or on one before the `window`.

    Output t may read the inputs up to t, or the last `window` of them.
    """
    if window is not None and window < 1:
        raise UserError(f"window={window}: it must be at least 1")
    length = _checked(inputs).shape[1]
    back = np.arange(length)[:, None] - np.arange(length)
    return leaks(model, inputs, (back >= 0) & (back < (window or length)))


def padding_leaks(
    model: Model,
    inputs: Shaped[Array, "B S *F"],
    input_padding: Bool[Array, "B S"],
    output_padding: Bool[Array, "B T"],
) -> list[Leak]:
    """Returns the outputs that depend on padding; those of padding may depend on anything.

    The model must be told what padding is by a mask or by lengths: one that recognises padding by
    its token sees none in the changed inputs. Compare that one's outputs with and without padding
    by `differences`.
    """
    return packing_leaks(
        model, inputs, *(1 - np.asarray(each, int) for each in (input_padding, output_padding))
    )


def packing_leaks(
    model: Model,
    inputs: Shaped[Array, "B S *F"],
    input_segments: Int[Array, "B S"],
    output_segments: Int[Array, "B T"],
) -> list[Leak]:
    """Returns the outputs that depend on another example of their packed row, or on padding.

    Segments number the examples of a row from 1. Segment 0 is padding, whose outputs may depend on
    anything.
    """
    own, outputs = np.asarray(input_segments), np.asarray(output_segments)
    if own.shape != _checked(inputs).shape[:2] or outputs.ndim != 2 or len(outputs) != len(own):
        raise UserError(
            f"padding or segments must be [B, S] = {list(_checked(inputs).shape[:2])} and [B, T], "
            f"not of shapes {own.shape} and {outputs.shape}"
        )
    own, outputs = own[:, None, :], outputs[:, :, None]
    return leaks(model, inputs, (outputs == own) | (outputs == 0))


def differences(
    found: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-5
) -> list[Difference]:
    """Returns where outputs [B, T, …] differ by more than `atol` + `rtol` · |expected|.

    For outputs computed in two ways: with and without a cache, packed and apart, padded and not.
    """
    one, other = _array(found), _array(expected)
    if one.shape != other.shape:
        raise UserError(f"outputs of shapes {one.shape} and {other.shape} cannot be compared")
    close = np.isclose(one, other, rtol=rtol, atol=atol)
    magnitudes = _largest(np.where(close, 0.0, _distance(one, other)))
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
    for position in range(inputs.shape[1]):
        output, cache = step(inputs[:, position : position + 1], cache)
        outputs.append(_array(output))
    return differences(np.concatenate(outputs, axis=1), model(inputs), rtol=rtol, atol=atol)


def permutation_differences(
    model: Model, inputs: Shaped[Array, "B S *F"], *, rtol: float = 1e-4, atol: float = 1e-5
) -> list[Difference]:
    """Returns where a model is not permutation equivariant, as attention without positions is.

    Swapping two neighbours must swap their outputs and leave the others. The outputs are those that
    fail for some swap, each with its largest difference, at its position without the swap.
    """
    inputs, worst, changed = _checked(inputs), {}, False
    _others(inputs)  # refuses equal inputs
    usual = _call(model, inputs)
    if usual.shape[1] != inputs.shape[1]:
        raise UserError(f"{inputs.shape[1]} inputs need as many outputs, not {usual.shape[1]}")
    for position in range(inputs.shape[1] - 1):
        order = np.arange(inputs.shape[1])
        order[[position, position + 1]] = position + 1, position
        swapped = _call(model, inputs[:, order])
        changed |= bool(_distance(swapped, usual).any())
        for each in differences(swapped[:, order], usual, rtol=rtol, atol=atol):
            place = each.row, each.output
            worst[place] = max(worst.get(place, each), each)
    if not changed:
        raise UserError("no output changes with the order of the inputs, so nothing could show")
    return sorted(worst.values())


def nonfinite_gradients(gradients: Any) -> list[str]:
    """Returns the names of the arrays that hold a NaN or an infinity.

    Take the gradients of a batch in which some query may attend to no key. `gradients` is any
    pytree: of `jax.grad`, or {name: parameter.grad} of a PyTorch module.
    """
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    finite = [np.isfinite(_array(leaf)).all() for _, leaf in leaves]
    return [name for name, good in zip(names, finite, strict=True) if not good]


def _array(value: Any) -> Float[np.ndarray, "*X"]:
    """An array of any library, as one of NumPy."""
    if not hasattr(value, "shape"):
        kind = type(value).__name__
        raise UserError(f"expected an array [B, T, …], such as logits, and got a {kind}")
    if hasattr(value, "detach"):  # of PyTorch; NumPy knows neither its devices nor its bfloat16
        value = value.detach().cpu().double()
    return np.asarray(value, np.float64)


def _checked(inputs: Any) -> np.ndarray:
    """The inputs, or a UserError if they have no axes of rows and positions."""
    inputs = np.asarray(inputs)
    if inputs.ndim < 2:
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
