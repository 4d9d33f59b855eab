import fnmatch
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import logits_of, small_model, strings
from transformer.config import RunConfig
from transformer.data.batches import Dataset, make_batch
from transformer.inference import evaluation
from transformer.loss import cross_entropy
from transformer.modules.config import ModelConfig
from transformer.training import step as training
from transformer.training.health import batch_of
from transformer.training.metrics import zero_sums
from transformer.training.optimizer import DECAYING, OPTIMIZERS, OptimizerConfig
from transformer.training.step import init_state, make_train_step, make_train_steps

TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst", "u")
BATCH = strings(*((text, text[::-1]) for text in TEXTS), source_length=8, target_length=7)
DATA = Dataset(BATCH.source, BATCH.target_out, 3)


def small_config(**changes):
    """The default config without dropout, with changes by name."""
    knobs: dict[str, Any] = {"steps": 100, "batch_size": 96}
    knobs |= {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | changes
    for section, kind in (("model", ModelConfig), ("optimizer", OptimizerConfig)):
        names = {field.name for field in fields(kind)} & knobs.keys()
        knobs[section] = kind(**{name: knobs.pop(name) for name in names})
    return RunConfig(**knobs)


def initial(model, config):
    return jax.jit(lambda seed: init_state(model, config, seed, {}))


def pieces(config=(), **changes):
    """A small model, a config by which it learns fast, and its initial state by seed."""
    model = small_model(**changes)
    config = small_config(**{"warmup_steps": 2, "learning_rate": 1e-2, **dict(config)})
    return model, config, initial(model, config)


def equal(one, other):
    """Whether two pytrees are the same bit for bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def runner(model, config):
    """(state, number of steps) → state, sums."""
    steps = jax.jit(make_train_steps(make_train_step(model, config)))
    return lambda state, n, sums=None, data=DATA: steps(state, sums or zero_sums(), data, n)


# One program for all rates of dropout and smoothing. Gradients are not clipped, so that Adam's
# first moment after one step is a tenth of them.
DECAY = 0.15
MODEL, STEP_CONFIG, _ = pieces({"ema_decay": DECAY, "clip_norm": 0.0})
INIT, run = jax.jit(partial(init_state, MODEL, STEP_CONFIG)), runner(MODEL, STEP_CONFIG)
SMOOTHING = 0.1


def start(seed=0, dropout_rate=0.2, attention_dropout_rate=0.1, label_smoothing=SMOOTHING):
    hparams = {"dropout_rate": dropout_rate, "attention_dropout_rate": attention_dropout_rate}
    hparams = jax.tree.map(jnp.float32, hparams | {"label_smoothing": label_smoothing})
    return INIT(jnp.uint32(seed), hparams)


def test_the_division_of_steps_among_calls_changes_no_bit():
    whole = run(start(), 12)
    for division in ([1] * 12, [4, 0, 1, 7]):
        divided = (start(), zero_sums())
        for n in division:
            divided = run(divided[0], n, divided[1])
        assert equal(whole, divided)
    assert (whole[0].taken(), float(whole[1]["steps"])) == (12, 12)


def test_a_seed_decides_everything():
    one, same, other = (run(start(seed), 3) for seed in (7, 7, 8))
    assert equal(one, same)
    assert not equal(one[0].params, other[0].params)
    keys = [training.stream(jnp.uint32(0), purpose) for purpose in training.PURPOSES]
    keys += [jax.random.fold_in(key, 0) for key in keys] + [jax.random.key(0)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_differs_from_step_to_step(rate):
    state = start(**{"dropout_rate": 0.0, "attention_dropout_rate": 0.0, rate: 0.5})
    same = jax.tree.map(lambda tokens: jnp.repeat(tokens[:1], len(tokens), axis=0), DATA)
    at = [state._replace(step=jnp.int32(step)) for step in range(5)]
    assert len({float(run(each, 1, data=same)[1]["train/objective"]) for each in at}) == 5


def test_the_gradient_is_of_the_mean_over_real_tokens():
    state = start(dropout_rate=0.0, attention_dropout_rate=0.0)
    state = state._replace(ema_params=jax.tree.map(jnp.zeros_like, state.params))  # it is not taken
    batch = batch_of(state, DATA, 0)
    source, target = (int(side.sum(1).max()) for side in (batch.source_segments, batch.weights))
    assert source < DATA.source.shape[1]
    assert target < DATA.target.shape[1]
    # Without its padding, which changes nothing.
    batch = make_batch(batch.source[:, :source], batch.target_out[:, :target])

    def loss(params):
        logits = logits_of(small_model(), params, batch)
        found = cross_entropy(logits, batch.target_out, SMOOTHING)
        mean = lambda loss: (loss * batch.weights).sum() / batch.weights.sum()  # noqa: E731
        return mean(found.objective), mean(found.nll)

    (value, nll), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    after, sums = run(state, 1)
    for name, gradient in expected.items():
        found = after.opt_state[0].mu[name] / 0.1
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sums["train/objective"] / sums["tokens"], value, rtol=1e-5)
    np.testing.assert_allclose(sums["train/loss"] / sums["tokens"], nll, rtol=1e-5)
    assert sums["tokens"] == batch.weights.sum()


def test_a_few_strings_are_learnt_by_heart():
    state, first = run(start(dropout_rate=0.0, attention_dropout_rate=0.0, label_smoothing=0.0), 1)
    last = run(run(state, 95)[0], 3)[1]
    assert first["train/objective"] / first["tokens"] > 3.0
    assert last["train/objective"] / last["tokens"] < 0.5


def test_the_average_follows_its_formula_and_evaluation_uses_it():
    state = start()
    expected = {name: np.asarray(value) for name, value in state.params.items()}
    for number, kept in enumerate((1 / 10, DECAY, DECAY)):
        assert kept == min(DECAY, (1 + number) / (10 + number))
        state, _ = run(state, 1)
        for name, value in state.params.items():
            expected[name] = kept * expected[name] + (1 - kept) * np.asarray(value)
            np.testing.assert_allclose(state.ema_params[name], expected[name], rtol=1e-5, atol=1e-7)
    assert equal(state.variables(), state.ema_params)  # what evaluation is given
    for number, kept in ((0, 0.1), (1, 2 / 11), (80, 0.9), (10**6, 0.99)):
        ones, zeros = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
        found = training.update_ema(ones, zeros, jnp.int32(number), 0.99)
        np.testing.assert_allclose(found["w"], kept, rtol=1e-5)


def test_batch_norm_gathers_statistics_and_validation_uses_them():
    model, config, init = pieces(norm="batch")
    before, run = init(jnp.uint32(0)), runner(model, config)
    after = run(before, 5)[0]
    assert before.batch_stats.keys() == model.statistics == after.batch_stats.keys()
    for name, value in before.batch_stats.items():
        np.testing.assert_array_equal(value, float(name.endswith("/var")))
        assert (after.batch_stats[name] != value).any(), name
    # They are neither counted nor trained.
    assert not before.params.keys() & before.batch_stats.keys()
    assert model.count_parameters() == sum(value.size for value in before.params.values())
    moments = jax.tree.leaves(after.opt_state, is_leaf=lambda leaf: isinstance(leaf, dict))
    assert all(m.keys() == before.params.keys() for m in moments if isinstance(m, dict))
    assert (after.ema_params, after.variables()) == ({}, after.params | after.batch_stats)

    score = jax.jit(partial(evaluation.score, model))
    nll = score(after.variables(), DATA)["nll"]
    assert nll.sum() < score(after.params | before.batch_stats, DATA)["nll"].sum()
    np.testing.assert_allclose(score(after.variables(), DATA.head(1))["nll"], nll[:1], rtol=1e-5)


EDGES = {"muon": [("*kernel",), ("*scale", "*bias", "*embedding")], "adam": [("*/mean", "*/var")]}
FROZEN = [(name, patterns) for name, each in EDGES.items() for patterns in each]
FROZEN += [(name, ("encoder/*", "embedding/*")) for name in OPTIMIZERS]


@pytest.mark.parametrize(("name", "patterns"), FROZEN)
def test_what_is_frozen_stays_and_has_no_optimizer_state(name, patterns):
    knobs = {"name": name, "ema_decay": 0.5, "freeze": patterns, "clip_norm": 0.0}
    knobs |= {"weight_decay": 0.1} if name in DECAYING else {}
    model, config, init = pieces(knobs, norm="batch")
    before, everything = init(jnp.uint32(0)), model.shapes.keys()
    after, sums = runner(model, config)(before, 1)
    frozen = {x for x in everything if any(fnmatch.fnmatchcase(x, each) for each in patterns)}
    moved = {x for x in everything if (after.variables()[x] != before.variables()[x]).any()}
    assert moved == everything - frozen
    assert before.ema_params.keys() == after.ema_params.keys() == before.params.keys() - frozen
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(after.opt_state), strict=True)
    stored = {jax.tree_util.keystr(path[-1:], simple=True) for path in paths}
    assert not stored & frozen
    if name == "adam":
        gradients = jax.tree.map(lambda mu: mu / 0.1, after.opt_state[0].mu)
        assert gradients.keys() == before.ema_params.keys() <= stored
        np.testing.assert_allclose(sums["train/gradient_norm"], optax.tree.norm(gradients), 1e-5)


def test_a_batch_in_parts_is_the_batch_and_each_part_drops_elements_of_its_own():
    in_parts = jax.jit(make_train_step(MODEL, replace(STEP_CONFIG, accumulation_steps=3)))
    state = start(dropout_rate=0.0, attention_dropout_rate=0.0)
    batch = batch_of(state, DATA, 0)
    assert len(set(batch.weights.sum(1).tolist())) > 1  # so that parts weigh differently
    whole, expected = run(state, 1)
    parts, sums = in_parts(state, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    for name, value in whole.opt_state[0].mu.items():
        np.testing.assert_allclose(parts.opt_state[0].mu[name], value, rtol=1e-4, atol=1e-6)

    state = start(dropout_rate=0.5, attention_dropout_rate=0.0, label_smoothing=0.0)
    single = jax.tree.map(lambda x: x[:1], BATCH)
    alike = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), single)
    keys = jax.random.split(jax.random.fold_in(training.stream(jnp.uint32(0), "dropout"), 0), 3)
    model = small_model(dropout_rate=0.5)

    def loss(key):
        logits = logits_of(model, state.params, single, key)
        return (cross_entropy(logits, single.target_out).nll * single.weights).sum()

    losses = jax.jit(jax.vmap(loss))(keys).tolist()
    assert len(set(losses)) == 3
    found = in_parts(state, alike)[1]["train/objective"]
    assert found == pytest.approx(sum(losses), rel=1e-4)


def test_parts_take_less_memory():
    def taken(accumulate):
        model, config, init = pieces({"accumulation_steps": accumulate, "name": "sgd"})
        batch = jax.tree.map(lambda x: jnp.repeat(x, 64, axis=0), BATCH)
        lowered = jax.jit(make_train_step(model, config)).lower(init(jnp.uint32(0)), batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert taken(16) < taken(1) / 4
