import jax.numpy as jnp
import numpy as np
import pytest

from transformer import masking
from transformer.dot_product_attention import masked_softmax


def drawn(rows: str) -> np.ndarray:
    """`x . .` lines as booleans, as the docstrings draw them."""
    return np.array([[letter == "x" for letter in row.split()] for row in rows.strip().split("\n")])


def test_causal_is_as_drawn():
    triangle = drawn("x . . .\nx x . .\nx x x .\nx x x x")
    np.testing.assert_array_equal(masking.causal(4)[0, 0], triangle)
    np.testing.assert_array_equal(masking.causal(1, 4, 2)[0, 0], drawn("x x x ."))


def test_window_is_as_drawn():
    band = drawn(". x x x .\n. . x x x\n. . . x x")
    np.testing.assert_array_equal(masking.window(3, 5, 2, 2)[0, 0], band)
    np.testing.assert_array_equal(masking.window(3, 5, 2, jnp.int32(2))[0, 0], band)
    sliding = masking.window(4, 4, 2) & masking.causal(4)
    np.testing.assert_array_equal(sliding[0, 0], drawn("x . . .\nx x . .\n. x x .\n. . x x"))


def test_a_window_of_1_is_the_position_itself_and_a_wide_one_is_none():
    np.testing.assert_array_equal(masking.window(4, 4, 1)[0, 0], np.eye(4, dtype=bool))
    assert not masking.window(4, 4, 3).all()
    assert masking.window(4, 4, 4).all()


def test_segment_is_as_drawn():
    segments = jnp.array([[1, 1, 2, 0]])
    mask = masking.segment(segments, segments)
    np.testing.assert_array_equal(mask[0, 0], drawn("x x . .\nx x . .\n. . x .\n. . . ."))
    both = mask & masking.causal(4)
    np.testing.assert_array_equal(both[0, 0], drawn("x . . .\nx x . .\n. . x .\n. . . ."))


def test_padding_is_as_drawn_and_a_segment_mask_of_one_segment():
    valid = jnp.array([[True, True, True, False]])
    mask = masking.padding(valid)
    np.testing.assert_array_equal(mask[0, 0], drawn("x x x ."))
    ones = jnp.ones((1, 4), jnp.int32)
    segment = masking.segment(ones, valid.astype(jnp.int32))
    np.testing.assert_array_equal(segment, jnp.broadcast_to(mask, segment.shape))


def test_segments_join_packed_rows_across_sequences():
    target, source = jnp.array([[1, 2, 2]]), jnp.array([[1, 1, 2, 0]])
    np.testing.assert_array_equal(
        masking.segment(target, source)[0, 0], drawn("x x . .\n. . x .\n. . x .")
    )


def test_boolean_mask_equals_the_additive_matrix_of_the_paper(rng):
    scores = jnp.asarray(rng.normal(size=(2, 3, 4, 4)), jnp.float32)
    mask = jnp.broadcast_to(masking.causal(4), scores.shape)
    shifted = scores + masking.additive(mask)
    expected = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    np.testing.assert_allclose(masked_softmax(scores, mask), expected, rtol=1e-6)


def test_the_additive_matrix_fails_where_the_boolean_mask_does_not():
    nothing = jnp.zeros((1, 1, 1, 3), bool)
    scores = jnp.ones((1, 1, 1, 3))
    shifted = scores + masking.additive(nothing)
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.exp(shifted - shifted.max()) / 1).all()
    np.testing.assert_array_equal(masked_softmax(scores, nothing), 0.0)


@pytest.mark.parametrize("offset", range(3))
def test_causal_with_an_offset_is_a_row_of_the_whole(offset):
    np.testing.assert_array_equal(
        masking.causal(1, 3, jnp.int32(offset))[0, 0, 0], masking.causal(3)[0, 0, offset]
    )
