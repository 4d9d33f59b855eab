"""`transformer.testing` passes right models and finds what is wrong with others."""

import re
import textwrap

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from tests.helpers import refused
from tests.test_layout import ROOT
from transformer import testing

B, S, T, D = 2, 5, 3, 4
VECTORS = np.random.default_rng(0).normal(size=(10, D))
TOKENS = np.array([[3, 4, 5, 6, 7], [8, 3, 9, 4, 5]])
TARGETS = np.array([[1, 2, 3], [4, 5, 6]])
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
TARGET_SEGMENTS = np.array([[1, 2, 2], [2, 1, 0]])
BACK = np.arange(S)[:, None] - np.arange(S)
ALL = np.ones((S, S), bool)

# Of docs/testing.md: code and what it prints, in turns.
BLOCKS = re.findall(r"(?m)(?:^    .*\n|\n(?=    ))+", (ROOT / "docs/testing.md").read_text())
MAGNITUDE = re.compile(r"\([\d.e-]+\)")


def attention(queries, keys, mask):
    """A layer without parameters; a query that may attend to nothing adds nothing."""
    x, y = (VECTORS[each] if each.ndim == 2 else each for each in (queries, keys))
    weights = np.where(mask, np.exp(x @ y.swapaxes(1, 2)), 0.0)
    return x + weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9) @ y


def attends(mask):
    return lambda tokens: attention(tokens, tokens, mask)


def same(queries, keys):
    return queries[:, :, None] == keys[:, None, :]


def reads(found):
    return [(leak.row, leak.output, leak.reads) for leak in found]


def test_influence_is_the_largest_change_of_each_output():
    weights = np.array([[1, 0, 2.0], [0, 3, 0], [0, 0, 0], [1, 1, 1]])  # four outputs, three inputs

    def model(inputs):
        return np.stack([inputs @ weights.T, -5 * inputs @ weights.T], axis=-1)

    inputs = np.array([[1, 2, 2.0], [4, 4, 1]])
    steps = np.array([[1, 2, 2], [3, 3, 1]])  # 1 → 2 → 4 → 1
    np.testing.assert_array_equal(testing.influence(model, inputs), 5 * weights * steps[:, None, :])


def test_the_model_is_given_arrays_of_one_shape_and_cannot_change_the_inputs():
    tokens, shapes = TOKENS.copy(), []

    def model(given):
        shapes.append((given.shape, given.dtype))
        outputs = VECTORS[given]
        given[:] = 0
        return outputs

    assert (testing.influence(model, tokens).any(-1)).all()
    np.testing.assert_array_equal(tokens, TOKENS)
    assert shapes == [(TOKENS.shape, TOKENS.dtype)] * (S + 2)


def test_future_leaks_are_later_inputs_and_those_before_a_window():
    assert testing.future_leaks(attends(BACK >= 0), TOKENS) == []
    off_by_one = testing.future_leaks(attends(BACK >= -1), TOKENS)
    assert reads(off_by_one) == [(row, t, t + 1) for row in range(B) for t in range(S - 1)]

    assert testing.future_leaks(attends((BACK >= 0) & (BACK < 2)), TOKENS, window=2) == []
    wide = testing.future_leaks(attends((BACK >= 0) & (BACK < 3)), TOKENS, window=2)
    assert reads(wide) == [(row, t, t - 2) for row in range(B) for t in range(2, S)]
    assert str(wide[0]) == f"row 0: output 2 reads input 0 ({wide[0].magnitude:.2g})"


def test_padding_leaks_spare_the_outputs_of_padding():
    real, target_real = SEGMENTS > 0, TARGET_SEGMENTS > 0
    padding = ~real, ~real
    assert testing.padding_leaks(attends(real[:, None, :]), TOKENS, *padding) == []
    found = reads(testing.padding_leaks(attends(ALL), TOKENS, *padding))
    assert found == [
        (row, t, s) for row, t in np.argwhere(real) for s in np.flatnonzero(~real[row])
    ]

    def cross(mask):
        return lambda source: attention(TARGETS, source, mask)

    padding = ~real, ~target_real
    assert testing.padding_leaks(cross(real[:, None, :]), TOKENS, *padding) == []
    assert len(testing.padding_leaks(cross(True), TOKENS, *padding)) == 3 * 1 + 2 * 2


