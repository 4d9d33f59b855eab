import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from tests.helpers import logits_of, random_params, small_model, strings
from transformer.data.batches import make_batch
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding import beam_search, greedy, likelier, sample
from transformer.model import Model

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))


def ending_at_once():
    """A model that ends every sequence with its first token."""
    model = small_model(tie_embeddings=False)
    params = random_params(model, 0)
    gain = params["decoder/final_norm/gain"]
    params |= {
        "decoder/final_norm/gain": jnp.zeros_like(gain),
        "decoder/final_norm/bias": jnp.ones_like(gain),
        "output_embedding/table": jnp.zeros_like(params["output_embedding/table"]).at[EOS].set(1.0),
    }
    return model.bind(params)


def test_rows_end_with_eos_and_padding():
    decoded = greedy(ending_at_once(), BATCH.source, BATCH.source_segments, 5)
    np.testing.assert_array_equal(decoded.tokens, [[EOS, PAD, PAD, PAD, PAD]] * 3)


def test_the_loop_stops_when_all_rows_have_ended(monkeypatch):
    module, steps = ending_at_once(), []
    original = type(module).decode_step

    def counted(self, tokens, cache):
        jax.debug.callback(lambda filled: steps.append(int(filled)), cache.filled)
        return original(self, tokens, cache)

    monkeypatch.setattr(type(module), "decode_step", counted)
    jax.block_until_ready(greedy(module, BATCH.source, BATCH.source_segments, 50))
    jax.effects_barrier()
    assert steps == [0]


def test_a_row_without_a_source_stays_padding():
    module = small_model().bind(random_params(small_model(), 0))
    segments = BATCH.source_segments.at[1].set(0)
    decoded = greedy(module, BATCH.source, segments, 4)
    np.testing.assert_array_equal(decoded.tokens[1], PAD)
    assert decoded.log_p[1] == 0.0


LENGTH = 3  # of the outputs that beam search is compared on, so that all can be tried


@cache
def tiny_tokens(**changes):
    """A model over 6 tokens, and its parameters."""
    model = Model(small_model(**changes).config, 6)
    params = random_params(model, 3)
    return model, params


SOURCE = jnp.array([[4, 5, EOS, PAD], [3, EOS, PAD, PAD], [5, 4, 3, EOS]])
SEGMENTS = (SOURCE != PAD).astype(jnp.int32)


def search(model, params, beam_size, alpha, length=LENGTH, source=SOURCE, segments=None):
    segments = SEGMENTS if segments is None else segments
    found = jax.jit(
        lambda params: beam_search(
            model.bind(params),
            source,
            segments,
            length,
            beam_size=beam_size,
            length_penalty=alpha,
        )
    )(params)
    return jax.tree.map(np.asarray, found)


def every_sequence(vocab):
    """All sequences of up to `LENGTH` tokens that end with EOS, and all cut off there."""
    others = [token for token in range(vocab) if token != EOS]
    for n in range(LENGTH):
        yield from ((*start, EOS) for start in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=LENGTH)


def scored(model, params, alpha):
    """Each source's sequences, the best first, those that end before those that do not.

    (has an end, score, tokens), each by a call of the whole model, without a cache.
    """
    sequences = list(every_sequence(model.vocab_size))
    target = np.full((len(sequences), LENGTH), PAD, np.int32)
    for row, sequence in zip(target, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences])
    real = np.arange(LENGTH) < lengths[:, None]
    target_in = np.concatenate([np.full((len(target), 1), BOS), target[:, :-1]], axis=1)
    ranked = []
    for source, segments in zip(SOURCE, SEGMENTS, strict=True):
        repeated = [jnp.broadcast_to(each, (len(target), 4)) for each in (source, segments)]
        logits = jax.jit(lambda *args: model.bind(params)(*args))(
            *repeated, jnp.asarray(target_in, jnp.int32), jnp.asarray(real, jnp.int32)
        )
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        log_p = np.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        scores = (log_p * real).sum(1) / ((5 + lengths) / 6) ** alpha
        ends = [EOS in sequence for sequence in sequences]
        rows = zip(ends, scores, map(tuple, target.tolist()), strict=True)
        ranked.append(sorted(rows, reverse=True))
    return ranked


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize(
    "changes", [{}, {"position": "alibi"}, {"architecture": "recurrent"}], ids=str
)
def test_a_beam_that_holds_every_sequence_ranks_them_all(changes, alpha):
    model, params = tiny_tokens(**changes)
    found = search(model, params, len(list(every_sequence(model.vocab_size))), alpha)
    for tokens, scores, ranked in zip(*found, scored(model, params, alpha), strict=True):
        assert [tuple(each) for each in tokens.tolist()] == [each[2] for each in ranked]
        np.testing.assert_allclose(scores, [each[1] for each in ranked], rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"architecture": "recurrent"}], ids=str)
