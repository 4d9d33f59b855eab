"""The loss: cross-entropy with label smoothing, computed without holding all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.parallel.mesh import axis_shards, constrain

CHUNK = 256  # tokens of a device whose logits exist at the same time

Smoothing = float | Float[Array, ""]
Measured = dict[str, Any]  # name → a number for each token


class Predictions(NamedTuple):
    """Predictions of some tokens under teacher forcing, in any order and shape.

    Cross-entropies are in nats, float32.
    """

    logits: Float[Array, "*B V"]
    targets: Int[Array, "*B"]
    nll: Float[Array, "*B"]  # -log p(target); exp of its mean is the perplexity
    uniform: Float[Array, "*B"]  # against the uniform distribution over the vocabulary
    objective: Float[Array, "*B"]  # with label smoothing, which training minimises


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], smoothing: Smoothing = 0.0
) -> Predictions:
    """The cross-entropies of each token; NaN for a target outside the vocabulary.

    The objective is the one against (1 - ε) · one_hot(target) + ε / V (Szegedy et al. 2016, section
    7; Vaswani et al. 2017, section 5.4, with ε = 0.1).
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill")[..., 0]
    nll, uniform = total - own, total - logits.mean(-1)
    objective = (1.0 - smoothing) * nll + smoothing * uniform
    return Predictions(logits, targets, nll, uniform, objective)


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: Smoothing = 0.0,
    *,
    measure: Callable[[Predictions], Measured],
    bias: Float[Array, " V"] | None = None,
) -> tuple[Float[Array, ""], Measured]:
    """The sum of weights · objective for the logits hidden · tableᵀ + bias, and each `measure`.

    B · T · V logits never exist: those of `CHUNK` tokens at a time are computed and used, in
    training for their gradient too. Only the loss is differentiable, and only by `hidden`, `table`
    and `bias`. Products are in the dtype of `hidden`, their sums in float32.

    Args:
      measure: of the `Predictions` of some tokens, one number for each.
      bias: None: no bias.
    """
    return _loss(measure, hidden, table, bias, targets, weights, smoothing)


def _pad(x: Array, *sizes: int) -> Array:
    missing = [(0, size - own) for size, own in zip(sizes, x.shape, strict=False)]
    return jnp.pad(x, missing + [(0, 0)] * (x.ndim - len(sizes)))


def _in_chunks(
    with_gradient: bool,
    measure: Callable[[Predictions], Measured],
    hidden: Array,
    table: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
    smoothing: Smoothing,
) -> tuple[tuple[Array, Measured], Any]:
    """The results of `linear_cross_entropy`; and None, or its gradients by hidden, table, bias."""
    (rows, length), vocab_size = targets.shape, len(table)
    # A token stays on its device: axes [devices over rows, devices over positions, their tokens].
    shards = axis_shards("batch"), axis_shards("length")
    blocks = shards[0], -(-rows // shards[0]), shards[1], -(-length // shards[1])
    tokens = blocks[1] * blocks[3]
    chunks = -(-tokens // CHUNK)
    size = -(-tokens // chunks)

    def fold(x: Array) -> Array:
        x = _pad(x, blocks[0] * blocks[1], blocks[2] * blocks[3])
        x = x.reshape(*blocks, *x.shape[2:]).swapaxes(1, 2)
        x = _pad(x.reshape(*shards, tokens, *x.shape[4:]), *shards, chunks * size)
        x = jnp.moveaxis(x.reshape(*shards, chunks, size, *x.shape[3:]), 2, 0)
        return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))

    def unfold(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2).reshape(*shards, chunks * size, *x.shape[4:])[:, :, :tokens]
        x = x.reshape(*shards, blocks[1], blocks[3], *x.shape[3:]).swapaxes(1, 2)
        x = x.reshape(blocks[0] * blocks[1], blocks[2] * blocks[3], *x.shape[4:])
        return x[:rows, :length]

    kernel = constrain(table.astype(hidden.dtype), "vocab", "width")
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(sums: Any, chunk: Any) -> tuple[Any, Any]:
        x, target, weight = chunk
        logits = product("...CD,VD->...CV", x, kernel)
        logits = logits if bias is None else logits + bias
        logits = constrain(logits, "batch", "length", None, "vocab")
        found = cross_entropy(logits, target, smoothing)
        result = (found.objective * weight).sum(-1), measure(found)
        if not with_gradient:
            return sums, (result, None)
        # Of a token's objective by its logits: softmax(logits) - (1 - ε) · one_hot - ε / V.
        softmax = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1)[..., None])
        is_target = jnp.arange(vocab_size) == target[..., None]
        gradient = softmax - jnp.where(is_target, 1.0 - smoothing, 0.0) - smoothing / vocab_size
        gradient, (of_table, of_bias) = gradient * weight[..., None], sums
        of_bias = None if of_bias is None else of_bias + gradient.sum(-2)
        gradient = gradient.astype(x.dtype)
        of_table += product("...CV,...CD->...VD", gradient, x)
        x_gradient = product("...CV,VD->...CD", gradient, kernel).astype(x.dtype)
        return (of_table, of_bias), (result, x_gradient)

    start = jax.tree.map(lambda x: jnp.zeros((*shards, *x.shape)), (table, bias))
    inputs = tuple(map(fold, (hidden, targets, weights)))
    sums, outputs = jax.lax.scan(step, start if with_gradient else None, inputs)
    (losses, measured), x_gradient = outputs
    result = losses.sum(), jax.tree.map(unfold, measured)
    if not with_gradient:
        return result, None
    # Only now are the devices' gradients of table and bias added up.
    add = partial(jax.tree.map, lambda x, total: total.sum((0, 1)).astype(x.dtype))
    return result, (unfold(x_gradient), *add((table, bias), sums))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(measure: Callable, *inputs: Any) -> Any:
    return _in_chunks(False, measure, *inputs)[0]


def _backward(measure: Callable, gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda each: each * cotangents[0].astype(each.dtype), gradients)
    return *scaled, None, None, None


_loss.defvjp(partial(_in_chunks, True), _backward)
