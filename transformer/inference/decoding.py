"""Decoding: from a source to the model's own target."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.modules.recurrent import Recurrent
from transformer.modules.transformer import Transformer


class Decoded(NamedTuple):
    """An output of each source.

    tokens: up to and with EOS, then padding.
    log_p: of all of them together, by the model, in nats.
    """

    tokens: Int[Array, "*B T"]
    log_p: Float[Array, "*B"]


def greedy(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    length: int,
    *,
    tokens: int | None = None,
    margin: int | None = None,
) -> Decoded:
    """The likeliest token at each step, up to and with EOS, then padding; see `extend`."""

    def likeliest(log_p: Float[Array, "B V"], _: Int[Array, ""]) -> Int[Array, "B"]:
        return log_p.argmax(-1)

    return extend(model, source, source_segments, length, tokens, margin, likeliest)


def sample(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    length: int,
    *,
    tokens: int | None = None,
    margin: int | None = None,
    keys: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Decoded:
    """Tokens drawn from the model's own distribution, or from its likelier part; see `extend`.

    Args:
      model: the module.
      source: as the encoder reads it.
      source_segments: 0 = padding.
      length: tokens in an output at most, EOS included.
      tokens: see `scores_of`.
      margin: see `limits`.
      keys: of each row, [B]: what it draws does not depend on what shares its batch.
      temperature: what logits are divided by, above 0; below 1 the likelier are drawn more often.
      top_k: so many of the likeliest tokens may be drawn (Fan et al. 2018); 0: all.
      top_p: the likeliest that have this share of the probability together may be drawn (nucleus
        sampling, Holtzman et al. 2020); 1: all.
    """

    def draw(log_p: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, "B"]:
        logits = likelier(log_p / temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(
            jax.vmap(jax.random.fold_in, (0, None))(keys, index), logits
        )

    return extend(model, source, source_segments, length, tokens, margin, draw)


def scores_of(logits: Float[Array, "*B V"], tokens: int | None) -> Float[Array, "*B V"]:
    """log p of each token, and -inf of those that no output may have.

    These are PAD and BOS, which no target has though smoothed labels give them a share, and those
    that only fill up the vocabulary. The others are not normalised anew: their log p is that of
    teacher forcing.

    Args:
      logits: of the next token.
      tokens: how many there are in the vocabulary, if not V.
    """
    number = jnp.arange(logits.shape[-1])
    allowed = (number != PAD) & (number != BOS) & (number < (tokens or logits.shape[-1]))
    return jnp.where(allowed, jax.nn.log_softmax(logits.astype(jnp.float32)), -jnp.inf)


def likelier(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf for the tokens that `sample` may not draw.

    The likeliest one always stays, and what is as likely as one that stays does too.
    """
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        order = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(order)
        before = jnp.cumsum(share, axis=-1) - share  # of all that are likelier
        least = jnp.where(before < top_p, order, order[:, :1]).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def limits(source_segments: Int[Array, "B S"], length: int, margin: int | None) -> Int[Array, "B"]:
    """Tokens that each output may have, EOS included: what shares its batch is no part of it.

    Args:
      source_segments: 0 = padding.
      length: the most of any output.
      margin: so many more than its source has (Vaswani et al. 2017: 50); None: as `length` says.
    """
    if margin is None:
        return jnp.full(len(source_segments), length, jnp.int32)
    return jnp.minimum((source_segments > 0).sum(-1) + margin, length)


