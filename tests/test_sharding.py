"""Eight simulated devices against one, and what is really split where."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_model, strings
from tests.test_training import initial, small_recipe
from transformer import evaluation
from transformer.data.batches import Dataset, make_batch
from transformer.data.ragged import Ragged
from transformer.data.rows import Pairs, alone, pack
from transformer.decoding import beam_search
from transformer.errors import UserError
from transformer.loss import cross_entropy
from transformer.optimizer import OPTIMIZERS
from transformer.sharding import (
    RULES,
    MeshConfig,
    check_batch,
    check_memory,
    constrain,
    cores,
    describe,
    each_shard,
    make_mesh,
    processor,
    replicated,
)
from transformer.training import abstract_state, make_train_step, make_train_steps, zero_sums

TEXTS = ["abcd"[: 1 + i % 4] + "efghijkl"[i % 8 :] for i in range(24)]
BATCH = strings(*((text, text[::-1]) for text in TEXTS))
DATA = Dataset(BATCH.source, BATCH.target_out, 8)
PAIRS = Pairs(Ragged.unpadded(np.asarray(DATA.source)), Ragged.unpadded(np.asarray(DATA.target)))
CHANGES = {"heads": 8, "head_width": 4, "attention_bias": True}
RECIPE = {"warmup_steps": 2, "dropout": 0.2, "attention_dropout": 0.1, "label_smoothing": 0.1}

# Packed rows count segments and positions across the cuts of a row; Muon and batch norm look at
# whole matrices and batches.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], Dataset]] = {
    "plain": ({}, {}, DATA),
    "packed": ({}, {}, Dataset.of(pack(alone(PAIRS), 21), DATA.batch_size)),
    "muon": ({"norm": "batch"}, {"name": "muon", "ema_decay": 0.9}, DATA),
}
# data, fsdp, tensor, and context, which divides the lengths (10, packed 21) or does not
MESHES = [
    ("packed", (8, 1, 1), 1),
    ("packed", (2, 1, 2), 2),
    ("packed", (1, 2, 1), 4),
    ("muon", (2, 2, 2), 1),
]
SLOW_MESHES = [
    *(("plain", sizes, 1) for sizes in [(1, 8, 1), (1, 1, 8), (2, 2, 2)]),
    *(("plain", (1, 1, 1), context) for context in (2, 4, 8)),
    *(("plain", sizes, context) for sizes, context in [((2, 1, 2), 2), ((1, 2, 1), 4)]),
]


@pytest.fixture(autouse=True, scope="module")
def _compile_anew():
    """XLA 0.10's CPU client can deadlock in the collectives of a program loaded from the cache."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)  # nothing is written, so that nothing is loaded
    yield
    jax.config.update(name, before)


def mesh_of(data, fsdp, tensor, replica=1, replicas=1, context=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    return make_mesh(MeshConfig(replica=replica, **sizes), replicas)


@cache
def train(run, sizes=(1, 1, 1), context=1):
    """The losses of each step, the final state, the validation loss and outputs, on a mesh."""
    changes, knobs, data = RUNS[run]
    model, recipe = small_model(**CHANGES | changes), small_recipe(**RECIPE | knobs)
    mesh = mesh_of(*sizes, context=context)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, recipe, mesh))
    with jax.set_mesh(mesh):
        data = jax.device_put(data, replicated(mesh))
        init = jax.jit(initial(model, recipe), out_shardings=where)
        step = jax.jit(
            make_train_steps(make_train_step(model, recipe)),
            out_shardings=(where, replicated(mesh)),
        )
        state, losses = init(np.uint32(0)), []
        for _ in range(5):
            state, sums = step(state, zero_sums(), data, jnp.int32(1))
            sums = jax.device_get(sums)  # before the next program starts on the same threads
            losses.append(sums["loss"] / sums["tokens"])
        scores = jax.jit(partial(evaluation.score, model))(state.variables(), data)
        outputs = None
        if sizes[1] == 1 or run == "plain":
            data = jax.device_put(DATA, replicated(mesh))  # one example a row, in any case
            outputs = jax.jit(partial(decode, model))(state, data)
    return losses, state, float(scores.nll.sum()), outputs


