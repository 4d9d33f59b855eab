import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from tests.helpers import logits_of, random_params, small_model, strings
from transformer.data.batches import make_batch
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.inference import search as methods
from transformer.inference.decoding import GREEDY
from transformer.inference.logits import Constraints, truncate
from transformer.inference.search import Sources, beam_search, sample
from transformer.modules.model import Model

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
LENGTH = 3  # of the outputs that beam search is compared on, so that all can be tried
SOURCE = jnp.array([[4, 5, EOS, PAD], [3, EOS, PAD, PAD], [5, 4, 3, EOS]])
KEYS = jax.random.split(jax.random.key(7), 4000)
greedy = GREEDY.method()
METHODS = {"greedy": greedy, "sampling": sample, "beam search": beam_search}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


@cache
def tiny_tokens(**changes):
    """A model over 6 tokens, and its parameters."""
    model = Model(small_model(**changes).config, 6)
    return model, random_params(model, 3)


@partial(jax.jit, static_argnums=(0, 2, 3, 4, 6))
def searched(model, params, beam_size, alpha, length, source, small_cache):
    return beam_search(model.bind(params), Sources(source, length), beam_size, alpha)


def search(model, params, beam_size, alpha, length=LENGTH, source=SOURCE):
    found = searched(model, params, beam_size, alpha, length, source, methods.SMALL_CACHE)
    return jax.tree.map(np.asarray, found)


def steady(logits):
    """A model with the same logits at each step: these, and 0 for all other tokens."""
    model = small_model(tie_embeddings="none")
    params = random_params(model, 0)
    gain, table = params["decoder/final_norm/scale"], 0 * params["output_embedding/embedding"]
    params |= {"decoder/final_norm/scale": 0 * gain, "decoder/final_norm/bias": 0 * gain + 1}
    for token, logit in logits.items():
        table = table.at[token].set(logit / table.shape[1])
    return model.bind(params | {"output_embedding/embedding": table})


@each_method
def test_no_output_has_pad_bos_or_padding_of_the_vocabulary(method):
    """However likely they are; the score is that of teacher forcing."""
    likely = dict.fromkeys((PAD, BOS, 30, 31), 16.0) | {7: 12.0, EOS: 11.0}
    found = method(steady(likely), Sources(BATCH.source, 3, KEYS[:3], num_tokens=30))
    tokens = np.asarray(found.tokens)[:, 0]
    real = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0
    assert set(tokens[real].tolist()) <= {7, EOS}
    if method is greedy:
        logits = jnp.zeros(32).at[jnp.array([*likely])].set(jnp.array([*likely.values()]))
        each = float(jax.nn.log_softmax(logits)[7])
        np.testing.assert_allclose(found.scores, [[3 * each]] * 3, rtol=1e-4)


@each_method
def test_outputs_end_with_eos_and_the_loop_with_the_last_of_them(method, monkeypatch):
    """Each source's output ends at once with probability nearly 1: one step is enough."""
    module, steps = steady({EOS: 16.0}), []
    original = type(module).decode_step

    def counted(self, tokens, cache):
        jax.debug.callback(lambda filled: steps.append(int(filled)), cache.filled)
        return original(self, tokens, cache)

    monkeypatch.setattr(type(module), "decode_step", counted)
    width = {"beam_size": 1} if method is beam_search else {}
    found = method(module, Sources(BATCH.source, 50, KEYS[:3]), **width)
    jax.effects_barrier()
    assert steps == [0]
    np.testing.assert_array_equal(found.tokens[:, 0], [[EOS] + [PAD] * 49] * 3)


def test_greedy_decoding_takes_the_first_of_equally_likely_tokens():
    found = greedy(steady({7: 16.0, 9: 16.0}), Sources(BATCH.source, 3))
    np.testing.assert_array_equal(found.tokens[:, 0], [[7] * 3] * 3)


