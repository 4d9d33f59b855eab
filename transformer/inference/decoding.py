"""Decoding: greedy, sampling and beam search, each one compiled loop with a cache.

The methods are functions (model, sources, …) → hypotheses. The encoder runs once, the
cross-attention's keys and values are projected once, and each step computes one target position per
hypothesis. A row's output does not depend on the rest of its batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, TypedDict, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import EOS, PAD, Tokenizer
from transformer.errors import UserError, check_choice, explained
from transformer.inference.logits import Constraints, next_log_p, truncate
from transformer.knobs import Choice, Range, Size, SizeOrZero, validate
from transformer.modules.model import OutputTokens
from transformer.modules.recurrent import Recurrent
from transformer.modules.transformer import Transformer

Module = Transformer | Recurrent

# Type of an option → the types of its values, and what a message calls them.
TYPES: dict[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    bool: (bool, "True or False"),
}
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
    state = (
        tokens,
        jnp.zeros(rows),
        jnp.full((rows, 1), sources.outputs.start, jnp.int32),
        ~has_source,
    )
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
) -> Hypotheses:
    """The J = `beam_size` best hypotheses by log p / penalty(length)^α, α = `length_penalty`.

    A repetition penalty multiplies the log p of a token, which its scores include.

    A row is done when no live hypothesis can still enter its J best finished ones (log p only
    falls, and the penalty of the longest output divides it the most), or at its length limit.
    `early_stopping` false assumes that no output gets longer, and true takes the first J finished
    hypotheses. `unfinished` says how those without EOS at the length limit rank: last, or equal to
    finished ones. With J = 1 and no length penalty it is greedy decoding.
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
        at_limit = index == limits - 1 if unfinished == "equal" else None
        parents, grown = _expand(state, index, log_p, norm(index + 1), at_limit)
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
    # Live hypotheses take the places of missing finished ones.
    rank = jnp.where(jnp.isfinite(state.finished.scores), 0, 2)
    place = jnp.concatenate([rank, jnp.ones_like(rank)], axis=1).argsort(axis=1)[:, :beam_size]
    tokens = jnp.concatenate([state.finished.tokens, state.live], axis=1)
    live_scores = state.log_p / longest_penalty[:, None]
    scores = jnp.concatenate([state.finished.scores, live_scores], axis=1)
    scores = jnp.take_along_axis(scores, place, axis=1)
    return Hypotheses(jnp.where(jnp.isfinite(scores)[..., None], _take(tokens, place), PAD), scores)


