"""Decoding: greedy, sampling and beam search, each one compiled loop with a cache.

The methods in `METHODS` share their first arguments and their result:

    method(model, source, source_segments, max_length, *, keys, num_tokens, margin, …) → Hypotheses

    model            a Transformer or Recurrent module
    source           [B, S] int32, tokens that the encoder reads
    source_segments  [B, S] int32, 0 = padding; a row without a source has no output
    max_length       the maximum number of tokens in an output, with EOS: the cache's length
    keys             [B] PRNG keys of the rows, required by sampling and ignored by the others
    num_tokens       the vocabulary's size without its padding; None: V
    margin           see `length_limits`

The encoder runs once, the cross-attention's keys and values are projected once, and each step
computes one target position per hypothesis. A row's output does not depend on the rest of its
batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.modules.recurrent import Recurrent
from transformer.modules.transformer import Transformer


class Hypotheses(NamedTuple):
    """The J best hypotheses of each source, best first.

    tokens: int32, up to and including EOS, then padding. A hypothesis that reached its length
      limit has no EOS; it ranks behind those that finished.
    scores: log p in nats, of beam search divided by the length penalty; -inf for a missing one.
    """

    tokens: Int[Array, "*B J T"]
    scores: Float[Array, "*B J"]


def next_log_p(logits: Float[Array, "*B V"], num_tokens: int | None) -> Float[Array, "*B V"]:
    """log p of each next token; -inf for PAD, BOS and the entries that pad the vocabulary.

    The others are not renormalised: their log p is that of teacher forcing.
    """
    token = jnp.arange(logits.shape[-1])
    allowed = (token != PAD) & (token != BOS) & (token < (num_tokens or logits.shape[-1]))
    return jnp.where(allowed, jax.nn.log_softmax(logits.astype(jnp.float32)), -jnp.inf)


def length_limits(
    source_segments: Int[Array, "B S"], max_length: int, margin: int | None
) -> Int[Array, "B"]:
    """The number of tokens that each output may have, EOS included.

    With a margin it is the source's number of tokens plus the margin (Vaswani et al. 2017: 50),
    and at most `max_length`.
    """
    if margin is None:
        return jnp.full(len(source_segments), max_length, jnp.int32)
    return jnp.minimum((source_segments > 0).sum(-1) + margin, max_length)


def greedy(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    max_length: int,
    *,
    keys: Array | None = None,
    num_tokens: int | None = None,
    margin: int | None = None,
) -> Hypotheses:
    """The most likely token at each step; J = 1."""
    del keys

    inputs = model, source, source_segments, max_length, num_tokens, margin
    return decode_one(*inputs, select=lambda log_p, _: log_p.argmax(-1))


def sample(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    max_length: int,
    *,
    keys: Any,
    num_tokens: int | None = None,
    margin: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Hypotheses:
    """Tokens sampled from the model's distribution; J = 1. Other arguments: see the module.

    Args:
      temperature: divides the logits; above 0.
      top_k: only the k most likely tokens are sampled (Fan et al. 2018); 0: all.
      top_p: only the most likely tokens whose probabilities sum to p are sampled (nucleus
        sampling, Holtzman et al. 2020); 1: all.
    """

    def draw(log_p: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, "B"]:
        logits = truncate(log_p / temperature, top_k, top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return jax.vmap(jax.random.categorical)(step_keys, logits)

    inputs = model, source, source_segments, max_length, num_tokens, margin
    return decode_one(*inputs, select=draw)


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """The logits of the tokens that may be sampled, -inf for the others.

    The most likely token is always kept, and so is any token as likely as one that is kept.
    """
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        order = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(order)
        before = jnp.cumsum(share, axis=-1) - share  # the probability of all likelier tokens
        least = jnp.where(before < top_p, order, order[:, :1]).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def decode_one(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    max_length: int,
    num_tokens: int | None,
    margin: int | None,
    select: Callable[[Array, Array], Array],
) -> Hypotheses:
    """One hypothesis for each source; `select(log_p [B, V], index)` returns its next tokens [B].

    The loop stops when each row has its EOS or has reached its length limit.
    """
    rows = source.shape[0]
    memory = model.encode(source, source_segments)
    cache = model.start_cache(memory, source_segments, max_length)
    tokens = jnp.full((rows, max_length), PAD, jnp.int32)
    last = jnp.full((rows, 1), BOS, jnp.int32)
    done = ~(source_segments > 0).any(-1)
    limits = length_limits(source_segments, max_length, margin)

    def step(carry):
        cache, tokens, total, last, done = carry
        logits, advanced = model.decode_step(last, cache)
        log_p = next_log_p(logits[:, 0], num_tokens)
        selected = select(log_p, cache.filled).astype(jnp.int32)[:, None]
        # Summed here: scoring whole outputs afterwards takes longer than decoding them.
        log_p = jnp.take_along_axis(log_p, selected, axis=1)[:, 0]
        token = jnp.where(done[:, None], PAD, selected)
        tokens = jax.lax.dynamic_update_slice(tokens, token, (0, cache.filled))
        total = total + jnp.where(done, 0.0, log_p)
        done = done | (token[:, 0] == EOS) | (advanced.filled >= limits)
        return advanced, tokens, total, token, done

    carry = (cache, tokens, jnp.zeros(rows), last, done)
    _, tokens, total, *_ = while_loop(lambda carry: ~carry[-1].all(), step, carry)
    return Hypotheses(tokens[:, None], total[:, None])


def while_loop(cond: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop` that drops the batch axis of a batch of one from the carry.

    XLA removes dimensions of size 1 from matrix products. If the cache kept the axis, it would be
    copied for each token, which takes a fifth of a step for one source on a CPU.
    """

    like, structure = jax.tree.flatten(carry)

    def squeeze(carry):
        return [x[0] if x.shape[:1] == (1,) else x for x in jax.tree.leaves(carry)]

    def restore(leaves):
        return structure.unflatten(x.reshape(y.shape) for x, y in zip(leaves, like, strict=True))

    found = jax.lax.while_loop(
        lambda leaves: cond(restore(leaves)),
        lambda leaves: squeeze(body(restore(leaves))),
        squeeze(carry),
    )
    return restore(found)


