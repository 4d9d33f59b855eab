"""Layers scanned or unrolled, kept or computed anew: what is computed does not change."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model, strings, training_of
from transformer.loss import cross_entropy
from transformer.model import flatten
from transformer.model_config import REMATS
from transformer.normalization import Statistic

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
DEEP = {"layers": 3, "dropout": 0.3, "attention_dropout": 0.2}


def loss_of(model, params, key):
    module = model.bind(params)
    logits = module(
        *(BATCH.source, BATCH.source_segments, BATCH.target_in, BATCH.target_segments),
        training=training_of(model, key),
    )
    loss = (cross_entropy(logits, BATCH.target_out) * BATCH.weights).sum()
    return loss, flatten(nnx.state(module, Statistic))


def outcome(**changes):
    """Loss, statistics and gradients of a step with dropout."""
    model = small_model(**DEEP | changes)
    function = jax.jit(jax.value_and_grad(partial(loss_of, model), has_aux=True))
    return function(random_params(model, 0), jax.random.key(5))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_loss_statistics_and_gradients_are_those_of_layers_one_by_one(scan_layers, remat, norm):
    mine = outcome(norm=norm, scan_layers=scan_layers, remat=remat)
    plain = outcome(norm=norm)
    assert (len(plain[0][1]) > 0) == (norm == "batch")
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_each_layer_drops_elements_of_its_own():
    """Layers with one set of parameters between them, and no attention but to one key."""
    model = small_model(**DEEP | {"scan_layers": True})
    training = training_of(model, jax.random.key(0))
    keys = training.of_each_layer(3)
    draws = {int(jax.random.bits(training.of_layer(key).rngs.dropout())) for key in keys}
    assert len(draws) == 3


def compiled(**changes):
    model = small_model(**{"layers": 8, "width": 32} | changes)
    step = jax.jit(jax.grad(lambda params: loss_of(model, params, jax.random.key(0))[0]))
    return step.lower(random_params(model, 0))


def test_scanned_layers_are_compiled_once():
    lines = {scan: len(compiled(scan_layers=scan).as_text().splitlines()) for scan in (False, True)}
    assert lines[True] < lines[False] / 2


def test_what_is_computed_anew_takes_no_memory():
    """Of what the compiler sets aside; the more is computed anew, the less it is."""
    taken = {
        remat: compiled(remat=remat, scan_layers=True).compile().memory_analysis()
        for remat in REMATS
    }
    none, dots, full = (taken[name].temp_size_in_bytes for name in ("none", "dots", "full"))
    assert full < dots < none