def test_packing_leaks_are_between_examples_and_of_padding():
    inside = same(SEGMENTS, SEGMENTS) & (SEGMENTS > 0)[:, None, :]
    assert testing.packing_leaks(attends(inside), TOKENS, SEGMENTS, SEGMENTS) == []
    real = (SEGMENTS > 0)[:, None, :]  # the segments forgotten, the padding not
    found = testing.packing_leaks(attends(real & (BACK >= 0)), TOKENS, SEGMENTS, SEGMENTS)
    assert reads(found) == [(0, 2, 0), (0, 2, 1), (0, 3, 0), (0, 3, 1), (1, 1, 0), (1, 2, 0)]

    def cross(mask):
        return lambda source: attention(TARGETS, source, mask)

    segments = SEGMENTS, TARGET_SEGMENTS
    right = cross(same(TARGET_SEGMENTS, SEGMENTS))
    assert testing.packing_leaks(right, TOKENS, *segments) == []
    found = testing.packing_leaks(cross(same(TARGET_SEGMENTS, SEGMENTS) | real), TOKENS, *segments)
    first = [(0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)]
    assert reads(found) == [*first, (1, 0, 0), (1, 1, 1), (1, 1, 2)]


def test_a_rule_of_ones_own_may_differ_between_rows_and_needs_no_square():
    def model(source):
        return np.cumsum(VECTORS[source], axis=1)[:, 1::2]  # outputs 0 and 1 read 2 and 4 inputs

    rule = np.array([[True, True, False, False, False], [True] * 4 + [False]])
    assert testing.leaks(model, TOKENS, rule) == []
    rows = np.stack([rule, rule & [True, False, True, True, True]])
    assert reads(testing.leaks(model, TOKENS, rows)) == [(1, 0, 1), (1, 1, 1)]
    refused(r"\(5, 5\), and .* need \(2, 5\) or", testing.future_leaks, model, TOKENS)
    refused(r"\(1, 5\), and", testing.leaks, model, TOKENS, rule[:1])  # which would broadcast


def test_a_small_leak_is_found_beside_large_outputs_and_rounding_only_up_to_atol():
    def model(tokens):
        outputs = np.cumsum(VECTORS[tokens], axis=1)
        outputs[:, 0] += 1e-9 * VECTORS[tokens][:, -1]
        masked = np.full((B, S, 2), [-1e30, -np.inf])  # logits of tokens that are never chosen
        return np.concatenate([outputs, masked], axis=-1)

    (one, other) = testing.future_leaks(model, TOKENS)
    assert reads([one, other]) == [(0, 0, 4), (1, 0, 4)]
    assert 1e-10 < one.magnitude < 1e-8
    rule = BACK >= 0
    assert testing.leaks(model, TOKENS, rule, atol=1e-8) == []
    assert len(testing.leaks(model, TOKENS, rule, atol=1e-11)) == 2


def test_nan_is_never_taken_for_agreement():
    def model(tokens):
        return np.where((tokens == 9)[..., None], np.nan, np.cumsum(VECTORS[tokens], axis=1))

    found = testing.future_leaks(model, TOKENS)  # which output 2 of row 1 has, whatever is read
    assert (1, 2, 3) in reads(found)
    assert str(found[0]).endswith("(nan)")
    assert [each[:2] for each in testing.differences(*[model(TOKENS)] * 2)] == [(1, 2)]

    def ordered(tokens):  # by position, and NaN once the last two have changed places
        moved = tokens[:, -1:, None] != TOKENS[:, -1:, None]
        return np.where(moved, np.nan, VECTORS[tokens] + np.arange(S)[:, None])

    assert np.isnan([each[2] for each in testing.permutation_differences(ordered, TOKENS)]).all()


