from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import logits_of, random_params, small_model, strings
from transformer import evaluation
from transformer.data.batches import Dataset, make_batch
from transformer.data.tokenizer import EOS, PAD
from transformer.decoding import beam_search, greedy
from transformer.loss import cross_entropy

TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst")
BATCH = strings(*((text, text[::-1]) for text in TEXTS))


def dataset(batch_size):
    return Dataset(BATCH.source, BATCH.target_out, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model = small_model()
    params = random_params(model, 0)
    scores = jax.jit(partial(evaluation.score, model))(params, dataset(batch_size))
    logits = logits_of(model, params, BATCH)
    nll = (cross_entropy(logits, BATCH.target_out) * BATCH.weights).sum(-1)
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-4)
    np.testing.assert_array_equal(scores.tokens, [len(text) + 1 for text in TEXTS])


def test_metrics_are_ratios_of_totals():
    scores = evaluation.Scores(
        nll=np.array([2.0, 4.0]), correct=np.array([1.0, 4.0]), tokens=np.array([2.0, 4.0])
    )
    metrics = scores.metrics("test")
    assert metrics == {
        "test/loss": 1.0,
        "test/perplexity": pytest.approx(np.e),
        "test/token_accuracy": 5 / 6,
        "test/sequence_accuracy": 0.5,
    }


def test_a_sequence_right_by_teacher_forcing_is_an_exact_match_by_greedy_decoding():
    """Targets are what the model says, of which every other one is changed at some place."""
    model = small_model(tie_embeddings=False)
    params = random_params(model, 0)
    decode = jax.jit(partial(evaluation.decode, model, length=9))
    target = np.array(decode(params, dataset(2)).tokens)
    for row in range(1, len(target), 2):
        place = row % (target[row] != PAD).sum()
        target[row, place] = EOS + 1 + target[row, place] % 5
    data = Dataset(BATCH.source, jnp.asarray(target), 3)
    scores = jax.jit(partial(evaluation.score, model))(params, data)
    exact = evaluation.exact_match(np.asarray(decode(params, dataset(2)).tokens), target)
    np.testing.assert_array_equal(scores.correct == scores.tokens, exact)
    np.testing.assert_array_equal(exact, np.arange(len(target)) % 2 == 0)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_decoding_restores_the_order_of_the_examples(batch_size):
    model = small_model(tie_embeddings=False)
    params = random_params(model, 0)
    decode = jax.jit(partial(evaluation.decode, model, length=9))
    expected = greedy(model.bind(params), BATCH.source, BATCH.source_segments, 9).tokens
    assert len(np.unique(expected, axis=0)) > 3
    np.testing.assert_array_equal(decode(params, dataset(batch_size)).tokens, expected)


def test_sources_of_like_length_are_decoded_together():
    def longest(module, source, segments, length):
        return jnp.full(len(source), segments.sum(1).max())

    model = small_model()
    found = evaluation.decode(model, random_params(model, 0), dataset(3), 9, longest)
    # Tokens with EOS: 2 3 3 | 4 4 5 | 6; each source says how long the longest of its batch is.
    np.testing.assert_array_equal(found, [5, 3, 5, 3, 6, 3, 5])


def test_beams_of_a_split_are_those_of_its_sources():
    model = small_model(tie_embeddings=False)
    params = random_params(model, 0)
    search = partial(beam_search, beam_size=3, length_penalty=0.6)
    decode = jax.jit(partial(evaluation.decode, model, length=9, search=search))
    found = decode(params, dataset(3))
    expected = search(model.bind(params), BATCH.source, BATCH.source_segments, 9)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_exact_match_does_not_mind_the_width_of_the_padding():
    decoded = np.array([[5, EOS, PAD, PAD], [5, 6, EOS, PAD], [5, EOS, PAD, PAD]])
    target = np.array([[5, EOS], [5, EOS], [6, EOS]])
    np.testing.assert_array_equal(evaluation.exact_match(decoded, target), [True, False, False])
    np.testing.assert_array_equal(evaluation.exact_match(target, decoded), [True, False, False])


def test_attention_maps_are_distributions_over_real_tokens():
    model = small_model(layers=2)
    maps = evaluation.attention_maps(model, random_params(model, 0), dataset(7).head(2))
    batch = make_batch(BATCH.source[:2], BATCH.target_out[:2])
    sides = {
        "encoder": (batch.source_segments, batch.source_segments),
        "decoder": (batch.target_segments, batch.target_segments),
        "cross": (batch.target_segments, batch.source_segments),
    }
    for kind, (query, key) in sides.items():
        assert len(maps[kind]) == 2
        for weights in maps[kind]:
            assert weights.shape == (2, 2, query.shape[1], key.shape[1])
            on_padding = weights.swapaxes(1, 3)[key == 0]
            np.testing.assert_array_equal(on_padding, 0.0)
            totals = np.asarray(weights.sum(-1).swapaxes(1, 2))  # [examples, T, N]
            np.testing.assert_allclose(totals[np.asarray(query) == 1], 1.0, rtol=1e-5)