def test_greedy_decoding_ends_where_logits_are_nan():
    module = steady({7: 16.0})
    module.output_embedding.embedding[...] *= jnp.nan
    np.testing.assert_array_equal(greedy(module, Sources(BATCH.source, 2)).tokens[:, 0, 0], EOS)


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"architecture": "recurrent"}], ids=str)
def test_outputs_do_not_depend_on_when_the_cache_grows(changes, monkeypatch):
    model, params = tiny_tokens(**changes)
    found = []
    for entries in (1, 4 * 40):
        monkeypatch.setattr(methods, "SMALL_CACHE", entries)
        found.append(search(model, params, 4, 9.0, length=40))  # α prefers long outputs
    assert (found[0].tokens != PAD).sum(-1).max() > SOURCE.shape[1] + 8
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-4)


def padded(tokens, length):
    return (*tokens, *[PAD] * (length - len(tokens)))


def every_sequence(vocab):
    """All sequences of up to `LENGTH` tokens that end with EOS, and all cut off there."""
    others = [token for token in range(vocab) if token not in (PAD, BOS, EOS)]
    for n in range(LENGTH):
        yield from (padded((*start, EOS), LENGTH) for start in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=LENGTH)


@partial(jax.jit, static_argnums=0)
def log_p_of(model, params, source, target):
    source = jnp.broadcast_to(source, (len(target), source.shape[-1]))
    return jax.nn.log_softmax(logits_of(model, params, make_batch(source, target)))


def forced_log_p(model, params, source, target):
    """log p of every next token by teacher forcing, without a cache."""
    return np.asarray(log_p_of(model, params, source, jnp.asarray(target, jnp.int32)))


def scored(model, params, alpha):
    """Each source's (has an end, score, tokens), the best first, finished ones before others."""
    target = np.array([*every_sequence(model.vocab_size)])
    real, ended, ranked = target != PAD, (target == EOS).any(1).tolist(), []
    for source in SOURCE:
        log_p = forced_log_p(model, params, source, target).astype(np.float64)
        log_p = np.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        scores = (log_p * real).sum(1) / ((5 + real.sum(1)) / 6) ** alpha
        ranked.append(sorted(zip(ended, scores, target.tolist(), strict=True), reverse=True))
    return ranked


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("changes", [{}, {"architecture": "recurrent"}], ids=str)
def test_a_beam_that_holds_every_sequence_ranks_them_all(changes, alpha):
    model, params = tiny_tokens(**changes)
    found = search(model, params, len(list(every_sequence(model.vocab_size))), alpha)
    for tokens, scores, ranked in zip(*found, scored(model, params, alpha), strict=True):
        assert tokens.tolist() == [each[2] for each in ranked]
        np.testing.assert_allclose(scores, [each[1] for each in ranked], rtol=1e-4)


CONSTRAINTS = {
    "prefix": (  # which the other constraints do not exclude
        {"prefix": jnp.array([4, 4]), "no_repeat_ngram_size": 1},
        lambda tokens: tokens[:2] == [4, 4] and tokens[2] != 4,
    ),
    "min_length": ({"min_length": 2}, lambda tokens: EOS not in tokens[:2]),
    "no_repeat": ({"no_repeat_ngram_size": 1}, lambda x: max(map(x.count, {*x} - {PAD})) == 1),
}


@pytest.mark.parametrize(("settings", "allows"), CONSTRAINTS.values(), ids=list(CONSTRAINTS))
def test_a_beam_that_holds_every_sequence_has_those_that_the_constraints_allow(settings, allows):
    """In their order, with the scores of teacher forcing, those of a prefix included."""
    model, params = tiny_tokens()
    width = len(list(every_sequence(model.vocab_size)))
    sources = Sources(SOURCE, LENGTH, constraints=Constraints(**settings))
    call = jax.jit(lambda params: beam_search(model.bind(params), sources, width, 0.6))
    for tokens, scores, ranked in zip(*call(params), scored(model, params, 0.6), strict=True):
        ranked = [each for each in ranked if allows(each[2])]
        there = np.isfinite(scores)
        assert np.asarray(tokens)[there].tolist() == [each[2] for each in ranked]
        np.testing.assert_allclose(scores[there], [each[1] for each in ranked], rtol=1e-4)