def _expand(
    state: _Beams,
    index: Int[Array, ""],
    log_p: Float[Array, "B J V"],
    norm: Float[Array, ""],
    at_limit: Bool[Array, "B"] | None,
) -> tuple[Int[Array, "B J"], _Beams]:
    """The parents of the next live hypotheses, which have `index` tokens, and the next state.

    Of the 2J most likely extensions, those among the first J that end compete with the finished
    hypotheses by their score, log p / `norm`; the J most likely of the others stay live. All end
    in rows that are `at_limit`.
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
    scores = jnp.where(finishes, total, -jnp.inf) / norm
    scores = jnp.concatenate([state.finished.scores, scores], axis=1)
    scores, best = jax.lax.top_k(scores, width)
    tokens = jnp.concatenate([state.finished.tokens, longer], axis=1)
    finished = Hypotheses(_take(tokens, best), scores)
    total, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), width)
    beams = _Beams(_take(longer, chosen), total, finished)
    return jnp.take_along_axis(parent, chosen, axis=1), beams


def _take(tokens: Int[Array, "B J T"], index: Int[Array, "B I"]) -> Int[Array, "B I T"]:
    return jnp.take_along_axis(tokens, index[..., None], axis=1)


class DecodingOptions(TypedDict, total=False):
    """The fields of `DecodingConfig` as keywords."""

    beam_size: int
    length_penalty: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    decode_margin: int | None
    length_ratio: float
    max_length: int | None
    min_length: int
    prefix: str
    distinct: bool
    no_repeat_ngram_size: int
    repetition_penalty: float
    penalty: str
    early_stopping: str
    unfinished: str


def check_types(options: Mapping[str, object]) -> None:
    """Raises a UserError for a name that is no option, or a value of another type."""
    hints = get_type_hints(DecodingOptions)
    for name, value in options.items():
        check_choice(hints, name, "option")
        kind, *none = get_args(hints[name]) or (hints[name],)
        kinds, takes = TYPES[kind]
        if not isinstance(value, (kinds, *none)) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{name}={value!r}: it takes {takes}")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Greedy decoding by default; sampling if temperature > 0; beam search if beam_size > 1.

    Raises:
      UserError: a setting is out of range, or belongs to another method.
    """

    beam_size: Annotated[int, Range(1, 1_000)] = 1  # hypotheses per source; above 1: beam search
    length_penalty: Annotated[float, Range(0, 100)] = 0.6  # α; larger ones favour longer outputs
    temperature: Annotated[float, Range(0, 1e6)] = 0.0  # divides the logits; 0: no sampling
    top_k: SizeOrZero = 0  # sample among the k most likely tokens; 0: all
    top_p: Annotated[float, Range(0, 1)] = 1.0  # sample among the likeliest, up to probability p
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # for sampling
    # Tokens by which an output may exceed its source; None: the run's.
    decode_margin: Annotated[int | None, Range(0, 2**16)] = None
    length_ratio: Annotated[float, Range(0.01, 100)] = 1.0  # times the source, before the margin
    max_length: Size | None = None  # of an output, EOS included; None: ratio and margin alone
    min_length: SizeOrZero = 0  # tokens before EOS at least
    prefix: str = ""  # the text that every hypothesis starts with
    distinct: bool = False  # among hypotheses of the same text only the best is an output
    no_repeat_ngram_size: SizeOrZero = 0  # n: no n tokens occur twice in an output; 0: any may
    # Divides the positive scores of tokens that the output has, multiplies the negative ones.
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    # Of beam search: what is raised to α, ((5 + length) / 6) or the length.
    penalty: Annotated[str, Choice(PENALTIES)] = "gnmt"
    # When a row is done: never before no hypothesis can improve; false: nor at its present length;
    # true: as soon as beam_size have finished.
    early_stopping: Annotated[str, Choice(EARLY_STOPPING)] = "never"
    # How hypotheses without EOS rank at the length limit: last, or equal to finished ones.
    unfinished: Annotated[str, Choice(UNFINISHED)] = "last"

    def __post_init__(self):
        validate(self, "")
        if self.max_length is not None and self.min_length >= self.max_length:
            limit = f"leaves no room for EOS in max_length={self.max_length}"
            raise UserError(f"min_length={self.min_length} {limit}; lower it, or raise max_length")
        if self.temperature:  # smaller ones overflow float32
            Range(1e-6, 1e6).check("temperature", self.temperature)
        if self.temperature and self.beam_size > 1:
            raise UserError("sampling excludes beam search: set temperature=0 or beam_size=1")
        if not self.temperature and (self.top_k, self.top_p) != (0, 1.0):
            raise UserError("only sampling uses top_k and top_p: set temperature=1, for example")

    def margin(self, default: Any) -> Any:
        """The tokens by which an output may exceed its source; `default` is the run's."""
        return default if self.decode_margin is None else self.decode_margin

    def limits(self, lengths: Int[np.ndarray, "B"], margin: int) -> Int[np.ndarray, "B"]:
        """The most tokens in an output for sources of these lengths; `margin` is the run's."""
        limits = scaled(lengths, self.length_ratio) + self.margin(margin)
        return limits if self.max_length is None else np.minimum(limits, self.max_length)

    def split_prefix(
        self, tokenizer: Tokenizer, limit: int
    ) -> "tuple[DecodingConfig, Int[np.ndarray, 'P'] | None]":
        """The settings that a program is compiled for, and the tokens of the prefix, its input.

        Raises:
          UserError: the tokenizer does not know the text, or an output of `limit` tokens is too
            short for it.
        """
        if not self.prefix:
            return self, None
        given = f"prefix={self.prefix!r}"
        with explained(f"{given}: it is not text; remove half characters", UnicodeError):
            self.prefix.encode()
        try:
            tokens = tokenizer.encode(self.prefix)[:-1]
        except UserError as error:
            raise UserError(f"{given}: {error}; choose others") from error
        if tokenizer.count_unknown(tokens):
            raise UserError(f"{given} has unknown symbols; choose others")
        if (text := tokenizer.decode(tokens)) != self.prefix:
            raise UserError(f"{given}: the tokenizer changes it to {text!r}; give that")
        if len(tokens) >= limit:
            most = f"{len(tokens)} tokens, and outputs have at most {limit}, EOS included"
            raise UserError(f"{given} has {most}; shorten it, or raise decode_margin or max_length")
        return replace(self, prefix=""), np.array(tokens, np.int32)

    def describe(self) -> dict[str, int | float | str]:
        """The settings of the decoding method, and the others that are not the default."""
        names = ["temperature", "top_k", "top_p", "seed"]
        if not self.temperature:
            names = ["beam_size", "length_penalty"][: 1 + (self.beam_size > 1)]
        of_all = (each for each in fields(self)[6:] if getattr(self, each.name) != each.default)
        return {name: getattr(self, name) for name in (*names, *(each.name for each in of_all))}

    def method(self) -> Callable[..., Hypotheses]:
        """The decoding method with its settings."""
        names, method = ("temperature", "top_k", "top_p"), sample
        if self.beam_size > 1:
            names = ("beam_size", "length_penalty", "penalty", "early_stopping", "unfinished")
            method = beam_search
        return partial(method, **{name: getattr(self, name) for name in names})


GREEDY = DecodingConfig()
