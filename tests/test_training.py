from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.helpers import logits_of, small_model, strings
from transformer import evaluation
from transformer.data.batches import Dataset, make_batch
from transformer.health import batch_of
from transformer.loss import cross_entropy
from transformer.optimizer import OptimizerConfig
from transformer.training import (
    PURPOSES,
    Hyperparameters,
    Recipe,
    averaged,
    init_state,
    make_train_step,
    make_train_steps,
    stream,
    zero_sums,
)

TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst", "u")
BATCH = strings(*((text, text[::-1]) for text in TEXTS), source_length=8, target_length=7)
DATA = Dataset(BATCH.source, BATCH.target_out, 3)

# The knobs of a recipe that are none of the optimizer's.
PLAIN = {"label_smoothing": 0.0, "dropout": 0.0, "attention_dropout": 0.0}


def small_recipe(
    steps: int = 100,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    max_skipped: int = 0,
    **changes: Any,
) -> Recipe:
    """The default recipe with changes by name."""
    plain = PLAIN | {name: changes.pop(name) for name in PLAIN if name in changes}
    knobs: Any = base.get_config().optimizer
    knobs.update(changes)
    names = ("learning_rate", "warmup_steps", "weight_decay")
    numbers = Hyperparameters(**plain, **{name: knobs[name] for name in names})
    return Recipe(
        optimizer=OptimizerConfig(**knobs),
        steps=steps,
        ema_decay=ema_decay,
        accumulate=accumulate,
        max_skipped=max_skipped,
        numbers=numbers,
    )


def initial(model, recipe):
    """The initial state as a function of the seed, compiled."""
    return jax.jit(lambda seed: init_state(model, recipe, seed, {}))


def pieces(recipe=(), **changes):
    """A small model, a recipe by which it learns fast, and its initial state by seed."""
    model = small_model(**changes)
    recipe = small_recipe(**{"warmup_steps": 2, "learning_rate": 1e-2, **dict(recipe)})
    return model, recipe, initial(model, recipe)


