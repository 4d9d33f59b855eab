"""The FLOPs of a computation, counted from its jaxpr without allocation or compilation."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from transformer.data.batches import Dataset
from transformer.modules.model import Model
from transformer.training.step import init_state, make_train_step

if TYPE_CHECKING:
    from transformer.config import RunConfig

# JAX's name of a device → dense bfloat16 FLOPs per second, from the data sheets of 2025. (For v2
# and v3, JAX's device is a core, half of the chip.)
PEAK_FLOPS = {"TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12}
PEAK_FLOPS |= {"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12}
PEAK_FLOPS |= {"TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA L4": 121e12}
PEAK_FLOPS |= {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12}
PEAK_FLOPS |= {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def peak_flops(mesh: Mesh) -> float | None:
    """The devices' FLOPs per second, all of them together; None if that is not published."""
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.size


def step_flops(model: Model, config: "RunConfig", data: Dataset) -> int:
    """The FLOPs of the matrix products in one step of one run, without any recomputation."""
    plain = replace(model.config, attention_backend="einsum", remat="none")
    if plain != model.config:
        model = Model(plain, model.vocab_size, model.target_vocab_size)
    state = jax.eval_shape(partial(init_state, model, config), np.uint32(0), {})
    batch = jax.eval_shape(Dataset.batch, data, jax.random.key(0), np.int32(0))
    return matmul_flops(make_train_step(model, config), state, batch)


def matmul_flops(function: Callable, *args: Any) -> int:
    """The FLOPs of the matrix products in `function(*args)`; a multiply-add counts as 2.

    Loops of known length are counted that many times; a product in a loop of unknown length
    (`while_loop`) is an error. Softmax, norms and the like are not counted, as usual.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        if primitive == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [
            _count(getattr(value, "jaxpr", value))
            for value in jax.tree.leaves(list(params.values()))
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr)
        ]
        if primitive == "while" and any(inner):
            raise ValueError("a while loop contains a matrix product: its cost is unknown")
        times = params["length"] if primitive == "scan" else 1
        total += times * (max(inner) if primitive == "cond" else sum(inner))
    return total