def test_what_shows_nothing_is_refused():
    one_kind = np.full((B, S), 3)
    refused("all inputs are equal", testing.future_leaks, attends(ALL), one_kind)
    refused("all inputs are equal", testing.permutation_differences, attends(ALL), one_kind)
    refused("no output changes", testing.future_leaks, lambda tokens: VECTORS[TOKENS], TOKENS)
    constant = np.zeros((B, S, 1))
    refused("changes with the order", testing.permutation_differences, lambda x: constant, TOKENS)
    refused("every output may read", testing.leaks, attends(ALL), TOKENS, ALL)
    every = np.ones((B, S), int)
    refused("every output may read", testing.packing_leaks, attends(ALL), TOKENS, every, every)
    rng = np.random.default_rng(0)
    noisy = lambda tokens: VECTORS[tokens] * rng.integers(2, size=(B, S, 1))  # noqa: E731
    refused("calls with the same inputs differ.*eval", testing.future_leaks, noisy, TOKENS)
    refused("got a tuple", testing.influence, lambda tokens: (VECTORS[tokens],), TOKENS)
    refused(r"\[2, T, …\]", testing.influence, lambda tokens: VECTORS[tokens][0], TOKENS)
    refused("cannot be compared", testing.differences, np.zeros((2, 3)), np.zeros((2, 1)))
    refused("real numbers", testing.future_leaks, lambda tokens: 1j * VECTORS[tokens], TOKENS)
    refused("all inputs are equal", testing.cache_differences, attends(ALL), len, 0, one_kind)
    refused("no gradients", testing.nonfinite_gradients, {"weights": None})


def test_noise_is_allowed_only_up_to_atol():
    rng, segments = np.random.default_rng(0), np.array([[1, 1, 2, 2, 2]] * B)
    weights = same(segments, segments) & (BACK >= 0)
    noisy = lambda tokens: weights @ VECTORS[tokens] + 1e-7 * rng.random()  # noqa: E731
    for check, *given in (
        (testing.future_leaks,),
        (testing.packing_leaks, segments, segments),
        (testing.padding_leaks, segments == 2, segments == 2),
    ):
        assert check(noisy, TOKENS, *given, atol=1e-6) == []
        refused("calls with the same inputs differ", check, noisy, TOKENS, *given)


