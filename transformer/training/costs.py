"""The FLOPs of a computation, counted from its jaxpr without allocation or compilation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from transformer.data.batches import Dataset
from transformer.modules.model import Model
from transformer.training.step import StepConfig, init_state, make_train_step


def step_flops(model: Model, config: StepConfig, data: Dataset) -> int:
    """Returns the FLOPs of the matrix products in one step of one run.

    Recomputation by an attention backend or by `remat` is not counted.
    """
    plain = replace(model.config, attention_backend="einsum", remat="none")
    model = Model(plain, model.vocab_size, model.target_vocab_size)
    state = jax.eval_shape(partial(init_state, model, config), np.uint32(0), {})
    batch = jax.eval_shape(Dataset.batch, data, jax.random.key(0), np.int32(0))
    return matmul_flops(make_train_step(model, config), state, batch)


# JAX's name of a device → dense bfloat16 FLOPs per second, from the data sheets of 2025. (For v2
# and v3, JAX's device is a core, half of the chip.)
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def share_of_peak(flops: int, mesh: Mesh) -> float | None:
    """Returns `flops` per second as a fraction of the peak of all devices of the mesh.

    None if the peak is not published, as for CPUs.
    """
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return None if peak is None else flops / (peak * mesh.size)


def matmul_flops(function: Callable, *args: Any) -> int:
    """Returns the FLOPs of the matrix products in `function(*args)`; a multiply-add counts as 2.

    Loops of known length are counted that many times; a product in a loop of unknown length
    (`while_loop`) is an error. Other operations, such as softmax and norms, are not counted, as
    usual.

    Args:
      function: the function to trace, including gradients.
      args: arrays, or their shapes.
    """
    return products(jax.make_jaxpr(function)(*args).jaxpr)


def products(jaxpr: core.Jaxpr) -> int:
    """Returns the FLOPs of the matrix products in a jaxpr."""
    total, equations = 0, cast(list[Any], jaxpr.eqns)
    for equation in equations:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracted)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
            continue
        inside = [products(inner) for inner in inner_jaxprs(equation)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inside)
        elif equation.primitive.name == "cond":
            total += max(inside)
        elif equation.primitive.name == "while" and any(inside):
            raise ValueError("a while loop contains a matrix product: its cost is unknown")
        else:
            total += sum(inside)
    return total


def inner_jaxprs(equation: Any) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs that an equation calls."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each