def extend(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    length: int,
    tokens: int | None,
    margin: int | None,
    pick: Callable[[Array, Array], Array],
) -> Decoded:
    """One output a row, a token at a time, up to and with EOS, then padding.

    The encoder runs once, the memory's keys and values are projected once, and each
    step computes one target position against the cache. The loop stops when every
    row has ended, or is as long as it may be. A row without a source stays padding.

    Args:
      model: the module.
      source: as the encoder reads it.
      source_segments: 0 = padding.
      length: tokens in an output at most, EOS included.
      tokens: see `scores_of`.
      margin: see `limits`.
      pick: (log p [B, V], the token's place) → the next tokens [B].
    """
    rows = source.shape[0]
    memory = model.encode(source, source_segments)
    cache = model.start_cache(memory, source_segments, length)
    blank = Decoded(jnp.full((rows, length), PAD, jnp.int32), jnp.zeros(rows))
    last = jnp.full((rows, 1), BOS, jnp.int32)
    done = ~(source_segments > 0).any(-1)
    most = limits(source_segments, length, margin)

    def going(carry):
        return ~carry[-1].all()

    def step(carry):
        cache, found, last, done = carry
        logits, advanced = model.decode_step(last, cache)
        log_p = scores_of(logits[:, 0], tokens)
        picked = pick(log_p, cache.filled).astype(jnp.int32)[:, None]
        # log p is summed here: to score whole outputs afterwards takes longer than to find them.
        log_p = jnp.take_along_axis(log_p, picked, axis=1)[:, 0]
        token = jnp.where(done[:, None], PAD, picked)
        longer = jax.lax.dynamic_update_slice(found.tokens, token, (0, cache.filled))
        found = Decoded(longer, found.log_p + jnp.where(done, 0.0, log_p))
        done = done | (token[:, 0] == EOS) | (advanced.filled >= most)
        return advanced, found, token, done

    return loop(going, step, (cache, blank, last, done))[1]


