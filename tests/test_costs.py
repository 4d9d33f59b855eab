"""The count of floating-point operations against sums done by hand, and against the compiler."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, strings
from tests.test_training import small_recipe
from transformer.costs import PEAK_FLOPS, matmul_flops, share_of_peak, step_flops
from transformer.data.batches import Dataset
from transformer.metrics import train_metrics
from transformer.model_config import ARCHITECTURES
from transformer.optimizer import OPTIMIZERS
from transformer.sharding import MeshConfig, make_mesh, one_device
from transformer.training import init_state, make_train_step

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
BATCH = strings(("abcde", "edc"), ("ab", "ba"), ("f", "f"))  # [3, 6] and [3, 4]


def test_a_product():
    assert matmul_flops(jnp.matmul, A, B) == 2 * 3 * 5 * 7
    assert matmul_flops(lambda a, b: jax.nn.relu(a @ b + 1.0).sum(), A, B) == 2 * 3 * 5 * 7
    assert matmul_flops(lambda a: jnp.exp(a) * a, A) == 0


def test_a_batched_product_over_two_axes():
    x, y = jnp.ones((4, 3, 5, 2)), jnp.ones((4, 2, 5, 7))
    assert matmul_flops(partial(jnp.einsum, "bijk,bkjl->bil"), x, y) == 2 * 4 * 3 * 5 * 2 * 7


def test_shapes_are_enough():
    shapes = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (A, B))
    assert matmul_flops(jnp.matmul, *shapes) == 2 * 3 * 5 * 7


def test_a_loop_counts_as_often_as_it_runs():
    def scan(x):
        return jax.lax.scan(lambda x, _: (x @ x, x @ x), x, length=11)

    square = jnp.ones((4, 4))
    assert matmul_flops(scan, square) == 11 * 2 * (2 * 4**3)
    assert matmul_flops(jax.jit(scan), square) == 11 * 2 * (2 * 4**3)
    twice = jax.vmap(scan)
    assert matmul_flops(twice, jnp.ones((2, 4, 4))) == 2 * 11 * 2 * (2 * 4**3)
    known = partial(jax.lax.fori_loop, 0, 6, lambda _, x: x @ x)
    assert matmul_flops(known, square) == 6 * (2 * 4**3)


def test_a_product_and_its_gradients_are_three():
    def loss(a, b):
        return (a @ b).sum()

    assert matmul_flops(jax.value_and_grad(loss, argnums=(0, 1)), A, B) == 3 * (2 * 3 * 5 * 7)
    assert matmul_flops(jax.value_and_grad(loss), A, B) == 2 * (2 * 3 * 5 * 7)
    again = jax.checkpoint(lambda a, b: jnp.sin(a @ b))  # and what is computed anew
    assert matmul_flops(jax.grad(lambda a: again(a, B).sum()), A) == 3 * (2 * 3 * 5 * 7)


def test_of_two_branches_the_dearer_one_counts():
    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert matmul_flops(branch, jnp.ones((4, 4))) == 2 * (2 * 4**3)


def test_a_product_in_a_loop_of_unknown_length_is_refused():
    def loop(body):
        return lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, body, x)

    assert matmul_flops(loop(lambda x: x + 1.0), jnp.ones((4, 4))) == 0
    for body in (lambda x: x @ x, jax.jit(lambda x: jnp.sin(x) @ x)):
        with pytest.raises(ValueError, match="while loop"):
            matmul_flops(loop(body), jnp.ones((4, 4)))


@cache
def train_step_flops(recipe=(), **changes):
    """`recipe`: pairs of a knob and its value."""
    model, recipe = small_model(**changes), small_recipe(**dict(recipe))
    state = jax.eval_shape(lambda seed: init_state(model, recipe, seed, {}), np.uint32(0))
    return matmul_flops(make_train_step(model, recipe), state, BATCH)


# Sizes of which no two are alike.
SIZES: dict[str, Any] = {"layers": 2, "width": 24, "heads": 4, "head_width": 10, "ff_width": 56}


def forward_flops(*, kv_heads: int = 4, matrices: int = 2, ff_width: int = 56) -> int:
    """The Transformer's matrix products, 2 operations a multiply-add, by the paper's formulas.

    Projections of Q and the output have D · N H weights, of K and V D · K H, and act on
    each token; Q Kᵀ and the weights times V have N H multiply-adds for each pair of
    positions; the feed-forward D F in each matrix, the logits D V, for each token.
    """
    (rows, source), target = BATCH.source.shape, BATCH.target_in.shape[1]
    width, heads, head_width, layers = 24, 4, 10, 2
    project = 2 * width * heads * head_width
    project_kv = 2 * width * kv_heads * head_width
    pair = 2 * heads * head_width
    feed_forward = matrices * width * ff_width
    encoder = source * (project + project_kv + feed_forward) + source * source * pair
    decoder = target * (project + project_kv + feed_forward) + target * target * pair
    cross = target * project + source * project_kv + target * source * pair
    vocabulary = small_model(**SIZES).vocab_size
    return 2 * rows * (layers * (encoder + decoder + cross) + target * width * vocabulary)


@pytest.mark.parametrize(
    ("backend", "position"), [("einsum", "sinusoidal"), ("xla", "rotary"), ("xla", "relative")]
)
def test_a_step_of_the_transformer_is_three_times_its_forward_products(backend, position):
    """Exactly: each product has two gradient products, for both of its factors are trained.

    So is the embedding, in front of the first layer; its own lookup is no product, nor is
    the scattering that is the lookup's gradient.
    """
    flops = train_step_flops(**SIZES, attention_backend=backend, position=position)
    assert flops == 3 * forward_flops()


SUMS = {
    "loss": 1.0,
    "correct": 1.0,
    "tokens": 1.0,
    "gradient_norm": 1.0,
    "steps": 10.0,
    "skipped": 0.0,
}


def test_utilisation_is_the_models_flops_over_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 100.0)
    mesh = make_mesh(MeshConfig(replica=1, data=4, fsdp=1, tensor=2, context=1))
    assert share_of_peak(200, mesh) == pytest.approx(200 / 800)
    assert train_metrics(SUMS, 5.0, 0.1)["train/mfu"] == pytest.approx(0.2)


def test_of_a_cpu_nobody_says_the_peak():
    assert share_of_peak(1, one_device()) is None
    assert "train/mfu" not in train_metrics(SUMS, 5.0, None)


def test_the_count_is_that_of_the_model_whatever_the_backend():
    data = Dataset(BATCH.source, BATCH.target_out, len(BATCH.source))
    counts = {
        backend: step_flops(
            small_model(attention_backend=backend, remat=remat), small_recipe(), data
        )
        for backend, remat in (("einsum", "none"), ("splash", "none"), ("einsum", "full"))
    }
    assert len(set(counts.values())) == 1


def test_shared_heads_and_gates_change_the_formula_as_they_should():
    assert train_step_flops(**SIZES, kv_heads=2) == 3 * forward_flops(kv_heads=2)
    gated = train_step_flops(**SIZES, feed_forward="swiglu")
    assert gated == 3 * forward_flops(matrices=3, ff_width=40)  # 2/3 of 56, to a multiple of 8


def test_dropout_smoothing_and_averaging_cost_no_products():
    recipe = {"dropout": 0.1, "attention_dropout": 0.1, "label_smoothing": 0.1, "ema_decay": 0.9}
    assert train_step_flops(tuple(recipe.items()), **SIZES) == 3 * forward_flops()


def test_of_all_optimizers_muon_alone_has_products():
    params = {"w/kernel": jnp.ones((4, 3)), "table": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    for name in OPTIMIZERS:
        recipe = small_recipe(name=name)
        optimizer = recipe.make_optimizer(recipe.numbers)
        flops = matmul_flops(optimizer.update, params, optimizer.init(params), params)
        assert (flops > 0) == (name == "muon"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cost_of_a_step_is_known(architecture):
    """Muon's orthogonalisation comes on top of what the others cost."""
    adam = train_step_flops(architecture=architecture)
    assert train_step_flops((("name", "muon"),), architecture=architecture) > adam > 0


def test_the_compiler_counts_the_same_and_what_is_no_product_besides():
    """XLA's count has softmax, norms and the optimizer in it: here an eighth as much again."""
    model, recipe = small_model(width=128, ff_width=256, heads=4), small_recipe(name="sgd")
    state = jax.eval_shape(lambda seed: init_state(model, recipe, seed, {}), np.uint32(0))
    step = make_train_step(model, recipe)
    theirs = jax.jit(step).lower(state, BATCH).cost_analysis()["flops"]
    ours = matmul_flops(step, state, BATCH)
    assert ours < theirs < 1.2 * ours