def test_constraints_come_before_the_truncation_of_samples_and_do_not_change_scores():
    model, params = tiny_tokens(tie_embeddings="none")
    limits = {"min_length": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    constraints = Constraints(jnp.array([3, 3]), **limits)
    source = jnp.broadcast_to(SOURCE[0], (64, 4))
    sources = Sources(source, 9, KEYS[:64], constraints=constraints)
    settings = {"1": {"top_k": 1}, "all": {}, "greedy": {"temperature": 0.0}}
    calls = jax.jit(lambda p: {x: sample(model.bind(p), sources, **y) for x, y in settings.items()})
    found = jax.tree.map(lambda x: np.asarray(x)[:, 0], calls(params))
    jax.tree.map(np.testing.assert_array_equal, found["1"], found["greedy"])
    tokens, scores = found["all"]
    assert len(np.unique(tokens, axis=0)) > 20
    log_p = forced_log_p(model, params, SOURCE[0], tokens).astype(np.float64)
    log_p = np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores, (log_p * (tokens != PAD)).sum(1), rtol=1e-4)
    for row in tokens.tolist():
        assert row[:2] == [3, 3]
        assert EOS not in row[:4]
        pairs = [pair for pair in itertools.pairwise(row[1:]) if PAD not in pair]
        assert len({*pairs}) == len(pairs)
        assert (3, 3) not in pairs


def test_an_output_of_which_every_next_token_is_excluded_ends():
    """Though it is shorter than the least length: there are but three tokens beside EOS."""
    model, params = tiny_tokens()
    sources = Sources(SOURCE, 9, constraints=Constraints(min_length=6, no_repeat_ngram_size=1))
    found = jax.jit(lambda params: [f(model.bind(params), sources) for f in (greedy, beam_search)])
    for each in found(params):
        assert (np.sort(each.tokens[:, 0, :4])[:, 1:] == [3, 4, 5]).all()
        np.testing.assert_array_equal(each.tokens[:, 0, 3], EOS)


def searched_by_definition(log_p_after, width, alpha, length):
    """Beam search over lists of tokens, which never stops early and has no cache."""
    live, finished = [((), 0.0)], []
    for place in range(length):
        grown = [
            ((*tokens, token), total + log_p)
            for tokens, total in live
            for token, log_p in enumerate(log_p_after(tokens))
            if token not in (PAD, BOS)
        ]
        likely = sorted(grown, key=lambda each: -each[1])[: 2 * width]
        penalty = ((5 + place + 1) / 6) ** alpha
        finished += [(one, total / penalty) for one, total in likely[:width] if one[-1] == EOS]
        finished = sorted(finished, key=lambda each: -each[1])[:width]
        live = [each for each in likely if each[0][-1] != EOS][:width]
    return (finished + [(one, total / penalty) for one, total in live])[:width]


@pytest.mark.parametrize(
    ("alpha", "changes"), [(0.0, {}), (1.0, {}), (4.0, {}), (0.6, {"architecture": "recurrent"})]
)
def test_beam_search_finds_what_its_definition_finds(alpha, changes):
    """A hypothesis that can still become the best is followed, however long it gets."""
    model, _ = tiny_tokens(tie_embeddings="none", **changes)
    width, length = 3, 6
    for seed in range(6):
        params = random_params(model, seed)

        def log_p_after(tokens, params=params):
            target = [padded((*tokens, EOS), length)]
            return forced_log_p(model, params, SOURCE[0], target)[0, len(tokens)].tolist()

        wanted = searched_by_definition(log_p_after, width, alpha, length)
        found = search(model, params, width, alpha, length, SOURCE[:1])
        np.testing.assert_array_equal(found.tokens[0], [padded(one, length) for one, _ in wanted])
        np.testing.assert_allclose(found.scores[0], [score for _, score in wanted], rtol=1e-4)