def test_scores_are_those_of_the_model_on_the_hypotheses(changes):
    """And a beam of 3 follows its own cache: what it says of an output is true of it."""
    model, params = tiny_tokens(**changes)
    found = search(model, params, 3, 0.6)
    for tokens, scores, ranked in zip(*found, scored(model, params, 0.6), strict=True):
        table = {tokens: score for _, score, tokens in ranked}
        expected = [table[tuple(each)] for each in tokens.tolist()]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
        ends = [EOS in each for each in tokens.tolist()]
        assert ends == sorted(ends, reverse=True)
        order = list(zip(ends, scores, strict=True))
        assert order == sorted(order, reverse=True)
        assert len(set(map(tuple, tokens.tolist()))) == 3


def searched_by_definition(log_p_after, width, alpha, length):
    """Beam search over lists of tokens, which never stops early and has no cache."""
    going, ended = [((), 0.0)], []
    for place in range(length):
        grown = [
            ((*tokens, token), total + log_p)
            for tokens, total in going
            for token, log_p in enumerate(log_p_after(tokens))
        ]
        likely = sorted(grown, key=lambda each: -each[1])[: 2 * width]
        penalty = ((5 + place + 1) / 6) ** alpha
        ended += [(one, total / penalty) for one, total in likely[:width] if one[-1] == EOS]
        ended = sorted(ended, key=lambda each: -each[1])[:width]
        going = [each for each in likely if each[0][-1] != EOS][:width]
    return (ended + [(one, total / penalty) for one, total in going])[:width]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_the_search_is_its_definition_and_stops_no_sooner(alpha):
    """A hypothesis that can still become the best is followed, however long it gets."""
    model, _ = tiny_tokens(tie_embeddings=False)
    width, length, source = 2, 6, (SOURCE[:1], SEGMENTS[:1])
    whole = jax.jit(lambda params, target, real: model.bind(params)(*source, target, real))
    for seed in range(6):
        params = random_params(model, seed)

        def log_p_after(tokens, params=params):
            target = np.full((1, length), PAD, np.int32)
            target[0, : len(tokens) + 1] = (BOS, *tokens)
            real = (np.arange(length) <= len(tokens)).astype(np.int32)[None]
            logits = whole(params, jnp.asarray(target), jnp.asarray(real))
            return np.asarray(jax.nn.log_softmax(logits[0, len(tokens)])).tolist()

        wanted = searched_by_definition(log_p_after, width, alpha, length)
        found = search(model, params, width, alpha, length, *source)
        padded = [one + (PAD,) * (length - len(one)) for one, _ in wanted]
        np.testing.assert_array_equal(found.tokens[0], padded)
        np.testing.assert_allclose(found.scores[0], [score for _, score in wanted], rtol=1e-4)


