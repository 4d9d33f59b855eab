"""Replica k of a population against the single run that it stands for."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER
from tests.test_checkpoint import filled, metrics
from tests.test_config import of, resolved
from tests.test_sharding import DATA, mesh_of
from tests.test_training import equal
from transformer.inference import evaluation
from transformer.modules.model import Model
from transformer.parallel.mesh import RULES, replicated
from transformer.parallel.replicas import split_replicas, vmap_replicas
from transformer.run import Run
from transformer.training.checkpoint import Checkpoints
from transformer.training.metrics import zero_sums

KNOBS = of("model.", dropout_rate=0.2, attention_dropout_rate=0.1)
KNOBS |= {"steps": 20, "label_smoothing": 0.1, "optimizer.learning_rate": 1e-2}
# data, fsdp, tensor, replica
ONE, APART, MIXED = (1, 1, 1, 1), (1, 1, 1, 4), (2, 1, 2, 2)


def run_config(replicas, changes):
    return resolved(KNOBS | {"replicas": replicas} | changes)


@cache
def run(cfg, sizes):
    model = Model(cfg.model, TOKENIZER.vocab_size)
    return Run(cfg, mesh=mesh_of(*sizes, cfg.replicas), model=model)


def train(cfg, sizes=ONE):
    """(state, sums, scores) of each replica after five steps."""
    one = run(replace(cfg, seed=0, per_replica=replace(cfg.per_replica, seed=())), sizes)
    with jax.set_mesh(one.mesh):
        data = jax.device_put(DATA, replicated(one.mesh))
        state = one.init(cfg.seeds(), cfg.hparams())
        state, sums = one.train_steps(state, zero_sums(cfg.replicas), data, jnp.int32(5))
        scores = one.score(state.variables(), data)
    return split_replicas(jax.device_get((state, sums, scores)), cfg.replicas)


def check(population, cfg, k):
    """Replica `k` is its single run but for rounding: a millionth of a loss.

    Another order of the same additions; Adam divides by the gradients, and magnifies it where one
    is near 0. A parameter may differ by a thousandth of the way that Adam can go in five steps.
    """
    state, sums, scores = population[k]
    ((alone, alone_sums, alone_scores),) = train(cfg.replica(k))
    state = state._replace(hparams={})  # a single run has its own inside its program
    for name, value in alone.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-5, atol=5e-5, err_msg=name)
    close, rest = np.testing.assert_allclose, [s._replace(params={}) for s in (state, alone)]
    jax.tree.map(partial(close, rtol=1e-5, atol=5e-6), *rest)
    jax.tree.map(partial(close, rtol=1e-6), sums, alone_sums)
    jax.tree.map(partial(close, rtol=5e-6), scores, alone_scores)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, APART, MIXED])
def test_replica_k_is_the_single_run_with_its_seed(sizes):
    cfg = run_config(4, {"seed": 7, "model.norm": "batch", "ema_decay": 0.5})
    population = train(cfg, sizes)
    for k in range(4):
        check(population, cfg, k)
    assert [int(state.seed) for state, _, _ in population] == [7, 8, 9, 10]
    assert len({float(sums["train/objective"]) for _, sums, _ in population}) == 4
    for name, value in population[0][0].batch_stats.items():
        assert (value != population[1][0].batch_stats[name]).any(), name


def test_replicas_may_differ_in_every_number_inside_the_step():
    """Where one of them has a rate of 0 too, at which a single run has no such operation."""
    own = {"seed": (7, 5), "learning_rate": (1e-2, 3e-3), "warmup_steps": (1, 4)}
    own |= {"weight_decay": (0.5, 0.0), "label_smoothing": (0.0, 0.2)}
    own |= {"dropout_rate": (0.3, 0.0), "attention_dropout_rate": (0.0, 0.2)}
    changes = {f"per_replica.{name}": values for name, values in own.items()}
    changes |= {"model.random_positions": 64, "model.max_length": 16}
    changes |= {"optimizer.name": "adamw", "ema_decay": 0.5, "freeze": ("encoder/*",)}
    cfg = run_config(2, changes)
    population = train(cfg, MIXED)
    for k in range(2):
        check(population, cfg, k)
        single = cfg.replica(k)
        knobs = vars(single) | vars(single.optimizer) | vars(single.model)
        assert {name: knobs[name] for name in own} == {name: own[name][k] for name in own}
    averages, params = population[0][0].ema_params, population[0][0].params
    assert averages.keys() == {name for name in params if not name.startswith("encoder/")}
    assert not equal(averages, {name: params[name] for name in averages})
    assert run_config(3, {"seed": 7}).seeds().tolist() == [7, 8, 9]  # without seeds of their own


def test_each_replica_decodes_with_its_own_parameters():
    """On devices apart, where their loops end at different steps."""
    model = Model(run_config(4, {}).model, TOKENIZER.vocab_size)
    decode = partial(evaluation.decode, model, max_length=6)
    variables = [model.init(jax.random.key(seed)) for seed in range(4)]
    with jax.set_mesh(mesh_of(*APART, 4)):
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
        outputs = jax.jit(vmap_replicas(decode, 4, in_axes=(0, None)))(together, DATA.source).tokens
    for output, own in zip(outputs, variables, strict=True):
        np.testing.assert_array_equal(output, jax.jit(decode)(own, DATA.source).tokens)
    assert len(np.unique(outputs, axis=0)) == 4


@pytest.mark.parametrize(("saved", "restored"), [(ONE, MIXED), (MIXED, APART)])
def test_a_population_comes_back_from_its_checkpoint_on_any_mesh(saved, restored, tmp_path):
    """Replicas are split over their axis, and parameters as ever."""
    cfg = run_config(4, {"per_replica.learning_rate": (1e-2, 2e-2, 1e-3, 5e-3), "ema_decay": 0.9})
    state, like = filled(run(cfg, saved).abstract_state), run(cfg, restored).abstract_state
    with Checkpoints(tmp_path, keep=1, best="sequence_accuracy") as checkpoints:
        checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path, keep=1, best="sequence_accuracy") as checkpoints:
        back = checkpoints.restore(checkpoints.find("latest"), like)
    assert equal(back, state)
    assert back.hparams.keys() == {"learning_rate"}
    for array, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True):
        assert array.sharding == wanted.sharding
        assert (len(array), array.sharding.spec[0]) == (4, "replica")
    for name, axes in Model(cfg.model, TOKENIZER.vocab_size).axes.items():
        assert like.params[name].sharding.spec[1:] == tuple(RULES[axis] for axis in axes), name
