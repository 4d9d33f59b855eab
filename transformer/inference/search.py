"""Greedy decoding, sampling and beam search, each one compiled loop with a cache.

The methods are functions (model, sources, …) → hypotheses. The encoder runs once, the
cross-attention's keys and values are projected once, and each step computes one target position per
hypothesis. A row's output does not depend on the rest of its batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import EOS, PAD
from transformer.inference.logits import Constraints, next_log_p, truncate
from transformer.modules.model import OutputTokens
from transformer.modules.recurrent import Recurrent
from transformer.modules.transformer import Transformer

Module = Transformer | Recurrent

SMALL_CACHE = 128  # entries of a source, below which growing does not save its compilation


class Sources(NamedTuple):
    """The sources to decode, and the limits of their outputs."""

    tokens: Int[Array, "B S"]  # a row without any has no output
    max_length: int  # tokens in an output, EOS included: the cache's length
    keys: Any = None  # the rows' PRNG keys, for sampling
    num_tokens: int | None = None  # the vocabulary's size without its padding; None: V
    margin: int | None = None  # tokens by which an output may exceed ratio · source; None: any
    ratio: float = 1.0
    constraints: Constraints = Constraints()
    outputs: OutputTokens = OutputTokens()

    def rooms(self, model: Module, hypotheses: int = 1) -> tuple[int, ...]:
        """The lengths that the cache has in turn; few outputs are much longer than their source."""
        likely = self.tokens.shape[1] + 8
        short = hypotheses * self.max_length <= SMALL_CACHE
        if isinstance(model, Recurrent) or short or jax.export.is_symbolic_dim(likely):
            return (self.max_length,)
        return *(n for n in (likely // 2, likely) if n < self.max_length), self.max_length

    def start(self, model: Module, hypotheses: int = 1) -> tuple[Any, Array, Array]:
        """The cache, which rows have a source, and the length limits of their outputs."""
        segments = (self.tokens != PAD).astype(jnp.int32)
        memory = model.encode(self.tokens, segments)
        cache = model.start_cache(memory, segments, self.rooms(model, hypotheses)[0], hypotheses)
        lengths = segments.sum(-1)
        limits = jnp.full_like(lengths, self.max_length)
        if self.margin is not None:  # Vaswani et al. 2017: 50
            own = lengths
            if self.ratio != 1.0:
                own = jnp.asarray(scaled(np.arange(self.tokens.shape[1] + 1), self.ratio))[lengths]
            limits = jnp.minimum(own + self.margin, limits)
        return cache, lengths > 0, limits


def scaled(lengths: Int[np.ndarray, "B"], ratio: float) -> Int[np.ndarray, "B"]:
    """⌈ratio · length⌉, where 1.1 · 10 is 11 in spite of rounding."""
    return np.ceil(np.round(lengths * ratio, 6)).astype(np.int32)


class Hypotheses(NamedTuple):
    """The J best hypotheses of each source, best first.

    One that reached its length limit has no EOS; it ranks behind those that finished, unless
    `DecodingConfig.unfinished` is equal.
    """

    tokens: Int[Array, "*B J T"]  # up to and including EOS, then padding
    scores: Float[Array, "*B J"]  # log p in nats / length penalty; -inf for a missing hypothesis


def sample(
    model: Module, sources: Sources, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Hypotheses:
    """Tokens sampled from the model's distribution; J = 1.

    The temperature divides the logits; 0 selects the most likely token, which is greedy decoding
    and needs no keys. See `truncate`. A score is the model's log p, whatever the constraints are.
    """
    rows, constraints = sources.tokens.shape[0], sources.constraints
    cache, has_source, limits = sources.start(model)

    def step(cache, state):
        tokens, total, last, done = state
        logits, advanced = model.decode_step(last, cache)
        log_p = next_log_p(logits[:, 0], sources.num_tokens, sources.outputs.banned)
        scores = log_p = constraints.force(log_p, cache.filled, limits)
        if constraints.repetition_penalty != 1.0:  # depends on the sign of the logits
            scores = jnp.where(log_p == -jnp.inf, log_p, logits[:, 0].astype(jnp.float32))
        scores = constraints.apply(scores, tokens, cache.filled, limits)
        if temperature:
            likely = truncate(scores / temperature, top_k, top_p)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(sources.keys, cache.filled)
            selected = jax.vmap(jax.random.categorical)(step_keys, likely)
        else:
            # The first of the largest: XLA's argmax is 8 times as slow on a CPU. NaN logits end.
            size, largest = scores.shape[1], scores.max(1, keepdims=True)
            index = jnp.arange(size)
            selected = jnp.where(scores == largest, index, size).min(1)
            selected = jnp.where(selected == size, EOS, selected)
        selected = selected.astype(jnp.int32)[:, None]
        # Summed here: scoring whole outputs afterwards takes longer than decoding them.
        log_p = jnp.take_along_axis(log_p, selected, axis=1)[:, 0]
        token = jnp.where(done[:, None], PAD, selected)
        tokens = jax.lax.dynamic_update_slice(tokens, token, (0, cache.filled))
        total = total + jnp.where(done, 0.0, log_p)
        done = done | (token[:, 0] == EOS) | (advanced.filled >= limits)
        return advanced, (tokens, total, token, done)

    def is_live(cache, state):
        return ~state[-1].all()

    tokens = jnp.full((rows, sources.max_length), PAD, jnp.int32)
    start, total = sources.outputs.start, jnp.zeros(rows)
    state = tokens, total, jnp.full((rows, 1), start, jnp.int32), ~has_source
    tokens, total, *_ = _loop(is_live, step, cache, state, sources.rooms(model))
    return Hypotheses(tokens[:, None], total[:, None])


def _loop(cond: Callable, step: Callable, cache: Any, state: Any, rooms: Sequence[int]) -> Any:
    """The state after repeating `step` while `cond` holds, both functions of cache and state.

    A cache that is full grows to the next of `rooms`: attention computes all that is allocated.
    """
    for k, room in enumerate(rooms):
        cache = cache.grow(room) if k else cache

        def has_room(cache: Any, state: Any, room: int = room) -> Array:
            return cond(cache, state) & (cache.filled < room)

        cache, state = _while_loop(has_room, step, (cache, state))
    return state


def _while_loop(cond: Callable, step: Callable, carry: tuple[Any, ...]) -> Any:
    """`jax.lax.while_loop` without the batch axis of a batch of one; `carry` has the arguments.

    XLA removes dimensions of size 1 from matrix products. If the cache kept the axis, it would be
    copied for each token, which takes a fifth of a step for one source on a CPU.
    """
    like, structure = jax.tree.flatten(carry)

    def squeeze(carry):
        return [x[0] if x.shape[:1] == (1,) else x for x in jax.tree.leaves(carry)]

    def restore(leaves):
        return structure.unflatten(x.reshape(y.shape) for x, y in zip(leaves, like, strict=True))

    def holds(leaves):
        return cond(*restore(leaves))

    def body(leaves):
        return squeeze(step(*restore(leaves)))

    return restore(jax.lax.while_loop(holds, body, squeeze(carry)))


class _Beams(NamedTuple):
    """The state of beam search."""

    live: Int[Array, "B J T"]  # the J most likely hypotheses without EOS
    log_p: Float[Array, "B J"]  # of the live hypotheses; -inf for missing ones
    finished: Hypotheses  # the J best with EOS


# What a score's log p is divided by, to the power of α.
PENALTIES: dict[str, Callable[[Array], Array]] = {
    "gnmt": lambda length: (5.0 + length) / 6.0,  # Wu et al. 2016, section 7
    "length": lambda length: length,  # Hugging Face's
}
EARLY_STOPPING = ("never", "false", "true")
UNFINISHED = ("last", "equal")


def beam_search(
    model: Module,
    sources: Sources,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    penalty: str = "gnmt",
    early_stopping: str = "never",
    unfinished: str = "last",
    renormalize: bool = False,
) -> Hypotheses:
    """The J = `beam_size` best hypotheses by log p / penalty(length)^α, α = `length_penalty`.

    A repetition penalty multiplies the log p of a token, which its scores include.

    A row is done when no live hypothesis can still enter its J best finished ones (log p only
    falls, and the penalty of the longest output divides it the most), or at its length limit.
    `early_stopping` false assumes that no output gets longer, and true takes the first J finished
    hypotheses. `unfinished` says how those without EOS at the length limit rank: last, or equal to
    finished ones. With `renormalize` the probabilities of the tokens that may follow sum to 1. With
    J = 1 and no length penalty it is greedy decoding.
    """
    cache, has_source, limits = sources.start(model, beam_size)
    blank = jnp.full((sources.tokens.shape[0], beam_size, sources.max_length), PAD, jnp.int32)
    missing = jnp.full(blank.shape[:2], -jnp.inf)
    log_p = missing.at[:, 0].set(jnp.where(has_source, 0.0, -jnp.inf))

    def norm(length: Int[Array, "*B"]) -> Float[Array, "*B"]:
        return PENALTIES[penalty](length.astype(jnp.float32)) ** length_penalty

    longest_penalty = norm(limits)

    def can_improve(cache: Any, state: _Beams) -> Bool[Array, ""]:
        bound = state.log_p[:, 0] / longest_penalty
        return ((bound > state.finished.scores[:, -1]) & (cache.filled < limits)).any()

    def step(cache: Any, state: _Beams) -> tuple[Any, _Beams]:
        index = cache.filled
        last = jax.lax.dynamic_index_in_dim(state.live, jnp.maximum(index - 1, 0), 2, False)
        logits, cache = model.decode_step(jnp.where(index == 0, sources.outputs.start, last), cache)
        log_p = next_log_p(logits, sources.num_tokens, sources.outputs.banned)
        log_p = sources.constraints.apply(log_p, state.live, index, limits)
        if renormalize:
            log_p = jnp.where(log_p == -jnp.inf, log_p, jax.nn.log_softmax(log_p))
        at_limit = index == limits - 1 if unfinished == "equal" else None
        parents, grown = _expand(state, index, log_p, norm, at_limit)
        if early_stopping != "never":  # a row that is done takes no more
            worst = grown.finished.scores[:, -1]  # -inf until J have finished
            done = worst > -jnp.inf
            if early_stopping == "false":
                done &= grown.log_p[:, 0] / norm(index + 1) <= worst
            grown = grown._replace(log_p=jnp.where(done[:, None], -jnp.inf, grown.log_p))
        if sources.margin is not None:  # a row at its limit waits for the others
            select = partial(jax.vmap(jnp.where), index < limits)
            grown = jax.tree.map(select, grown, state)
        return cache.pick(parents), grown

    state = _Beams(blank, log_p, Hypotheses(blank, missing))
    state = _loop(can_improve, step, cache, state, sources.rooms(model, beam_size))
    return _best(state, longest_penalty)


def _best(state: _Beams, norm: Float[Array, "B"]) -> Hypotheses:
    """The finished hypotheses; live ones, with log p / `norm`, take the places of missing ones."""
    rank = jnp.where(jnp.isfinite(state.finished.scores), 0, 2)
    width = rank.shape[1]
    place = jnp.concatenate([rank, jnp.ones_like(rank)], axis=1).argsort(axis=1)[:, :width]
    tokens = jnp.concatenate([state.finished.tokens, state.live], axis=1)
    live_scores = state.log_p / norm[:, None]
    scores = jnp.concatenate([state.finished.scores, live_scores], axis=1)
    scores = jnp.take_along_axis(scores, place, axis=1)
    return Hypotheses(jnp.where(jnp.isfinite(scores)[..., None], _take(tokens, place), PAD), scores)


def _expand(
    state: _Beams,
    index: Int[Array, ""],
    log_p: Float[Array, "B J V"],
    norm: Callable[[Array], Array],
    at_limit: Bool[Array, "B"] | None,
) -> tuple[Int[Array, "B J"], _Beams]:
    """The parents of the next live hypotheses, which have `index` tokens, and the next state.

    Of the 2J most likely extensions, those among the first J that end compete with the finished
    hypotheses by their score, log p / norm(length); the J most likely of the others stay live. All
    end in rows that are `at_limit`.
    """
    rows, width, vocab_size = log_p.shape
    total = (state.log_p[..., None] + log_p).reshape(rows, -1)
    total, place = jax.lax.top_k(total, 2 * width)
    parent, token = place // vocab_size, (place % vocab_size).astype(jnp.int32)
    longer = _take(state.live, parent)
    longer = jax.lax.dynamic_update_slice(longer, token[..., None], (0, 0, index))

    ends = token == EOS
    if at_limit is not None:
        ends |= at_limit[:, None]
    finishes = ends & (jnp.arange(2 * width) < width)
    scores = jnp.where(finishes, total, -jnp.inf) / norm(index + 1)
    scores = jnp.concatenate([state.finished.scores, scores], axis=1)
    scores, best = jax.lax.top_k(scores, width)
    tokens = jnp.concatenate([state.finished.tokens, longer], axis=1)
    finished = Hypotheses(_take(tokens, best), scores)
    total, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), width)
    beams = _Beams(_take(longer, chosen), total, finished)
    return jnp.take_along_axis(parent, chosen, axis=1), beams


def _take(tokens: Int[Array, "B J T"], index: Int[Array, "B I"]) -> Int[Array, "B I T"]:
    return jnp.take_along_axis(tokens, index[..., None], axis=1)