def decode(model, state, data):
    """The outputs of greedy decoding and of beam search."""
    run = partial(evaluation.decode, model, state.variables(), data, 6)
    beams = partial(beam_search, beam_size=3, length_penalty=0.6)
    return run().tokens, run(search=beams).tokens


@pytest.mark.parametrize(
    ("run", "sizes", "context"),
    [*MESHES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_MESHES)],
)
def test_a_mesh_gives_the_losses_of_one_device_dropout_included(run, sizes, context):
    losses, state, nll, outputs = train(run, sizes, context)
    expected_losses, expected, expected_nll, expected_outputs = train(run)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5 if run == "muon" else 1e-4)
    for side, tokens in enumerate(outputs or ()):
        np.testing.assert_array_equal(tokens, expected_outputs[side])
    for name, value in state.params.items():
        if name.endswith("key/bias"):  # its gradient is 0 but for rounding, which Adam scales up
            continue
        np.testing.assert_allclose(value, expected.params[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_dimension_that_a_rule_names_is_split(sizes):
    """In parameters and in both of Adam's moments."""
    mesh, model = mesh_of(*sizes), small_model(**CHANGES)
    state = abstract_state(model, small_recipe(), mesh)
    moments = jax.tree.leaves(state.moments, is_leaf=lambda leaf: isinstance(leaf, dict))
    first, second = (each for each in moments if isinstance(each, dict))
    split = 0
    for name, axes in model.axes.items():
        ways = [mesh.shape[RULES[axis]] if RULES[axis] else 1 for axis in axes]
        for array in (state.params[name], first[name], second[name]):
            expected = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
            assert array.sharding.shard_shape(array.shape) == expected, name
        split += np.prod(ways) > 1
    assert (split > len(model.axes) / 3) == (sizes != (8, 1, 1))  # all matrices, or none


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_live_where_their_parameters_do(name):
    like = abstract_state(small_model(**CHANGES), small_recipe(name=name), mesh_of(1, 2, 2, 2, 2))
    beside = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(like.moments)[0]:
        param = like.params.get(getattr(path[-1], "key", None))
        if param is not None and leaf.shape == param.shape:
            assert leaf.sharding == param.sharding, path
            beside += 1
        else:  # a count, or an empty place
            assert leaf.sharding.is_fully_replicated, path
    assert beside >= len(like.params)


def test_context_divides_what_a_long_sequence_holds_on_a_device():
    """Bytes for the gradient at length 512: mostly scores, of whose queries each has a part."""
    model = small_model(width=8, heads=2, ff_width=8)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(params, tokens):
        batch = make_batch(tokens, tokens)
        logits = model.bind(params)(
            batch.source, batch.source_segments, batch.target_in, batch.target_segments
        )
        return (cross_entropy(logits, batch.target_out) * batch.weights).sum()

    def needed(context):
        mesh = mesh_of(1, 1, 1, context=context)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(model.shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, part = needed(1), needed(4)
    assert part < 0.3 * whole, (whole, part)


def test_every_matrix_is_split_over_fsdp_and_over_tensor():
    """No matrix of the model is left whole: its axes are named in the table."""
    for name, axes in small_model(position="learned", tie_embeddings=False).axes.items():
        ways = {RULES[axis] for axis in axes} - {None}
        if len(axes) > 1 and "position" not in axes:
            assert ways == {"fsdp", "tensor"}, name


def test_the_batch_is_split_over_data_and_fsdp():
    mesh = mesh_of(4, 2, 1)
    with jax.set_mesh(mesh):
        data = jax.device_put(DATA, replicated(mesh))
        batch = jax.jit(lambda data: data.batch(jax.random.key(0), jnp.int32(0)))(data)
    for tokens in (batch.source, batch.target_out):
        shapes = {shard.data.shape for shard in tokens.addressable_shards}
        assert shapes == {(1, tokens.shape[1])}


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((3, 3))
    assert constrain(x, "batch", "width") is x


def test_minus_one_takes_what_is_left():
    sizes = {"replica": 1, "data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert dict(mesh_of(-1, 2, 1).shape) == sizes
    kind = f"cpu ({processor()}, {cores()} cores)"
    assert describe(mesh_of(-1, 2, 1)) == f"8 × {kind}, mesh data 4, fsdp 2"
    assert processor()


@pytest.mark.parametrize(
    ("replicas", "sizes", "replica", "data"),
    [
        (4, (1, 1, 1), 4, 1),
        (4, (-1, 1, 1), 4, 2),
        (6, (-1, 1, 1), 2, 4),
        (3, (-1, 1, 1), 1, 8),
        (16, (-1, 1, 1), 8, 1),
        (16, (1, 2, 2), 2, 1),
        (16, (-1, 2, 2), 2, 1),
        (2, (-1, 2, 1), 2, 2),
    ],
)
def test_replicas_take_as_many_ways_as_divide_them_and_the_devices(replicas, sizes, replica, data):
    shape = mesh_of(*sizes, replica=-1, replicas=replicas).shape
    assert (shape["replica"], shape["data"]) == (replica, data)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 16), "needs 16 devices and there are 8 .*lower mesh.data"),
        ((16, 1, 1), "needs 16 devices and there are 8"),
        ((4, 1, 1, 4, 4), "needs 16 devices and there are 8"),
        ((1, 1, 1, 16, 16), "needs 16 devices and there are 8"),
        ((-1, 3, 1), "3 does not divide the 8 devices; set mesh.data"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "sizes are positive"),
        ((1, 1, 1, 2, 1), "mesh.replica=2 does not divide replicas=1; choose one that does"),
        ((1, 1, 1, 4, 6), "mesh.replica=4 does not divide replicas=6"),
        ((1, 1, 1, 0, 6), "mesh.replica=0 does not divide replicas=6"),
        ((1, 1, 1, -2, 6), "mesh.replica=-2 does not divide replicas=6"),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_of(*sizes)


def test_a_mesh_that_does_not_divide_the_heads_is_explained():
    message = r"mesh.tensor=8 does not divide the 2 of axis 'heads' in \S+/kernel"
    with pytest.raises(UserError, match=message):
        abstract_state(small_model(), small_recipe(), mesh_of(1, 1, 8))


def test_what_memory_cannot_hold_is_refused(monkeypatch):
    state = abstract_state(small_model(), small_recipe(), mesh_of(1, 8, 1))
    size = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(state))
    check_memory(state)
    monkeypatch.setattr("transformer.sharding.memory", lambda: size / 2)  # most is split over 8
    check_memory(state)
    monkeypatch.setattr("transformer.sharding.memory", lambda: size / 9)
    with pytest.raises(UserError, match=r"take 0\.0 GiB of a device .* mesh.fsdp"):
        check_memory(state)


@pytest.mark.parametrize("replica", [1, 2])
def test_a_kernel_is_given_parts_that_no_axis_splits_further(replica):
    """Pallas' are refused on a TPU where one might; also inside of a population's vmap."""
    seen = []

    def kernel(x):
        seen.append((x.shape, jax.sharding.get_abstract_mesh().auto_axes))
        return 2.0 * x

    def call(x):
        axes = ("batch", "heads", "length", "head")
        return each_shard(kernel, (axes,), axes)(x)

    mesh = mesh_of(2, 1, 2, replica=replica, replicas=replica)
    x = jnp.arange(2.0 * 4 * 4 * 3 * 5).reshape(2, 4, 4, 3, 5)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.vmap(call, spmd_axis_name="replica"))(x)
    np.testing.assert_array_equal(found, 2.0 * x)
    assert all(auto == () for _, auto in seen)
    assert seen[-1][0][-4:] == (2, 2, 3, 5)


def test_a_batch_that_does_not_divide_is_explained():
    check_batch(mesh_of(2, 4, 1), 16)
    check_batch(mesh_of(1, 1, 1, 8, 8), 3)  # each replica has a batch of its own
    with pytest.raises(UserError, match=r"batch_size=12 does not divide .* multiple of 8"):
        check_batch(mesh_of(2, 4, 1), 12)