class BeamState(NamedTuple):
    """The carry of beam search, for J hypotheses of each source.

    cache: the model's cache.
    live: the J most likely hypotheses without EOS, [B, J, T].
    log_p: log p of the live hypotheses; -inf for missing ones.
    finished: the J best hypotheses with EOS.
    """

    cache: Any
    live: Int[Array, "B J T"]
    log_p: Float[Array, "B J"]
    finished: Hypotheses


def penalty(length: Int[Array, "*B"], alpha: float) -> Float[Array, "*B"]:
    """((5 + length) / 6)^α, which divides the log p of a hypothesis (Wu et al. 2016, section 7)."""
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


def beam_search(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    max_length: int,
    *,
    keys: Array | None = None,
    num_tokens: int | None = None,
    margin: int | None = None,
    beam_size: int = 4,
    length_penalty: float = 0.6,
) -> Hypotheses:
    """The J = `beam_size` best hypotheses by log p / `penalty`.

    A row is done when no live hypothesis can still enter its J best finished ones (log p only
    falls, and the penalty of the longest output divides it the most), or at its length limit.
    With J = 1 and no length penalty it is greedy decoding. Other arguments: see the module.
    """
    del keys
    rows, width = source.shape[0], beam_size
    memory = model.encode(source, source_segments)
    blank = jnp.full((rows, width, max_length), PAD, jnp.int32)
    missing = jnp.full((rows, width), -jnp.inf)
    has_source = (source_segments > 0).any(-1)
    limits = length_limits(source_segments, max_length, margin)
    longest_penalty = penalty(limits, length_penalty)
    state = BeamState(
        cache=model.start_cache(memory, source_segments, max_length, hypotheses=width),
        live=blank,
        log_p=missing.at[:, 0].set(jnp.where(has_source, 0.0, -jnp.inf)),
        finished=Hypotheses(blank, missing),
    )

    def can_improve(state: BeamState) -> Bool[Array, ""]:
        bound = state.log_p[:, 0] / longest_penalty
        can_enter = bound > state.finished.scores[:, -1]
        return (can_enter & (state.cache.filled < limits)).any()

    def step(state: BeamState) -> BeamState:
        index = state.cache.filled
        last = jax.lax.dynamic_index_in_dim(state.live, jnp.maximum(index - 1, 0), axis=2)
        last = jnp.where(index == 0, BOS, last)[..., 0]
        logits, cache = model.decode_step(last, state.cache)
        parents, grown = expand(state, next_log_p(logits, num_tokens), length_penalty)
        if margin is not None:  # a row at its limit waits for the others
            select = partial(jax.vmap(jnp.where), index < limits)
            grown = jax.tree.map(select, grown, (state.live, state.log_p, state.finished))
        return BeamState(cache.pick(parents), *grown)

    state = while_loop(can_improve, step, state)
    live = Hypotheses(state.live, state.log_p / longest_penalty[:, None])
    return followed_by(state.finished, live)