def test_what_shares_a_batch_changes_nothing():
    model, params = tiny_tokens()
    together = search(model, params, 2, 0.6, 8)
    for i in range(3):
        alone = search(model, params, 2, 0.6, 8, SOURCE[i : i + 1], SEGMENTS[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-5)


def test_longer_outputs_win_as_the_penalty_grows():
    model, params = tiny_tokens()
    lengths = [(search(model, params, 30, alpha).tokens[:, 0] != PAD).sum() for alpha in (0.0, 5.0)]
    assert lengths[0] < lengths[1]


def test_the_search_stops_when_nothing_can_get_better(monkeypatch):
    """Every source ends at once with probability nearly 1: one step is enough for one beam."""
    module, steps = ending_at_once(), []
    original = type(module).decode_step

    def counted(self, tokens, cache):
        jax.debug.callback(lambda filled: steps.append(int(filled)), cache.filled)
        return original(self, tokens, cache)

    monkeypatch.setattr(type(module), "decode_step", counted)
    found = beam_search(
        module, BATCH.source, BATCH.source_segments, 50, beam_size=1, length_penalty=0.6
    )
    jax.effects_barrier()
    assert steps == [0]
    np.testing.assert_array_equal(found.tokens[:, 0, :2], [[EOS, PAD]] * 3)


def test_without_a_source_there_is_no_hypothesis():
    model, params = tiny_tokens()
    found = search(model, params, 2, 0.6, segments=SEGMENTS.at[1].set(0))
    np.testing.assert_array_equal(found.tokens[1], PAD)
    np.testing.assert_array_equal(found.scores[1], -np.inf)
    whole = search(model, params, 2, 0.6)
    np.testing.assert_array_equal(found.tokens[[0, 2]], whole.tokens[[0, 2]])


def test_an_end_that_is_only_the_second_best_does_not_end_a_beam_of_one():
    """Among 6 tokens it often is, and the rest of greedy's output is then the less likely."""
    model, _ = tiny_tokens(tie_embeddings=False)
    decode = jax.jit(lambda params: greedy(model.bind(params), SOURCE, SEGMENTS, 6))
    beam = jax.jit(
        lambda params: beam_search(
            model.bind(params), SOURCE, SEGMENTS, 6, beam_size=1, length_penalty=0.0
        )
    )
    for seed in range(20):
        params = random_params(model, seed)
        np.testing.assert_array_equal(beam(params).tokens[:, 0], decode(params).tokens)


SEARCHES = {
    "greedy": greedy,
    "sample": partial(sample, temperature=2.0),
    "beams": partial(beam_search, beam_size=3, length_penalty=0.6),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_an_output_is_as_long_as_its_own_source_allows(name):
    """With a margin a batch gives what each source alone gives in so much room."""
    model, _ = tiny_tokens(tie_embeddings=False)
    lengths, margin, seeds = (3, 2, 4), 2, range(12)
    keys = jax.random.split(jax.random.key(0), 3)

    def found(params, rows, length, **options):
        given = {"keys": keys[rows]} if name == "sample" else {}
        search = partial(SEARCHES[name], **given, **options)
        return search(model.bind(params), SOURCE[rows], SEGMENTS[rows], length)

    together = jax.jit(lambda params: found(params, slice(0, 3), 9, margin=margin))
    alone = [
        jax.jit(partial(found, rows=slice(i, i + 1), length=length + margin))
        for i, length in enumerate(lengths)
    ]
    cut = whole = 0
    for seed in seeds:
        params = random_params(model, seed)
        batch = together(params)
        for i, one in enumerate(alone):
            tokens, *scores = zip(jax.tree.leaves(batch), jax.tree.leaves(one(params)), strict=True)
            width = tokens[1].shape[-1]
            assert width == lengths[i] + margin
            np.testing.assert_array_equal(tokens[0][i][..., :width], tokens[1][0])
            np.testing.assert_array_equal(tokens[0][i][..., width:], PAD)
            for of_batch, of_one in scores:
                np.testing.assert_allclose(of_batch[i], of_one[0], rtol=1e-5)
            ends = (np.asarray(tokens[1]) == EOS).any(-1)
            cut, whole = cut + (~ends).sum(), whole + ends.sum()
    assert cut > 5  # so that the test is about something
    assert whole > 5


KEYS = jax.random.split(jax.random.key(7), 4000)


def drawn(module, source, segments, length, keys, **settings):
    return np.asarray(
        jax.jit(
            lambda keys: sample(module, source, segments, length, keys=keys, **settings).tokens
        )(keys)
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.95)]
)
def test_tokens_are_drawn_as_often_as_the_model_says(temperature, top_k, top_p):
    """The first two tokens of one source, by a χ² test with p = 1e-4, keys being fixed."""
    model, params = tiny_tokens()
    source, segments = (jnp.broadcast_to(each[:1], (len(KEYS), 4)) for each in (SOURCE, SEGMENTS))
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rows = drawn(model.bind(params), source, segments, 2, KEYS, **settings)

    first, counts = 3, np.bincount(rows[:, 0], minlength=6)
    check_frequencies(counts, shares(model, params, [BOS], temperature, top_k, top_p))
    after = rows[rows[:, 0] == first, 1]
    assert len(after) > 200
    counts = np.bincount(after, minlength=6)
    check_frequencies(counts, shares(model, params, [BOS, first], temperature, top_k, top_p))
    np.testing.assert_array_equal(rows[rows[:, 0] == EOS, 1], PAD)