def loop(going: Callable[[Any], Array], step: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`, which carries a batch of one as no batch.

    XLA takes a dimension of 1 out of products. A cache that is carried with it then exists
    twice, and was copied for each token: a fifth of a step for one source on a CPU.
    """

    def thin(carry):
        return [x[0] if x.shape[:1] == (1,) else x for x in jax.tree.leaves(carry)]

    def whole(leaves):
        pairs = zip(leaves, jax.tree.leaves(carry), strict=True)
        return jax.tree.unflatten(
            jax.tree.structure(carry), [leaf.reshape(like.shape) for leaf, like in pairs]
        )

    return whole(
        jax.lax.while_loop(
            lambda leaves: going(whole(leaves)),
            lambda leaves: thin(step(whole(leaves))),
            thin(carry),
        )
    )


class Beams(NamedTuple):
    """The best hypotheses of each source, the best first; J of them.

    tokens: up to and with EOS, then padding. One that found no end in the room there was
      has none, and stands behind those that did.
    scores: log p / penalty(tokens, EOS included), in nats; -inf where there are no more.
    """

    tokens: Int[Array, "*B J T"]
    scores: Float[Array, "*B J"]


class Search(NamedTuple):
    """What beam search carries from token to token.

    cache: of J hypotheses for each source.
    going: the J likeliest hypotheses without an end, [B, J, T].
    log_p: of each of them; -inf where there are fewer.
    ended: the J best that have ended.
    """

    cache: Any
    going: Int[Array, "B J T"]
    log_p: Float[Array, "B J"]
    ended: Beams


def penalty(length: Int[Array, "*B"], alpha: float) -> Float[Array, "*B"]:
    """((5 + length) / 6)^α, which a hypothesis' log p is divided by (Wu et al. 2016, section 7)."""
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


def beam_search(
    model: Transformer | Recurrent,
    source: Int[Array, "B S"],
    source_segments: Int[Array, "B S"],
    length: int,
    *,
    tokens: int | None = None,
    margin: int | None = None,
    beam_size: int,
    length_penalty: float,
) -> Beams:
    """The J = `beam_size` best hypotheses that a search J wide finds for each source.

    Each step extends the J hypotheses at hand by every token. Of the 2J likeliest results
    those that end, and are among the first J, are kept by their score; the J likeliest of
    the others go on. A row is done when no hypothesis at hand can still enter its J best:
    log p only falls, and the penalty of the longest output divides it the most; or when it has
    as many tokens as it may. The loop stops when all rows are done, so the answer does not depend
    on what shares a batch.

    At J = 1 without a length penalty it is greedy decoding; with J the number of all
    sequences, it ranks them all. PAD and BOS are never said; see `scores_of`.

    Args:
      model: the module.
      source: as the encoder reads it.
      source_segments: 0 = padding; a row without a source gets no hypothesis.
      length: tokens in an output at most, EOS included.
      tokens: see `scores_of`.
      margin: see `limits`.
      beam_size: J.
      length_penalty: α ≥ 0; 0 ranks by probability, more favours longer outputs.
    """
    rows, width = source.shape[0], beam_size
    memory = model.encode(source, source_segments)
    cache = model.start_cache(memory, source_segments, length, hypotheses=width)
    blank = jnp.full((rows, width, length), PAD, jnp.int32)
    nothing = jnp.full((rows, width), -jnp.inf)
    has_source = (source_segments > 0).any(-1)
    most = limits(source_segments, length, margin)
    longest_penalty = penalty(most, length_penalty)
    search = Search(
        cache=cache,
        going=blank,
        log_p=nothing.at[:, 0].set(jnp.where(has_source, 0.0, -jnp.inf)),
        ended=Beams(blank, nothing),
    )

    def is_going(search: Search) -> Bool[Array, ""]:
        within_reach = search.log_p[:, 0] / longest_penalty
        hopeful = within_reach > search.ended.scores[:, -1]
        return (hopeful & (search.cache.filled < most)).any()

    def step(search: Search) -> Search:
        index = search.cache.filled
        before = jnp.maximum(index - 1, 0)
        last = jax.lax.dynamic_index_in_dim(search.going, before, axis=2)
        last = jnp.where(index == 0, BOS, last)[..., 0]
        logits, cache = model.decode_step(last, search.cache)
        log_p = search.log_p[..., None] + scores_of(logits, tokens)
        log_p, place = jax.lax.top_k(log_p.reshape(rows, -1), 2 * width)
        parent, token = place // logits.shape[-1], (place % logits.shape[-1]).astype(jnp.int32)
        longer = take(search.going, parent)
        longer = jax.lax.dynamic_update_slice(longer, token[..., None], (0, 0, index))

        ends = token == EOS
        finishes = ends & (jnp.arange(2 * width) < width)
        scores = jnp.where(finishes, log_p, -jnp.inf) / penalty(index + 1, length_penalty)
        ended = best(
            Beams(
                jnp.concatenate([search.ended.tokens, longer], axis=1),
                jnp.concatenate([search.ended.scores, scores], axis=1),
            ),
            width,
        )
        log_p, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_p), width)
        parent = jnp.take_along_axis(parent, chosen, axis=1)
        grown: Any = take(longer, chosen), log_p, ended
        if margin is not None:  # a row that is as long as it may be waits for the others
            grown = where(index < most, grown, (search.going, search.log_p, search.ended))
        return Search(cache.pick(parent), *grown)

    search = loop(is_going, step, search)
    scores = search.log_p / longest_penalty[:, None]
    return followed_by(search.ended, Beams(search.going, scores))


def where(rows: Bool[Array, "B"], chosen: Any, others: Any) -> Any:
    """Those rows of `chosen`, and of `others` the other ones; trees of arrays [B, …]."""

    def pick(one: Array, other: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return jax.tree.map(pick, chosen, others)


def take(tokens: Int[Array, "B J T"], index: Int[Array, "B I"]) -> Int[Array, "B I T"]:
    """The hypotheses called `index` in each row."""
    return jnp.take_along_axis(tokens, index[..., None], axis=1)


def best(beams: Beams, number: int) -> Beams:
    """The `number` best of them, the best first."""
    scores, place = jax.lax.top_k(beams.scores, number)
    return Beams(take(beams.tokens, place), scores)


def followed_by(first: Beams, second: Beams) -> Beams:
    """As many as each holds: those of `first` that there are, then those of `second`."""
    width = first.scores.shape[1]
    number = jnp.isfinite(first.scores).sum(1, keepdims=True)
    place = jnp.arange(width)
    place = jnp.where(place < number, place, width + place - number)
    scores = jnp.concatenate([first.scores, second.scores], axis=1)
    scores = jnp.take_along_axis(scores, place, axis=1)
    tokens = take(jnp.concatenate([first.tokens, second.tokens], axis=1), place)
    return Beams(jnp.where(jnp.isfinite(scores)[..., None], tokens, PAD), scores)