def expand(
    state: BeamState, log_p: Float[Array, "B J V"], alpha: float
) -> tuple[Int[Array, "B J"], Any]:
    """The parents of the next live hypotheses, and (live, log_p, finished) of the next state.

    Of the 2J most likely extensions, those among the first J that end compete with the finished
    hypotheses by their score; the J most likely of the others stay live.
    """
    rows, width, vocab_size = log_p.shape
    index = state.cache.filled
    total = (state.log_p[..., None] + log_p).reshape(rows, -1)
    total, place = jax.lax.top_k(total, 2 * width)
    parent, token = place // vocab_size, (place % vocab_size).astype(jnp.int32)
    longer = take(state.live, parent)
    longer = jax.lax.dynamic_update_slice(longer, token[..., None], (0, 0, index))

    ends = token == EOS
    finishes = ends & (jnp.arange(2 * width) < width)
    scores = jnp.where(finishes, total, -jnp.inf) / penalty(index + 1, alpha)
    finished = Hypotheses(
        jnp.concatenate([state.finished.tokens, longer], axis=1),
        jnp.concatenate([state.finished.scores, scores], axis=1),
    )
    scores, best = jax.lax.top_k(finished.scores, width)
    finished = Hypotheses(take(finished.tokens, best), scores)
    total, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), width)
    return jnp.take_along_axis(parent, chosen, axis=1), (take(longer, chosen), total, finished)


def take(tokens: Int[Array, "B J T"], index: Int[Array, "B I"]) -> Int[Array, "B I T"]:
    """The hypotheses of each row at `index`."""
    return jnp.take_along_axis(tokens, index[..., None], axis=1)


def followed_by(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """The J hypotheses of `first`, where missing ones are replaced by those of `second`."""
    width = first.scores.shape[1]
    number = jnp.isfinite(first.scores).sum(1, keepdims=True)
    place = jnp.arange(width)
    place = jnp.where(place < number, place, width + place - number)
    scores = jnp.concatenate([first.scores, second.scores], axis=1)
    scores = jnp.take_along_axis(scores, place, axis=1)
    tokens = take(jnp.concatenate([first.tokens, second.tokens], axis=1), place)
    return Hypotheses(jnp.where(jnp.isfinite(scores)[..., None], tokens, PAD), scores)


METHODS: dict[str, Callable[..., Hypotheses]] = {
    "greedy": greedy,
    "sampling": sample,
    "beam search": beam_search,
}