def equal(one, other):
    """Whether two pytrees are the same bit for bit."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


DECAY = 0.15
NUMBERS = {"dropout": 0.2, "attention_dropout": 0.1, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def train_steps():
    """(state by seed, train steps), one program for all rates of dropout and smoothing.

    Gradients are not clipped, so that Adam's first moment after one step is a tenth of them.
    """
    model, recipe, _ = pieces({"ema_decay": DECAY, "clip_norm": 0.0})

    @jax.jit
    def init(seed, numbers):
        return init_state(model, recipe, seed, numbers)

    def start(seed=0, **changes):
        numbers = NUMBERS | changes
        return init(jnp.uint32(seed), {name: jnp.float32(x) for name, x in numbers.items()})

    return start, jax.jit(make_train_steps(make_train_step(model, recipe)))


@pytest.mark.parametrize("division", [[1] * 12, [5, 7], [4, 1, 7]])
def test_the_division_of_steps_among_calls_changes_no_bit(division, train_steps):
    start, steps = train_steps
    whole = steps(start(), zero_sums(), DATA, jnp.int32(12))
    divided = (start(), zero_sums())
    for n in division:
        divided = steps(*divided, DATA, jnp.int32(n))
    assert equal(whole, divided)
    assert whole[0].taken() == 12
    assert float(whole[1]["steps"]) == 12


def test_no_steps_change_nothing(train_steps):
    start, steps = train_steps
    assert equal(steps(start(), zero_sums(), DATA, jnp.int32(0)), (start(), zero_sums()))


def test_a_seed_decides_everything(train_steps):
    start, steps = train_steps
    one, same, other = (steps(start(seed), zero_sums(), DATA, jnp.int32(3)) for seed in (7, 7, 8))
    assert equal(one, same)
    assert not equal(one[0].params, other[0].params)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_differs_from_step_to_step(rate, train_steps):
    start, steps = train_steps
    state = start(**{"dropout": 0.0, "attention_dropout": 0.0, rate: 0.5})
    same = jax.tree.map(lambda tokens: jnp.repeat(tokens[:1], len(tokens), axis=0), DATA)
    losses = {  # of the same parameters and batch
        float(
            steps(state._replace(step=jnp.int32(step)), zero_sums(), same, jnp.int32(1))[1]["loss"]
        )
        for step in range(5)
    }
    assert len(losses) == 5


def test_the_gradient_is_of_the_mean_over_real_tokens(train_steps):
    """By hand, of the batch without its padding, which changes nothing."""
    start, steps = train_steps
    state = start(dropout=0.0, attention_dropout=0.0)
    state = state._replace(average=jax.tree.map(jnp.zeros_like, state.params))  # it is not taken
    batch = batch_of(state, DATA, 0)
    source, target = (int(side.sum(1).max()) for side in (batch.source_segments, batch.weights))
    batch = make_batch(batch.source[:, :source], batch.target_out[:, :target])
    assert source < DATA.source.shape[1]
    assert target < DATA.target.shape[1]

    def loss(params):
        logits = logits_of(small_model(), params, batch)
        nll = cross_entropy(logits, batch.target_out, NUMBERS["label_smoothing"])
        return (nll * batch.weights).sum() / batch.weights.sum()

    value, expected = jax.value_and_grad(loss)(state.params)
    after, sums = steps(state, zero_sums(), DATA, jnp.int32(1))
    for name, gradient in expected.items():
        found = after.moments[0].mu[name] / 0.1
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], value, rtol=1e-5)
    assert sums["tokens"] == batch.weights.sum()


def test_a_few_strings_are_learnt_by_heart(train_steps):
    start, steps = train_steps
    state = start(dropout=0.0, attention_dropout=0.0, label_smoothing=0.0)
    state, first = steps(state, zero_sums(), DATA, jnp.int32(1))
    state, _ = steps(state, zero_sums(), DATA, jnp.int32(95))
    _, last = steps(state, zero_sums(), DATA, jnp.int32(3))
    assert first["loss"] / first["tokens"] > 3.0
    assert last["loss"] / last["tokens"] < 0.5


def test_the_streams_of_a_seed_share_no_key():
    keys = [stream(jnp.uint32(0), purpose) for purpose in PURPOSES]
    keys += [jax.random.fold_in(key, 0) for key in keys] + [jax.random.key(0)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_the_average_follows_its_formula_and_evaluation_uses_it(train_steps):
    """Three updates by hand; the warm-up of the decay, then the decay itself."""
    start, steps = train_steps
    state = start()
    expected = {name: np.asarray(value) for name, value in state.params.items()}
    for number, kept in enumerate((1 / 10, DECAY, DECAY)):
        assert kept == min(DECAY, (1 + number) / (10 + number))
        state, _ = steps(state, zero_sums(), DATA, jnp.int32(1))
        for name, value in state.params.items():
            expected[name] = kept * expected[name] + (1 - kept) * np.asarray(value)
            np.testing.assert_allclose(state.average[name], expected[name], rtol=1e-5, atol=1e-7)
    assert not equal(state.average, state.params)
    assert equal(state.variables(), state.average)  # what evaluation is given


@pytest.mark.parametrize(("step", "kept"), [(0, 0.1), (1, 2 / 11), (80, 0.9), (10**6, 0.99)])
def test_the_average_forgets_its_noisy_beginning(step, kept):
    one, other = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
    np.testing.assert_allclose(averaged(one, other, jnp.int32(step), 0.99)["w"], kept, rtol=1e-5)


def test_without_an_average_no_copy_is_kept_and_evaluation_uses_the_parameters():
    model, recipe, init = pieces()
    state = jax.eval_shape(init, jnp.uint32(0))
    state, _ = jax.eval_shape(make_train_step(model, recipe), state, BATCH)
    assert state.average == {}
    assert state.variables() == state.params


@pytest.fixture(scope="module")
def batch_norm():
    """A model with batch norm, its state before and after 5 steps, and its train steps."""
    model, recipe, init = pieces(norm="batch", position="none")
    steps = jax.jit(make_train_steps(make_train_step(model, recipe)))
    before = init(jnp.uint32(0))
    after, _ = steps(before, zero_sums(), DATA, jnp.int32(5))
    return model, before, after, steps


def test_batch_norm_gathers_statistics_in_training(batch_norm):
    model, before, after, _ = batch_norm
    # One norm before each of 5 sublayers, one at the end of each stack; mean and variance.
    assert len(before.statistics) == 2 * (5 + 2)
    assert before.statistics.keys() == model.statistics == after.statistics.keys()
    for name, value in before.statistics.items():
        np.testing.assert_array_equal(value, float(name.endswith("variance")))
        assert (after.statistics[name] != value).any(), name


def test_statistics_are_neither_counted_nor_trained(batch_norm):
    model, before, after, _ = batch_norm
    assert not before.params.keys() & before.statistics.keys()
    assert model.count_parameters() == sum(value.size for value in before.params.values())
    assert model.count_parameters() == small_model(norm="layer").count_parameters()
    moments = jax.tree.leaves(after.moments, is_leaf=lambda leaf: isinstance(leaf, dict))
    for each in moments:
        assert not isinstance(each, dict) or each.keys() == before.params.keys()


def test_statistics_after_a_step_are_those_of_the_batch(batch_norm):
    """By hand: the encoder's first norm reads the embedded tokens."""
    _, before, _, steps = batch_norm
    after, _ = steps(before, zero_sums(), DATA, jnp.int32(1))
    batch = batch_of(before, DATA, 0)
    embedded = np.asarray(before.params["embedding/table"])[batch.source] * 16**0.5
    seen = embedded[np.asarray(batch.source_segments) > 0]
    norm = "encoder/layers/0/residuals/0/norm"
    mean, variance = (after.statistics[f"{norm}/{kind}"] for kind in ("mean", "variance"))
    np.testing.assert_allclose(mean, 0.1 * seen.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * seen.var(0, ddof=1), rtol=1e-4)