@each_method
def test_an_outputs_length_limit_depends_on_its_own_source(method):
    """With a margin a batch has the outputs of each source alone with that maximal length."""
    model, _ = tiny_tokens(tie_embeddings="none")
    lengths, margin, ratio = (3, 2, 4), 2, 1.0
    if method is greedy:
        lengths, margin, ratio = (5, 3, 6), 0, 1.5  # ⌈1.5 · 3⌉, …

    def found(params, rows, length, margin=None):
        sources = Sources(SOURCE[rows], length, KEYS[:3][rows], margin=margin, ratio=ratio)
        return method(model.bind(params), sources)

    together = jax.jit(partial(found, rows=slice(0, 3), length=9, margin=margin))
    alone = [
        jax.jit(partial(found, rows=slice(i, i + 1), length=length + margin))
        for i, length in enumerate(lengths)
    ]
    cut = whole = 0
    for seed in range(12):
        params = random_params(model, seed)
        batch = together(params)
        for i, each in enumerate(alone):
            one, width = each(params), lengths[i] + margin
            np.testing.assert_array_equal(batch.tokens[i, :, :width], one.tokens[0])
            np.testing.assert_array_equal(batch.tokens[i, :, width:], PAD)
            np.testing.assert_allclose(batch.scores[i], one.scores[0], rtol=1e-5)
            ends = (np.asarray(one.tokens) == EOS).any(-1)
            cut, whole = cut + (~ends).sum(), whole + ends.sum()
    assert min(cut, whole) > 5  # so that the test is about something


def drawn(module, source, length, keys, **settings):
    call = jax.jit(lambda keys: sample(module, Sources(source, length, keys), **settings).tokens)
    return np.asarray(call(keys))[:, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.95)]
)
def test_tokens_are_sampled_with_the_probabilities_of_the_model(temperature, top_k, top_p):
    """The first two tokens of one source, by a χ² test with p = 1e-4, keys being fixed."""
    model, params = tiny_tokens()
    source = jnp.broadcast_to(SOURCE[:1], (len(KEYS), 4))
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rows = drawn(model.bind(params), source, 2, KEYS, **settings)
    np.testing.assert_array_equal(rows[rows[:, 0] == EOS, 1], PAD)
    for before, tokens in ([], rows[:, 0]), ([3], rows[rows[:, 0] == 3, 1]):
        # How often each token should come after these, by the whole model and NumPy.
        logits = forced_log_p(model, params, SOURCE[0], [[*before, EOS]])[0, -1] / temperature
        logits[[PAD, BOS]] = -np.inf
        p = np.where(kept(logits, top_k, top_p), np.exp(logits - logits.max(), dtype=float), 0.0)
        counts, p = np.bincount(tokens, minlength=6), p / p.sum()
        assert counts.sum() > 200
        assert (counts[p == 0] == 0).all()
        assert (p > 0).sum() > 1
        assert scipy.stats.chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue > 1e-4


def kept(logits, top_k, top_p):
    """Which tokens may be drawn: one after another, the likeliest first, and all that tie."""
    order = sorted(set(logits[np.isfinite(logits)].tolist()), reverse=True)
    may = np.zeros(len(logits), bool)
    for value in order:
        if top_k and may.sum() >= top_k:
            break
        may |= logits == value
    p = np.where(may, np.exp(logits - logits.max()), 0.0)
    p /= p.sum()
    nucleus = np.zeros(len(logits), bool)
    for value in order:
        if nucleus.any() and p[nucleus].sum() >= top_p:
            break
        nucleus |= (logits == value) & may
    return nucleus


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.77, 0.999, 1.0])
def test_truncated_logits_are_those_of_brute_force(top_k, top_p, rng):
    """With ties at every place, and with all alike."""
    logits = rng.integers(-3, 4, size=(200, 9)) * 0.37 * rng.choice([0, 1, 5], size=(200, 1))
    logits = np.asarray(logits, np.float32)
    found = np.asarray(truncate(jnp.asarray(logits), top_k, top_p))
    for row, own in zip(logits.astype(np.float64), found, strict=True):
        np.testing.assert_array_equal(np.isfinite(own), kept(row, top_k, top_p))
    np.testing.assert_array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])