def shares(model, params, target_in, temperature, top_k, top_p):
    """How often each token should come after some, by the whole model and NumPy."""
    batch = make_batch(SOURCE[:1], jnp.asarray([target_in], jnp.int32))
    batch = batch._replace(target_in=jnp.asarray([target_in], jnp.int32))
    logits = np.asarray(logits_of(model, params, batch), np.float64)[0, -1] / temperature
    logits[[PAD, BOS]] = -np.inf
    p = np.where(kept(logits, top_k, top_p), np.exp(logits - logits.max()), 0.0)
    return p / p.sum()


def check_frequencies(counts, p):
    assert (counts[p == 0] == 0).all()
    assert (p > 0).sum() > 1
    assert chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue > 1e-4


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
def test_the_likelier_tokens_are_those_of_brute_force(top_k, top_p, rng):
    """With ties at every place, and with all alike."""
    logits = rng.integers(-3, 4, size=(200, 9)) * 0.37 * rng.choice([0, 1, 5], size=(200, 1))
    logits = np.asarray(logits, np.float32)
    found = np.asarray(likelier(jnp.asarray(logits), top_k, top_p))
    for row, own in zip(logits.astype(np.float64), found, strict=True):
        np.testing.assert_array_equal(np.isfinite(own), kept(row, top_k, top_p))
    np.testing.assert_array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])


@pytest.mark.parametrize("settings", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 0.0}], ids=str)
def test_where_only_the_likeliest_may_be_drawn_it_is_greedy(settings):
    model = small_model(tie_embeddings=False)
    params = random_params(model, 1)
    table = params["output_embedding/table"]  # an untrained model's likeliest may be PAD
    params["output_embedding/table"] = table.at[jnp.array([PAD, BOS])].set(0.0)
    module = model.bind(params)
    source, segments = BATCH.source, BATCH.source_segments
    wanted = jax.jit(lambda: greedy(module, source, segments, 6).tokens)()
    found = drawn(module, source, segments, 6, KEYS[:3], **settings)
    np.testing.assert_array_equal(found, wanted)
    assert len(set(found.ravel().tolist())) > 3


def test_what_a_row_draws_does_not_depend_on_what_shares_its_batch():
    model, params = tiny_tokens()
    module = model.bind(params)
    together = drawn(module, SOURCE, SEGMENTS, 8, KEYS[:3])
    alone = drawn(module, SOURCE[1:2], SEGMENTS[1:2], 8, KEYS[1:2])
    np.testing.assert_array_equal(alone[0], together[1])
    other = drawn(module, SOURCE, SEGMENTS, 8, KEYS[3:6])
    assert (other != together).any(1).all()
