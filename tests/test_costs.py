from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, strings
from tests.test_training import small_config
from transformer.data.batches import Dataset
from transformer.modules.config import ARCHITECTURES
from transformer.parallel.mesh import MeshConfig, make_mesh, one_device_mesh
from transformer.training.costs import PEAK_FLOPS, matmul_flops, peak_flops, step_flops
from transformer.training.metrics import Interval, finalize, zero_sums
from transformer.training.step import init_state, make_train_step

A, B, SQUARE = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.ones((4, 4))
BATCH = strings(("abcde", "edc"), ("ab", "ba"), ("f", "f"))  # [3, 6] and [3, 4]


def test_products_are_counted_as_by_hand():
    product, x, y = 2 * 3 * 5 * 7, jnp.ones((4, 3, 5, 2)), jnp.ones((4, 2, 5, 7))
    shapes = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (A, B))
    assert matmul_flops(jnp.matmul, A, B) == matmul_flops(jnp.matmul, *shapes) == product
    assert matmul_flops(lambda a, b: jax.nn.relu(a @ b + 1.0).sum(), A, B) == product
    assert matmul_flops(lambda a: jnp.exp(a) * a, A) == 0
    assert matmul_flops(partial(jnp.einsum, "bijk,bkjl->bil"), x, y) == 2 * 4 * 3 * 5 * 2 * 7

    gradient = partial(jax.value_and_grad, lambda a, b: (a @ b).sum())
    assert matmul_flops(gradient(argnums=(0, 1)), A, B) == 3 * product
    assert matmul_flops(gradient(), A, B) == 2 * product
    again = jax.checkpoint(lambda a: jnp.sin(a @ B))  # and what is computed anew
    assert matmul_flops(jax.grad(lambda a: again(a).sum()), A) == 3 * product


def test_a_loop_counts_as_often_as_it_runs_and_of_two_branches_the_dearer_one():
    def scan(x):
        return jax.lax.scan(lambda x, _: (x @ x, x @ x), x, length=11)

    def loop(body):
        return lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, body, x)

    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    product = 2 * 4**3
    assert matmul_flops(scan, SQUARE) == matmul_flops(jax.jit(scan), SQUARE) == 22 * product
    assert matmul_flops(jax.vmap(scan), jnp.ones((2, 4, 4))) == 2 * 22 * product
    known = partial(jax.lax.fori_loop, 0, 6, lambda _, x: x @ x)
    assert matmul_flops(known, SQUARE) == 6 * product
    assert matmul_flops(branch, SQUARE) == 2 * product
    assert matmul_flops(loop(lambda x: x + 1.0), SQUARE) == 0
    for body in (lambda x: x @ x, jax.jit(lambda x: jnp.sin(x) @ x)):
        with pytest.raises(ValueError, match="while loop"):
            matmul_flops(loop(body), SQUARE)


def step_of(config=(), **changes):  # and its arguments
    model, config = small_model(**changes), small_config(**dict(config))
    state = jax.eval_shape(lambda seed: init_state(model, config, seed, {}), np.uint32(0))
    return make_train_step(model, config), state, BATCH


# No two are alike.
SIZES: dict[str, Any] = {"num_layers": 2, "d_model": 24, "num_heads": 4, "d_k": 10, "d_ff": 56}


def forward_flops(*, kv_heads: int = 4, matrices: int = 2, ff_width: int = 56) -> int:
    """The Transformer's matrix products, 2 operations a multiply-add, by the paper's formulas."""
    (rows, source), target = BATCH.source.shape, BATCH.target_in.shape[1]
    # Two projections of each kind for a token, two products of N H for a pair of positions.
    project, project_kv, pair = 2 * 24 * 4 * 10, 2 * 24 * kv_heads * 10, 2 * 4 * 10
    layer = project + project_kv + matrices * 24 * ff_width
    encoder = source * layer + source * source * pair
    decoder = target * layer + target * target * pair
    cross = target * project + source * project_kv + target * source * pair
    logits = target * 24 * small_model(**SIZES).vocab_size
    return 2 * rows * (2 * (encoder + decoder + cross) + logits)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"attention_backend": "xla", "position_encoding": "relative"}, {}),
        ({"position_encoding": "rotary"}, {}),
        ({"num_kv_heads": 2}, {"kv_heads": 2}),
        ({"feed_forward": "swiglu"}, {"matrices": 3, "ff_width": 40}),  # ⅔ of 56, a multiple of 8
    ],
)
def test_a_step_of_the_transformer_is_three_times_its_forward_products(changes, sizes):
    """Each product has two gradient products; an embedding's lookup and its gradient are none."""
    rates = dict.fromkeys(("dropout_rate", "label_smoothing", "ema_decay"), 0.1)
    found = matmul_flops(*step_of(rates, **SIZES, **changes))
    assert found == 3 * forward_flops(**sizes)


def test_utilisation_is_the_models_flops_over_the_peak_of_all_devices(monkeypatch):
    sums = zero_sums() | {"steps": 10.0}
    assert peak_flops(one_device_mesh()) is None  # nobody says what a CPU's is
    assert "train/mfu" not in finalize(Interval(sums, 5.0))
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 100.0)
    mesh = make_mesh(MeshConfig(replica=1, data=4, fsdp=1, tensor=2, context=1))
    assert peak_flops(mesh) == 800
    assert finalize(Interval(sums, 5.0, peak_share=0.1))["train/mfu"] == pytest.approx(0.2)


def test_the_count_is_that_of_the_model_whatever_the_backend():
    data = Dataset(BATCH.source, BATCH.target_out, len(BATCH.source))
    knobs = ({}, {"attention_backend": "splash"}, {"attention_backend": "einsum", "remat": "full"})
    assert len({step_flops(small_model(**each), small_config(), data) for each in knobs}) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_muons_products_come_on_top_of_what_the_others_cost(architecture):
    adam = matmul_flops(*step_of(architecture=architecture))
    assert matmul_flops(*step_of({"name": "muon"}, architecture=architecture)) > adam > 0


def test_the_compiler_counts_the_same_and_what_is_no_product_besides():
    """XLA's count has softmax, norms and the optimizer in it: here an eighth as much again."""
    step, *operands = step_of({"name": "sgd"}, d_model=128, d_ff=256, num_heads=4)
    theirs = jax.jit(step).lower(*operands).cost_analysis()["flops"]
    assert theirs / 1.2 < matmul_flops(step, *operands) < theirs