def test_validation_uses_what_batch_norm_has_seen_and_changes_nothing(batch_norm):
    model, before, after, _ = batch_norm
    score = jax.jit(partial(evaluation.score, model))
    metrics = score(after.variables(), DATA).metrics("validation")
    fresh = score(after.params | before.statistics, DATA).metrics("validation")
    assert metrics["validation/loss"] < fresh["validation/loss"]
    alone = score(after.variables(), DATA.head(1))
    np.testing.assert_allclose(alone.nll[0], score(after.variables(), DATA).nll[0], rtol=1e-5)


def test_a_batch_in_parts_is_the_batch_and_each_part_drops_elements_of_its_own(train_steps):
    """Parts have different numbers of tokens, and weigh accordingly."""
    start, steps = train_steps
    model, recipe, _ = pieces({"clip_norm": 0.0, "ema_decay": DECAY, "accumulate": 3})
    in_parts = jax.jit(make_train_step(model, recipe))
    state = start(dropout=0.0, attention_dropout=0.0)
    batch = batch_of(state, DATA, 0)
    assert len(set(batch.weights.sum(1).tolist())) > 1
    whole, expected = steps(state, zero_sums(), DATA, jnp.int32(1))
    parts, sums = in_parts(state, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    for name, value in whole.moments[0].mu.items():
        np.testing.assert_allclose(parts.moments[0].mu[name], value, rtol=1e-4, atol=1e-6)

    state = start(dropout=0.5, attention_dropout=0.0, label_smoothing=0.0)
    single = jax.tree.map(lambda x: x[:1], BATCH)
    alike = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), single)
    keys = jax.random.split(jax.random.fold_in(stream(jnp.uint32(0), "dropout"), 0), 3)
    logits = jax.vmap(lambda key: logits_of(small_model(dropout=0.5), state.params, single, key))(
        keys
    )
    losses = [(cross_entropy(each, single.target_out) * single.weights).sum() for each in logits]
    assert len({float(loss) for loss in losses}) == 3
    found = float(in_parts(state, alike)[1]["loss"])
    assert found == pytest.approx(float(sum(losses)), rel=1e-4)


def test_parts_take_less_memory():
    def taken(accumulate):
        model, recipe, init = pieces({"accumulate": accumulate, "name": "sgd"})
        batch = jax.tree.map(lambda x: jnp.repeat(x, 64, axis=0), BATCH)
        step = jax.jit(make_train_step(model, recipe))
        compiled = step.lower(jax.eval_shape(init, jnp.uint32(0)), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert taken(16) < taken(1) / 4
