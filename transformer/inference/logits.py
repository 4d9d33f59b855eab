"""What is done to the scores of the next token, logits or log p, before one is selected."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import BOS, EOS, PAD


def next_log_p(
    logits: Float[Array, "*B V"], num_tokens: int | None, banned: tuple[int, ...] = (PAD, BOS)
) -> Float[Array, "*B V"]:
    """log p of each next token; -inf for banned ones and the entries that pad the vocabulary.

    The others are not renormalised: their log p is that of teacher forcing.
    """
    token = jnp.arange(logits.shape[-1])
    allowed = token < (num_tokens or logits.shape[-1])
    for each in banned:
        allowed &= token != each
    return jnp.where(allowed, jax.nn.log_softmax(logits.astype(jnp.float32)), -jnp.inf)


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """The logits of the tokens that may be sampled, -inf for the others.

    These are the `top_k` most likely (Fan et al. 2018; 0: all), and of them the most likely whose
    probabilities sum to `top_p` (Holtzman et al. 2020); also any as likely as one of these.
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


class Constraints(NamedTuple):
    """What every output must satisfy; the defaults allow everything and cost nothing.

    The settings have the meaning of the same names in Hugging Face's `generate`; `min_length` is
    its `min_new_tokens`, counting the prefix.
    """

    prefix: Int[Array, "P"] | None = None  # the first tokens; the other settings do not apply to it
    min_length: int = 0  # tokens before EOS at least
    no_repeat_ngram_size: int = 0  # n: no n tokens occur twice in this order; 0: any may
    repetition_penalty: float = 1.0  # divides positive scores of tokens that occur, times negative
    forced_first: int | None = None  # the first token, whose log p is then 0
    forced_last: int | None = None  # likewise that of the last step, at the length limit
    start: int | None = None  # counts as an output's first token where these must not recur

    def force(
        self, scores: Float[Array, "B *J V"], index: Int[Array, ""], limits: Int[Array, "B"] | None
    ) -> Float[Array, "B *J V"]:
        """The scores of the next token, 0 for a forced one and -inf for the others."""

        def only(token: int) -> Float[Array, "V"]:
            return jnp.where(jnp.arange(scores.shape[-1]) == token, 0.0, -jnp.inf)

        if self.forced_first is not None:
            scores = jnp.where(index == 0, only(self.forced_first), scores)
        if self.forced_last is not None and limits is not None:
            last = (index == limits - 1).reshape(-1, *[1] * (scores.ndim - 1))
            scores = jnp.where(last, only(self.forced_last), scores)
        return scores

    def apply(
        self,
        scores: Float[Array, "*B V"],
        output: Int[Array, "*B T"],
        index: Int[Array, ""],
        limits: Int[Array, "B"] | None = None,
    ) -> Float[Array, "*B V"]:
        """The scores of the next token after the first `index` tokens of an output.

        `limits` are the most tokens in the outputs of each row, for `forced_last`.
        """
        given, size = scores, scores.shape[-1]
        seen, count = output, index
        if self.start is not None:
            pad = [*[(0, 0)] * (output.ndim - 1), (1, 0)]
            seen, count = jnp.pad(output, pad, constant_values=self.start), index + 1
        if self.repetition_penalty != 1.0:
            factor = self.repetition_penalty
            lower = jnp.where(scores < 0, scores * factor, scores / factor)
            scores = jnp.where(_continues(seen, count, 1, size), lower, scores)
        if self.no_repeat_ngram_size:
            repeats = _continues(seen, count, self.no_repeat_ngram_size, size)
            scores = jnp.where(repeats, -jnp.inf, scores)
        if self.min_length:
            end, early = jnp.arange(size) == EOS, index < self.min_length
            if self.no_repeat_ngram_size:  # an output that cannot go on ends
                early &= jnp.where(end, -jnp.inf, scores).max(-1, keepdims=True) > -jnp.inf
            scores = jnp.where(end & early, -jnp.inf, scores)
        if self.prefix is not None:
            forced = jnp.arange(size) == self.prefix[jnp.minimum(index, len(self.prefix) - 1)]
            chosen = jnp.where(forced, given, -jnp.inf)
            scores = jnp.where(index < len(self.prefix), chosen, scores)
        return self.force(scores, index, limits)


def _continues(
    output: Int[Array, "*B T"], index: Int[Array, ""], n: int, size: int
) -> Bool[Array, "*B V"]:
    """Which tokens have completed an n-gram that starts with the last n - 1 of `index` tokens."""
    place = jnp.arange(output.shape[-1])
    ends = jnp.broadcast_to((place >= n - 1) & (place < index), output.shape)
    for back in range(1, n):
        last = jax.lax.dynamic_index_in_dim(output, index - back, -1)
        ends &= jnp.roll(output, back, -1) == last
    rows, ends = (x.reshape(-1, output.shape[-1]) for x in (output, ends))
    found = jnp.zeros((len(rows), size), bool).at[jnp.arange(len(rows))[:, None], rows].max(ends)
    return found.reshape(*output.shape[:-1], size)
