"""Constraints on outputs, against Hugging Face's `generate` and its logits processors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import Markov, logits_of, random_params, small_model
from transformer.data.batches import make_batch
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.logits import Constraints
from transformer.inference.search import EARLY_STOPPING, Sources, beam_search
from transformer.modules.model import Model, OutputTokens

pytestmark = pytest.mark.oracle

LENGTH, VOCAB = 14, 12  # of outputs
MODEL = Model(small_model(tie_embeddings="none").config, VOCAB)
SOURCE = jnp.array([[4, 5, EOS, PAD], [3, EOS, PAD, PAD], [9, 11, 3, EOS]])
PREFIX = (4, 7)
SETTINGS = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "min_length": 5},
    {"repetition_penalty": 1.7, "min_length": 3},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_scores_are_those_of_hugging_faces_processors(setting, rng):
    """Of random outputs over few tokens, so that n-grams recur, at each of their lengths."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    given = {"min_length": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0} | setting
    outputs = rng.integers(3, 6, size=(8, 2, LENGTH))
    scores = np.asarray(4 * rng.normal(size=(8, 2, VOCAB)), np.float32)
    given_start = Constraints(**setting, start=BOS)  # which counts as a token, as it does there
    apply = jax.jit(partial(given_start.apply, jnp.asarray(scores), jnp.asarray(outputs)))
    penalize = hf.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"])
    for length in range(LENGTH):
        seen = torch.tensor(np.insert(outputs[..., :length], 0, BOS, axis=-1).reshape(16, -1))
        expected = penalize(seen, torch.tensor(scores.reshape(16, -1)))
        if n := given["no_repeat_ngram_size"]:
            expected = hf.NoRepeatNGramLogitsProcessor(n)(seen, expected)
        if least := given["min_length"]:
            expected = hf.MinNewTokensLengthLogitsProcessor(1, least, EOS)(seen, expected)
        np.testing.assert_array_equal(apply(length).reshape(16, -1), expected)


def peer(logits: Any) -> Any:
    """A language model of Hugging Face with the logits of a function of tokens."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutput

    class Peer(hf.PreTrainedModel, hf.GenerationMixin):
        config_class = hf.PretrainedConfig

        def __init__(self):
            ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
            super().__init__(hf.PretrainedConfig(vocab_size=VOCAB, **ids))
            self.unused = torch.nn.Parameter(torch.zeros(1))  # from which the device is read

        def forward(self, input_ids, **_):
            return CausalLMOutput(logits=torch.tensor(logits(input_ids.numpy())))

    return Peer()


def generated(params: Any, source: Any, prefix: Any, beams: int, setting: Any) -> Any:
    """The outputs of Hugging Face's `generate`, and their scores, for one source."""
    torch = pytest.importorskip("torch")

    def logits(tokens):
        target = np.pad(tokens[:, 1:], ((0, 0), (0, LENGTH + 1 - tokens.shape[1])))
        real = jnp.broadcast_to(jnp.arange(LENGTH) < tokens.shape[1], target.shape)
        batch = make_batch(jnp.broadcast_to(source, (len(target), 4)), jnp.asarray(target))
        batch = batch._replace(target_segments=real.astype(jnp.int32))
        target_in = np.insert(target[:, :-1], 0, BOS, axis=1)
        batch = batch._replace(target_in=jnp.asarray(target_in, jnp.int32))
        return np.array(logits_of(MODEL, params, batch))[:, : tokens.shape[1]]

    options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    options |= {
        "bad_words_ids": [[PAD], [BOS]],
        "use_cache": False,
        "return_dict_in_generate": True,
    }
    if beams > 1:
        options |= {"length_penalty": 0.0, "early_stopping": "never", "output_scores": True}
    options |= {name: value for name, value in setting.items() if name != "min_length"}
    options["min_new_tokens"] = max(setting.get("min_length", 0) - len(prefix), 0)
    options |= {"max_new_tokens": LENGTH - len(prefix), "return_dict_in_generate": True}
    found = peer(logits).generate(torch.tensor([[BOS, *prefix]]), **options)
    return found.sequences.numpy()[:, 1:], found.get("sequences_scores")


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_are_those_of_hugging_faces_generate(beams, prefix):
    """Sources in a batch, there one at a time; the scores of a prefix's tokens are ours alone."""
    compared = 0
    for seed, setting in enumerate(SETTINGS[1:]):
        params = random_params(MODEL, seed)
        for name, value in (("decoder/final_norm/scale", 0), ("decoder/final_norm/bias", 1)):
            params[name] = params[name].at[0].set(value)  # what reads this feature is a bias
        table = params["output_embedding/embedding"].at[EOS, 0].set(1.5)
        params["output_embedding/embedding"] = table
        decoding = DecodingConfig(beam_size=beams, length_penalty=0.0, **setting)
        decode = partial(evaluation.decode, MODEL, decoding=decoding, max_length=LENGTH)
        given = jnp.asarray(prefix, jnp.int32) if prefix else None
        found = jax.tree.map(np.asarray, jax.jit(decode)(params, SOURCE, None, given))
        for source, tokens, scores in zip(SOURCE, *found, strict=True):
            theirs, total = generated(params, source, prefix, beams, setting)
            if beams > 1:  # where unfinished hypotheses compete with the others
                ended = (theirs == EOS).any(1)
                theirs, total = theirs[ended], total[ended].numpy()
                given = scores[: len(total)] - scores[:1]  # without the prefix
                np.testing.assert_allclose(given, total - total[:1], rtol=1e-4, atol=1e-4)
            for own, other in zip(tokens, theirs, strict=False):
                size = [*other, EOS].index(EOS) + 1
                assert own[:size].tolist() == other[:size].tolist()
            compared += len(theirs)
    assert compared > 8