@pytest.fixture
def unchecked():
    """Switches the tests' own type checks off, which would refuse wrong shapes first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_inputs_and_segments_of_other_shapes_are_refused(unchecked):
    model, shape = attends(ALL), r"not of shapes? \("
    refused(shape, testing.future_leaks, model, TOKENS[0])
    refused(shape, testing.permutation_differences, model, TOKENS[0])
    for given in ([SEGMENTS[0]] * 2, [SEGMENTS[:, 1:], SEGMENTS], [SEGMENTS, SEGMENTS[:1]]):
        refused(shape, testing.packing_leaks, model, TOKENS, *given)
    refused("window=0: it must be at least 1", testing.future_leaks, model, TOKENS, window=0)
    refused(shape, testing.future_leaks, model, TOKENS[:, :0])
    refused("cannot be compared", testing.differences, np.zeros(3), np.zeros(3))
    assert testing.future_leaks(attends(BACK >= 0), TOKENS.tolist()) == []
    assert testing.leaks(attends(BACK >= 0), TOKENS, np.tri(S)) == []


def test_differences_have_the_tolerances_of_numpy():
    expected = np.full((B, T, 2), 100.0)
    found = expected + np.array([[0.0, 0.0], [0.009, 0.0], [0.011, 0.02]])
    places = [(row, 2, pytest.approx(0.02)) for row in range(B)]
    assert testing.differences(found, expected) == places
    assert testing.differences(found, expected, atol=0.011) == []
    assert len(testing.differences(found, expected, rtol=0.0)) == 2 * B
    assert str(testing.differences(found, expected)[0]) == "row 0: output 2 differs by 0.02"
    infinite = np.where(expected > 0, -np.inf, expected)
    assert testing.differences(infinite, infinite) == []
    assert len(testing.differences(expected, infinite)) == B * T


@pytest.mark.parametrize(("kept", "wrong"), [(S, []), (2, [2, 3, 4])])
def test_cache_differences_are_those_of_decoding(kept, wrong):
    def step(token, cache):
        assert token.shape == (B, 1)
        cache = np.concatenate([cache, VECTORS[token]], axis=1)[:, -kept:]
        return attention(VECTORS[token], cache, True), cache

    start = np.zeros((B, 0, D))
    found = testing.cache_differences(attends(BACK >= 0), step, start, TOKENS)
    assert [each[:2] for each in found] == [(row, t) for row in range(B) for t in wrong]


def test_permutation_differences_are_those_of_positions():
    def model(tokens, positions=0.0):
        x = VECTORS[tokens] + positions
        return attention(x, x, True)

    assert testing.permutation_differences(model, TOKENS) == []
    pooled = lambda x: VECTORS[x].mean(1, keepdims=True) + model(x)  # noqa: E731
    assert testing.permutation_differences(pooled, TOKENS) == []
    alike = np.where(np.arange(S) < 3, 0.0, 1.0)[:, None]  # the first three positions are
    found = testing.permutation_differences(lambda x: VECTORS[x] + alike, TOKENS)
    assert [each[:2] for each in found] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert len(testing.permutation_differences(lambda x: model(x, alike), TOKENS)) == B * S
    message = "5 inputs need as many outputs"
    refused(message, testing.permutation_differences, lambda x: model(x)[:, :1], TOKENS)


def test_inputs_may_be_vectors_and_outputs_jax_arrays_of_any_precision():
    inputs = VECTORS[TOKENS].astype(np.float32)
    causal = jax.jit(lambda x: jnp.cumsum(x.astype(jnp.bfloat16), axis=1))
    for given in (inputs, jnp.asarray(inputs)):
        assert testing.future_leaks(causal, given) == []
    found = testing.future_leaks(lambda x: jnp.roll(causal(x), -1, axis=1), inputs)
    places = [(row, t, t + 1) for row in range(B) for t in range(S - 1)]
    assert [place for place in reads(found) if place[1] < S - 1] == places


def test_nonfinite_gradients_are_named():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    masked = jnp.zeros((2, 3), bool).at[0].set(True)  # the second row may attend to nothing

    def loss(module, low):
        return (jax.nn.softmax(jnp.where(masked, 0.0, low)) @ module(jnp.ones((3, 2)))).sum()

    assert testing.nonfinite_gradients(nnx.grad(loss)(module, -1e9)) == []
    found = testing.nonfinite_gradients(nnx.grad(loss)(module, -jnp.inf))
    assert found == ["bias/value", "kernel/value"]
    gradients = {"layers": [{"a": np.ones(2)}, {"a": np.array([1, np.inf])}], "frozen": None}
    assert testing.nonfinite_gradients(gradients) == ["layers/1/a"]


@pytest.mark.oracle
def test_outputs_may_be_those_of_pytorch():
    torch = pytest.importorskip("torch")
    weights = torch.tensor(VECTORS, requires_grad=True)

    def model(tokens):
        return weights[torch.tensor(tokens)].cumsum(1).bfloat16()

    assert testing.future_leaks(model, TOKENS) == []
    found = testing.future_leaks(lambda tokens: model(tokens).flip(1), TOKENS)
    assert (0, 0, 4) in reads(found)
    assert testing.differences(model(TOKENS), model(TOKENS)) == []
    (weights.sum() * torch.inf).backward()
    assert testing.nonfinite_gradients({"weights": weights.grad}) == ["weights"]


def printed(block, names, capsys):
    """Runs a block of the page; its output and the expected one, without the magnitudes."""
    exec(textwrap.dedent(BLOCKS[block]), names)
    both = capsys.readouterr().out, textwrap.dedent(BLOCKS[block + 1]).lstrip("\n")
    return [MAGNITUDE.sub("", text) for text in both]


def test_the_page_shows_what_is_found(capsys):
    found, expected = printed(0, {}, capsys)
    assert found == expected
    assert len(BLOCKS) == 4


@pytest.mark.slow
@pytest.mark.oracle
def test_the_page_shows_a_known_fault_of_the_named_version(capsys):
    transformers, names = pytest.importorskip("transformers"), {}
    printed(0, names, capsys)
    found, expected = printed(2, names, capsys)
    (version,) = re.findall(r"Transformers ([\d.]+)", (ROOT / "docs/testing.md").read_text())
    assert found == expected or transformers.__version__ != version  # another may have mended it
