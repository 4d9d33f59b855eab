import jax
import jax.numpy as jnp
import numpy as np

from transformer.modules import masking
from transformer.modules.dot_product_attention import masked_softmax


def drawn(mask, *rows: str) -> None:
    np.testing.assert_array_equal(mask[0, 0], [[c == "x" for c in row.split()] for row in rows])


def test_causal_is_as_drawn_and_with_an_offset_a_row_of_the_whole():
    drawn(masking.causal(4), "x . . .", "x x . .", "x x x .", "x x x x")
    drawn(masking.causal(1, 4, 2), "x x x .")
    drawn(masking.causal(1, 4, jnp.int32(2)), "x x x .")


def test_window_is_as_drawn():
    for offset in (2, jnp.int32(2)):
        drawn(masking.window(3, 5, 2, offset), ". x x x .", ". . x x x", ". . . x x")
    sliding = masking.window(4, 4, 2) & masking.causal(4)
    drawn(sliding, "x . . .", "x x . .", ". x x .", ". . x x")
    np.testing.assert_array_equal(masking.window(4, 4, 1)[0, 0], np.eye(4, dtype=bool))
    assert not masking.window(4, 4, 3).all()
    assert masking.window(4, 4, 4).all()


def test_segment_is_as_drawn():
    segments = jnp.array([[1, 1, 2, 0]])
    mask = masking.segment(segments, segments)
    drawn(mask, "x x . .", "x x . .", ". . x .", ". . . .")
    drawn(mask & masking.causal(4), "x . . .", "x x . .", ". . x .", ". . . .")
    drawn(masking.segment(jnp.array([[1, 2, 2]]), segments), "x x . .", ". . x .", ". . x .")


def test_padding_is_as_drawn_and_a_segment_mask_of_one_segment():
    valid = jnp.array([[True, True, True, False]])
    mask = masking.padding(valid)
    drawn(mask, "x x x .")
    segment = masking.segment(jnp.ones((1, 4), jnp.int32), valid.astype(jnp.int32))
    np.testing.assert_array_equal(segment, jnp.broadcast_to(mask, segment.shape))


def test_boolean_mask_equals_the_additive_matrix_of_the_paper_which_fails_without_keys(rng):
    scores = jnp.asarray(rng.normal(size=(2, 3, 4, 4)) * [[1.0], [10.0], [1e3], [1e4]], jnp.float32)
    mask = jnp.broadcast_to(masking.causal(4), scores.shape)
    expected = jax.nn.softmax(scores + jnp.where(mask, 0.0, -jnp.inf))
    np.testing.assert_allclose(masked_softmax(scores, mask), expected, rtol=1e-6)
    nothing = jnp.zeros_like(mask)
    assert jnp.isnan(jax.nn.softmax(scores + jnp.where(nothing, 0.0, -jnp.inf))).all()
    np.testing.assert_array_equal(masked_softmax(scores, nothing), 0.0)
    hidden = scores.at[..., 0, 0].set(-jnp.inf)  # by a bias: the only key of query 0
    np.testing.assert_array_equal(masked_softmax(hidden, mask)[..., 0, :], 0.0)
