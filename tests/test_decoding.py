import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import VARIANTS, logits_of, random_params, small_model, strings
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding import greedy

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))


def by_hand(model, params, batch, length):
    """Greedy decoding with no cache: the whole model on the whole prefix for each token."""
    rows = np.full((len(batch.source), length + 1), PAD, np.int32)
    rows[:, 0] = BOS
    for t in range(length):
        prefix = jnp.asarray(rows[:, :length])
        read = jnp.broadcast_to(jnp.arange(length) <= t, prefix.shape).astype(jnp.int32)
        logits = logits_of(model, params, batch._replace(target_in=prefix, target_segments=read))
        ended = (rows == EOS).any(1)
        rows[:, t + 1] = np.where(ended, PAD, logits[:, t].argmax(-1))
    return rows[:, 1:]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_is_decoding_without_a_cache(changes):
    model = small_model(**changes)
    decode = jax.jit(
        lambda params: greedy(model.bind(params), BATCH.source, BATCH.source_segments, 6)
    )
    for seed in range(4):
        params = random_params(model, seed)
        np.testing.assert_array_equal(decode(params), by_hand(model, params, BATCH, 6))


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
    np.testing.assert_array_equal(decoded, [[EOS, PAD, PAD, PAD, PAD]] * 3)


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
    np.testing.assert_array_equal(decoded[1], PAD)
