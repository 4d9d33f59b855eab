"""Layers scanned, rematerialised or neither compute the same."""

import contextlib
import itertools
from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import random_params, small_model, strings, training
from transformer.errors import UserError
from transformer.loss import cross_entropy
from transformer.modules import masking
from transformer.modules.dropout import training_rngs
from transformer.modules.model import flatten
from transformer.modules.stacks import REMATS, Encoder
from transformer.modules.transformer import stack_arguments

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
DEEP = {"num_layers": 2, "dropout_rate": 0.3, "attention_dropout_rate": 0.2}


def loss_of(model, params, key):
    module = model.bind(params)
    logits = module(**BATCH.inputs(), **training(key))
    loss = (cross_entropy(logits, BATCH.target_out).nll * BATCH.weights).sum()
    return loss, flatten(nnx.state(module, nnx.BatchStat))


@cache
def outcome(**changes):  # loss, statistics and gradients of a step with dropout
    model = small_model(**DEEP | changes)
    function = jax.jit(jax.value_and_grad(partial(loss_of, model), has_aux=True))
    return function(random_params(model, 0), jax.random.key(5))


# scan_layers, remat, norm; all are compared with (False, "none")
QUICK = [(True, "full", "batch"), (False, "dots", "batch")]
SLOW = sorted({*itertools.product((False, True), REMATS, ("layer", "batch"))} - {*QUICK})
CASES = QUICK + [pytest.param(*each, marks=pytest.mark.slow) for each in SLOW]


@pytest.mark.parametrize(("scan_layers", "remat", "norm"), CASES)
def test_loss_statistics_and_gradients_are_those_of_layers_one_by_one(scan_layers, remat, norm):
    mine, plain = outcome(norm=norm, scan_layers=scan_layers, remat=remat), outcome(norm=norm)
    assert (len(plain[0][1]) > 0) == (norm == "batch")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), mine, plain)


def test_layers_that_differ_run_as_themselves_or_are_not_scanned():
    """A static difference, such as of a backend, is in no variable that a scan could stack."""
    config, x = small_model(num_layers=2).config, jax.random.normal(jax.random.key(0), (1, 3, 16))
    mask = masking.causal(3)
    for scan, remat in ((False, "none"), (False, "full"), (True, "none")):
        arguments = stack_arguments(config) | {"scan_layers": scan, "remat": remat}
        encoder = Encoder(**arguments, rngs=nnx.Rngs(0))
        whole = encoder(x, mask=mask)
        encoder.layers[1].self_attention.backend = lambda query, *_: 0.0 * query
        with pytest.raises(UserError, match="scan_layers") if scan else contextlib.nullcontext():
            layer = encoder.layers[1]
            expected = encoder.final_norm(layer(encoder.layers[0](x, mask=mask), mask=mask))
            np.testing.assert_allclose(encoder(x, mask=mask), expected, rtol=1e-5, atol=1e-6)
            assert (expected != whole).any()


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"remat": "full"}])
def test_each_layer_and_each_call_drops_elements_of_its_own(changes):
    """With the streams that the layers keep, and with those of a call."""
    arguments = stack_arguments(small_model(**DEEP | {"num_layers": 3} | changes).config)
    encoder = Encoder(**arguments, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    first, second = encoder(x), encoder(x)
    assert (first != second).any()
    assert {int(each.residuals[0].dropout.rngs.count[...]) for each in encoder.layers} == {2}
    streams = [each.residuals[0].dropout.rngs.key[...] for each in encoder.layers]
    assert len({int(jax.random.bits(key)) for key in streams}) == 3
    given = [encoder(x, rngs=training_rngs(jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(*given[:2])
    assert (given[0] != given[2]).any()
    evaluated = nnx.view(encoder, deterministic=True)(x)
    np.testing.assert_array_equal(evaluated, encoder(x, deterministic=True))


def deep(**changes):
    """A loss of a model's parameters, its gradient lowered, and their shapes."""
    model = small_model(**{"num_layers": 3, "scan_layers": True} | changes)
    loss = lambda params: loss_of(model, params, jax.random.key(0))[0]  # noqa: E731
    return loss, jax.jit(jax.grad(loss)).lower, model.shapes


def test_scanned_layers_are_compiled_once():
    def products(layers):
        _, lower, shapes = deep(num_layers=layers)
        return lower(shapes).as_text().count("dot_general")

    assert products(2) == products(5) > 0


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_recomputed_is_not_kept(compiled):
    def kept(remat):
        loss, lower, shapes = deep(remat=remat)
        if compiled:
            return lower(shapes).compile().memory_analysis().temp_size_in_bytes
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")
