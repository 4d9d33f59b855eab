"""Layers scanned or unrolled, kept or computed anew: what is computed does not change."""

import itertools
from functools import cache, partial

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
DEEP = {"layers": 2, "dropout": 0.3, "attention_dropout": 0.2}


def loss_of(model, params, key):
    module = model.bind(params)
    logits = module(
        *(BATCH.source, BATCH.source_segments, BATCH.target_in, BATCH.target_segments),
        training=training_of(model, key),
    )
    loss = (cross_entropy(logits, BATCH.target_out) * BATCH.weights).sum()
    return loss, flatten(nnx.state(module, Statistic))


@cache
def outcome(**changes):
    """Loss, statistics and gradients of a step with dropout."""
    model = small_model(**DEEP | changes)
    function = jax.jit(jax.value_and_grad(partial(loss_of, model), has_aux=True))
    return function(random_params(model, 0), jax.random.key(5))


# scan_layers, remat, norm
DEFAULT = [(True, "none", "batch"), (True, "full", "batch"), (False, "dots", "batch")]
SLOW = set(itertools.product((False, True), REMATS, ("layer", "batch"))) - set(DEFAULT)
SLOW -= {(False, "none", "layer"), (False, "none", "batch")}  # what the others are compared with


@pytest.mark.parametrize(
    ("scan_layers", "remat", "norm"),
    [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW))],
)
def test_loss_statistics_and_gradients_are_those_of_layers_one_by_one(scan_layers, remat, norm):
    mine = outcome(norm=norm, scan_layers=scan_layers, remat=remat)
    plain = outcome(norm=norm)
    assert (len(plain[0][1]) > 0) == (norm == "batch")
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_each_layer_drops_elements_of_its_own():
    """Layers with one set of parameters between them, and no attention but to one key."""
    model = small_model(**DEEP | {"layers": 3, "scan_layers": True})
    training = training_of(model, jax.random.key(0))
    keys = training.of_each_layer(3)
    draws = {int(jax.random.bits(training.of_layer(key).rngs.dropout())) for key in keys}
    assert len(draws) == 3


def deep(layers=3, **changes):
    """A model, and its loss as a function of the parameters."""
    model = small_model(layers=layers, **changes)
    return model, lambda params: loss_of(model, params, jax.random.key(0))[0]


def test_scanned_layers_are_compiled_once():
    """The program of many layers has as many matrix products as that of two."""
    products = []
    for layers in (2, 5):
        model, loss = deep(layers, scan_layers=True)
        text = jax.jit(jax.grad(loss)).lower(model.shapes).as_text()
        products.append(text.count("dot_general"))
    assert products[0] == products[1] > 0


def test_what_is_recomputed_is_not_kept_for_the_backward_pass():
    def kept(remat):
        model, loss = deep(remat=remat, scan_layers=True)
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], model.shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.slow
def test_what_is_recomputed_takes_no_memory():
    """Of what the compiler sets aside."""

    def taken(remat):
        model, loss = deep(remat=remat, scan_layers=True)
        compiled = jax.jit(jax.grad(loss)).lower(model.shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert taken("full") < taken("dots") < taken("none")
