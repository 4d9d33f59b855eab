from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import logits_of, random_params, small_model, strings
from transformer.data.batches import Dataset, make_batch
from transformer.data.tokenizer import EOS, PAD
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig, Hypotheses, Sources
from transformer.loss import cross_entropy
from transformer.metrics import METRICS, Predictions, finalize, token_sums
from transformer.modules.model import Model

TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst")
BATCH = strings(*((text, text[::-1]) for text in TEXTS))


MODEL = small_model(tie_embeddings=False)
PARAMS = random_params(MODEL, 0)
score = jax.jit(partial(evaluation.score, MODEL, PARAMS))
decode = partial(evaluation.decode, MODEL, PARAMS, max_length=9)
dataset = partial(Dataset, BATCH.source, BATCH.target_out)
LOGITS = logits_of(MODEL, PARAMS, BATCH)
PREDICTIONS = Predictions(LOGITS, BATCH.target_out, cross_entropy(LOGITS, BATCH.target_out))


def test_scores_do_not_depend_on_the_batch_size_nor_on_dispatches():
    losses, asked = PREDICTIONS.losses.nll * BATCH.weights, []
    data, place = jax.tree.map(np.asarray, dataset(3)), partial(jax.tree.map, jnp.asarray)
    each = jax.jit(partial(evaluation.score, MODEL))
    parts = evaluation.score_in_batches(each, PARAMS, data, place, lambda: asked.append(1))
    assert len(asked) == 3  # of 7 examples
    for scores in (parts, *map(score, map(dataset, (1, 3, 100)))):
        np.testing.assert_allclose(scores["nll"], losses.sum(-1), rtol=1e-4)
        np.testing.assert_array_equal(scores["tokens"], [len(text) + 1 for text in TEXTS])


def test_metrics_are_ratios_of_totals():
    totals = {"nll": [2.0, 4.0], "uniform": [6.0, 6.0], "correct": [1.0, 4.0], "tokens": [2.0, 4.0]}
    totals = {name: np.array(each) for name, each in totals.items()}
    totals = dict.fromkeys(token_sums(PREDICTIONS), np.zeros(2)) | totals
    wanted = {"loss": 1.0, "objective": 1.0, "perplexity": np.e}
    wanted |= {"token_accuracy": 5 / 6, "sequence_accuracy": 0.5}
    found = finalize(totals, "test")
    assert found.keys() == {f"test/{name}" for name in METRICS}
    assert {name: found[f"test/{name}"] for name in wanted} == pytest.approx(wanted)
    smoothed = finalize(totals, "test", label_smoothing=0.25)
    assert smoothed["test/objective"] == pytest.approx(0.75 * 1.0 + 0.25 * 2.0)


def test_a_sequence_right_by_teacher_forcing_is_an_exact_match_by_greedy_decoding():
    """Targets are what the model says, of which every other one is changed at some place."""
    outputs = np.asarray(jax.jit(decode)(dataset(2)).tokens)[:, 0]
    target = outputs.copy()
    for row in range(1, len(target), 2):
        place = row % (target[row] != PAD).sum()
        target[row, place] = EOS + 1 + target[row, place] % 5
    scores = score(Dataset(BATCH.source, jnp.asarray(target), 3))
    exact = evaluation.exact_match(outputs, target)
    np.testing.assert_array_equal(scores["correct"] == scores["tokens"], exact)
    np.testing.assert_array_equal(exact, np.arange(len(target)) % 2 == 0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"beam_size": 4}], ids=str)
def test_outputs_of_a_split_are_those_of_its_sources_in_their_order(settings):
    decoding, fold = DecodingConfig(**settings), jax.random.fold_in
    keys = jax.vmap(lambda index: fold(fold(jax.random.key(0), index), 0))(jnp.arange(7))
    method, sources = decoding.method(), Sources(BATCH.source, 9, keys)
    expected = jax.jit(lambda params: method(MODEL.bind(params), sources))(PARAMS)
    found = jax.jit(partial(decode, decoding=decoding))(dataset(3))
    assert len(np.unique(found.tokens, axis=0)) > 3
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_sources_of_like_length_are_decoded_together(monkeypatch):
    def longest(module, sources):
        assert (sources.num_tokens, sources.max_length, sources.margin) == (30, 6 + 3, 3)
        shape, length = (len(sources.tokens), 1), (sources.tokens != PAD).sum(1).max()
        return Hypotheses(jnp.zeros((*shape, 9), jnp.int32), jnp.full(shape, length, jnp.float32))

    monkeypatch.setattr(DecodingConfig, "method", lambda self: longest)
    model = Model(MODEL.config, MODEL.vocab_size, tokens=30)
    found = evaluation.decode(model, PARAMS, dataset(3), margin=3)
    # Tokens with EOS: 2 3 3 | 4 4 5 | 6; each source says how long the longest of its batch is.
    np.testing.assert_array_equal(found.scores[:, 0], [5, 3, 5, 3, 6, 3, 5])


def test_exact_match_does_not_mind_the_width_of_the_padding():
    decoded = np.array([[5, EOS, PAD, PAD], [5, 6, EOS, PAD], [5, EOS, PAD, PAD]])
    target = np.array([[5, EOS], [5, EOS], [6, EOS]])
    for one, other in ((decoded, target), (target, decoded)):
        assert evaluation.exact_match(one, other).tolist() == [True, False, False]


def test_attention_maps_are_distributions_over_real_tokens():
    model = small_model(num_layers=2)
    maps = evaluation.attention_maps(model, random_params(model, 0), dataset(7).head(2))
    batch = make_batch(BATCH.source[:2], BATCH.target_out[:2])
    source, target = batch.source_segments, batch.target_segments
    sides = {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}
    for kind, (query, key) in sides.items():
        assert len(maps[kind]) == 2
        for weights in maps[kind]:
            assert weights.shape == (2, 2, query.shape[1], key.shape[1])
            np.testing.assert_array_equal(weights.swapaxes(1, 3)[key == 0], 0.0)
            totals = weights.sum(-1).swapaxes(1, 2)[query == 1]
            np.testing.assert_allclose(totals, 1.0, rtol=1e-5)
