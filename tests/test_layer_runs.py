"""Layers scanned or unrolled, kept or computed anew: what is computed does not change."""

import contextlib
import itertools
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model, strings, training_of
from transformer.errors import UserError
from transformer.loss import cross_entropy
from transformer.modules import masking
from transformer.modules.attention import Relations
from transformer.modules.config import REMATS
from transformer.modules.model import flatten
from transformer.modules.normalization import Statistic
from transformer.modules.stacks import Encoder

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
DEEP = {"num_layers": 2, "dropout_rate": 0.3, "attention_dropout_rate": 0.2}


def loss_of(model, params, key):
    module = model.bind(params)
    rows = (BATCH.source, BATCH.source_segments, BATCH.target_in, BATCH.target_segments)
    logits = module(*rows, training=training_of(model, key))
    loss = (cross_entropy(logits, BATCH.target_out).nll * BATCH.weights).sum()
    return loss, flatten(nnx.state(module, Statistic))


@cache
def outcome(**changes):  # loss, statistics and gradients of a step with dropout
    model = small_model(**DEEP | changes)
    function = jax.jit(jax.value_and_grad(partial(loss_of, model), has_aux=True))
    return function(random_params(model, 0), jax.random.key(5))


# scan_layers, remat, norm; all are compared with (False, "none")
DEFAULT = [(True, "full", "batch"), (False, "dots", "batch")]
CASES = sorted(itertools.product((False, True), REMATS, ("layer", "batch")))
CASES = [case for case in CASES if case[:2] != (False, "none") and case not in DEFAULT]
CASES = DEFAULT + [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("scan_layers", "remat", "norm"), CASES)
def test_loss_statistics_and_gradients_are_those_of_layers_one_by_one(scan_layers, remat, norm):
    mine, plain = outcome(norm=norm, scan_layers=scan_layers, remat=remat), outcome(norm=norm)
    assert (len(plain[0][1]) > 0) == (norm == "batch")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), mine, plain)


def test_layers_that_differ_run_as_themselves_or_are_not_scanned():
    """A static difference, such as of a backend, is in no variable that a scan could stack."""
    config, x = small_model(num_layers=2).config, jax.random.normal(jax.random.key(0), (1, 3, 16))
    related = Relations(masking.causal(3), lambda x: x, None)
    for scan, remat in ((False, "none"), (False, "full"), (True, "none")):
        encoder = Encoder(replace(config, scan_layers=scan, remat=remat), rngs=nnx.Rngs(0))
        whole = encoder(x, related)
        encoder.layers[1].self_attention.backend = lambda query, *_: 0.0 * query
        with pytest.raises(UserError, match="scan_layers") if scan else contextlib.nullcontext():
            layer = encoder.layers[1]
            expected = encoder.final_norm(layer(encoder.layers[0](x, related), related))
            np.testing.assert_allclose(encoder(x, related), expected, rtol=1e-5, atol=1e-6)
            assert (expected != whole).any()


def test_each_layer_drops_elements_of_its_own():
    model = small_model(**DEEP | {"num_layers": 3, "scan_layers": True})
    training = training_of(model, jax.random.key(0))
    layers = (training.of_layer(key) for key in training.of_each_layer(3))
    assert len({int(jax.random.bits(layer.rngs.dropout())) for layer in layers}) == 3


def deep(**changes):  # the shapes of a model's parameters, and a loss of them
    model = small_model(**{"num_layers": 3, "scan_layers": True} | changes)
    return model.shapes, lambda params: loss_of(model, params, jax.random.key(0))[0]


def test_scanned_layers_are_compiled_once():
    def products(layers):
        shapes, loss = deep(num_layers=layers)
        return jax.jit(jax.grad(loss)).lower(shapes).as_text().count("dot_general")

    assert products(2) == products(5) > 0


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_recomputed_is_neither_kept_nor_has_a_place(compiled):
    def kept(remat):
        shapes, loss = deep(remat=remat)
        if compiled:
            program = jax.jit(jax.grad(loss)).lower(shapes).compile()
            return program.memory_analysis().temp_size_in_bytes
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")
