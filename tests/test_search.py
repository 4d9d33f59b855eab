"""Beam search against its rules, written out for one source at a time, on tables of log p."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import Markov
from transformer.data.tokenizer import EOS, PAD
from transformer.inference.logits import Constraints
from transformer.inference.search import EARLY_STOPPING, UNFINISHED, Sources, beam_search, sample
from transformer.modules.model import OutputTokens

ALPHAS = 0.0, 0.6
VOCAB, LENGTH, ROWS, BEAMS = 7, 9, 40, 3
NUMBERS = np.random.default_rng(0)
TABLES = 1.5 * NUMBERS.normal(size=(ROWS, LENGTH, VOCAB, VOCAB)).astype(np.float32)
TABLES[..., EOS] -= 0.5  # so that several hypotheses reach the length limit
# The first token names the row's table; a margin of 0 makes the length of a source its limit.
LIMITS = 3 + np.arange(ROWS) % (LENGTH - 2)
SOURCE = np.where(np.arange(LENGTH) < LIMITS[:, None], 1 + np.arange(ROWS)[:, None], PAD)
MODULE = Markov(np.concatenate([TABLES[:1], TABLES]))
STARTS = OutputTokens(start=PAD, banned=(3, 6))
FORCED = OutputTokens(start=EOS, banned=(PAD,), forced_first=4, forced_last=EOS)


def rules(row, outputs, alpha, stop, unfinished, kind):
    """The best outputs of a row and their scores."""
    limit = LIMITS[row]

    def norm(length):
        return (length if kind == "length" else (5 + length) / 6) ** alpha

    def ends(tokens):
        return tokens[-1] == EOS or (unfinished == "equal" and len(tokens) == limit)

    live, finished = [((), 0.0)], []
    for n in range(limit):
        grown = []
        for tokens, total in live:
            logits = TABLES[row, n, tokens[-1] if tokens else outputs.start].astype(float)
            log_p = logits - np.log(np.exp(logits).sum())
            log_p[[*outputs.banned]] = -np.inf
            for at, token in ((0, outputs.forced_first), (limit - 1, outputs.forced_last)):
                if token is not None and at == n:
                    log_p = np.where(np.arange(VOCAB) == token, 0.0, -np.inf)
            grown += [((*tokens, t), total + log_p[t]) for t in range(VOCAB) if log_p[t] > -np.inf]
        grown = sorted(grown, key=lambda each: -each[1])[: 2 * BEAMS]
        ended = [(total / norm(n + 1), tokens) for tokens, total in grown[:BEAMS] if ends(tokens)]
        finished = sorted(finished + ended, reverse=True)[:BEAMS]
        live = [each for each in grown if not ends(each[0])][:BEAMS]
        if len(finished) == BEAMS and live:
            bound = live[0][1] / norm(limit if stop == "never" else n + 1)
            if stop == "true" or bound <= finished[-1][0]:
                live = []
        if not live:
            break
    rest = [(total / norm(limit), tokens) for tokens, total in live]
    return (finished + rest)[:BEAMS]


def found(outputs, alpha, stop, unfinished, kind):
    constraints = Constraints(None, 0, 0, 1.0, outputs.forced_first, outputs.forced_last)
    sources = Sources(
        jnp.asarray(SOURCE), LENGTH, margin=0, constraints=constraints, outputs=outputs
    )
    options = {"penalty": kind, "early_stopping": stop, "unfinished": unfinished}
    search = partial(beam_search, MODULE, sources, BEAMS, alpha, **options)
    return jax.tree.map(np.asarray, jax.jit(search)())


CASES = [*itertools.product(EARLY_STOPPING, UNFINISHED, ALPHAS)]


@pytest.mark.parametrize(("stop", "unfinished", "alpha"), CASES)
def test_each_rule_is_followed(stop, unfinished, alpha):
    options = STARTS, alpha, stop, unfinished, "length"
    for row, (tokens, scores) in enumerate(zip(*found(*options), strict=True)):
        expected = rules(row, *options)
        np.testing.assert_allclose(scores[: len(expected)], [x[0] for x in expected], rtol=1e-4)
        assert [tuple(own[: len(x[1])]) for own, x in zip(tokens, expected, strict=True)] == [
            x[1] for x in expected
        ]


def test_the_cases_differ():
    """Otherwise the test above would not show that a setting has an effect."""
    results = {
        str([rules(row, STARTS, alpha, *case, "length") for alpha in ALPHAS for row in range(ROWS)])
        for case in itertools.product(EARLY_STOPPING, UNFINISHED)
    }
    assert len(results) == len(EARLY_STOPPING) * len(UNFINISHED)


@pytest.mark.parametrize("unfinished", UNFINISHED)
def test_forced_tokens_cost_nothing(unfinished):
    options = FORCED, 1.0, "never", unfinished, "length"
    for row, (tokens, scores) in enumerate(zip(*found(*options), strict=True)):
        expected = rules(row, *options)
        np.testing.assert_allclose(scores, [x[0] for x in expected], rtol=1e-4)
        assert (tokens[:, 0] == 4).all()
        assert (tokens == EOS).any(1).all()


def test_greedy_decoding_starts_forces_and_bans_likewise():
    constraints = Constraints(None, 3, 0, 1.0, FORCED.forced_first, FORCED.forced_last)
    sources = Sources(
        jnp.asarray(SOURCE), LENGTH, margin=0, constraints=constraints, outputs=FORCED
    )
    tokens, scores = jax.jit(partial(sample, MODULE, sources, 0.0))()
    for row, limit in enumerate(LIMITS.tolist()):
        own, total = [EOS], 0.0
        for n in range(limit):
            log_p = np.asarray(jax.nn.log_softmax(TABLES[row, n, own[-1]]))
            order = [t for t in np.argsort(-log_p).tolist() if t != PAD and (t != EOS or n >= 3)]
            forced = 4 if n == 0 else EOS if n == limit - 1 else None
            own.append(order[0] if forced is None else forced)
            total += log_p[own[-1]] if forced is None else 0.0
            if own[-1] == EOS:
                break
        assert tokens[row, 0, : len(own) - 1].tolist() == own[1:]
        np.testing.assert_allclose(scores[row, 0], total, rtol=1e-4, atol=1e-5)


def test_a_start_that_outputs_may_contain_counts_as_one_of_their_tokens():
    scores, output = jnp.ones((1, VOCAB)), jnp.full((1, LENGTH), 4)
    found = Constraints(repetition_penalty=2.0, start=5).apply(scores, output, jnp.int32(2))
    np.testing.assert_allclose(found[0], [1, 1, 1, 1, 0.5, 0.5, 1])
    found = Constraints(no_repeat_ngram_size=1, start=5).apply(scores, output, jnp.int32(0))
    np.testing.assert_array_equal(np.isfinite(found[0]), np.arange(VOCAB) != 5)