@pytest.mark.parametrize("stop", EARLY_STOPPING)
def test_beams_are_those_of_hugging_faces_generate(stop, rng):
    """With its length penalty, stopping rules and rank of unfinished hypotheses, n-best of 4."""
    torch = pytest.importorskip("torch")
    tables = np.asarray(1.5 * rng.normal(size=(12, LENGTH, VOCAB, VOCAB)), np.float32)
    source = jnp.asarray(np.arange(12)[:, None] + 1)
    sources = Sources(source, LENGTH, outputs=OutputTokens(start=3, banned=(PAD, 6)))
    for alpha, forced in ((0.0, EOS), (0.6, None), (1.0, None), (2.0, EOS)):
        own = sources._replace(constraints=Constraints(forced_first=None, forced_last=forced))
        options = {"penalty": "length", "early_stopping": stop, "unfinished": "equal"}
        options["renormalize"] = normal = alpha == 0.6
        module = Markov(np.concatenate([tables[:1], tables]))
        tokens, scores = jax.jit(partial(beam_search, module, own, 4, alpha, **options))()
        given = {"true": True, "false": False, "never": "never"}[stop]
        for row, table in enumerate(tables):
            theirs = peer(lambda x, t=table: t[np.arange(x.shape[1]), x]).generate(
                torch.tensor([[3]]),
                **{"num_beams": 4, "num_return_sequences": 4, "do_sample": False},
                **{"early_stopping": given, "length_penalty": alpha, "output_scores": True},
                **{"max_new_tokens": LENGTH, "bad_words_ids": [[PAD], [6]], "use_cache": False},
                **{"return_dict_in_generate": True, "forced_eos_token_id": forced},
                renormalize_logits=normal,
            )
            np.testing.assert_allclose(scores[row], theirs.sequences_scores, rtol=1e-4, atol=1e-5)
            found = theirs.sequences.numpy()[:, 1:]
            after = np.cumsum(found == EOS, axis=1) - (found == EOS) > 0  # filled with EOS there
            found = np.where(after, PAD, found)
            np.testing.assert_array_equal(tokens[row, :, : found.shape[1]], found)
