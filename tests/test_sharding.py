"""Eight simulated devices against one, and what is really split where."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from tests.helpers import VARIANTS, random_params, small_model, strings, training_of
from tests.test_training import initial, small_recipe
from transformer import evaluation
from transformer.data.batches import Dataset, make_batch
from transformer.data.ragged import Ragged
from transformer.data.rows import Pairs, alone, pack
from transformer.decoding import beam_search
from transformer.errors import UserError
from transformer.loss import cross_entropy
from transformer.model import flatten
from transformer.normalization import Statistic
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
    parameter_shardings,
    processor,
    replicated,
    spec,
)
from transformer.sharding import one_device as one_device_mesh
from transformer.training import (
    abstract_state,
    make_train_step,
    make_train_steps,
    zero_sums,
)

MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "all three": (2, 2, 2),
}
# data, fsdp, tensor, and context, which divides the lengths of DATA (10) or does not
LONG_MESHES = [((1, 1, 1), 2), ((1, 1, 1), 4), ((2, 1, 2), 2), ((1, 2, 1), 4), ((1, 1, 1), 8)]
TEXTS = ["abcd"[: 1 + i % 4] + "efghijkl"[i % 8 :] for i in range(24)]
BATCH = strings(*((text, text[::-1]) for text in TEXTS))
DATA = Dataset(BATCH.source, BATCH.target_out, 8)
CHANGES = {"heads": 8, "head_width": 4, "attention_bias": True, "layers": 2}
RECIPE = {"warmup_steps": 2, "dropout": 0.2, "attention_dropout": 0.1, "label_smoothing": 0.1}


def mesh_of(data, fsdp, tensor, replica=1, replicas=1, context=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    return make_mesh(MeshConfig(replica=replica, **sizes), replicas)


def train(sizes, steps=5, recipe=(), context=1, data=DATA, **changes):
    """The losses of each step, the final state and the validation loss, on a mesh."""
    model = small_model(**CHANGES | changes)
    knobs: dict[str, Any] = RECIPE | dict(recipe)
    recipe = small_recipe(**knobs)
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
        for _ in range(steps):
            state, sums = step(state, zero_sums(), data, jnp.int32(1))
            losses.append(float(sums["loss"] / sums["tokens"]))
        scores = jax.jit(partial(evaluation.score, model))(state.variables(), data)
        data = jax.device_put(DATA, replicated(mesh))  # one example a row, in any case
        decode = partial(evaluation.decode, model, length=6)
        decoded = jax.jit(decode)(state.variables(), data)
        beams = partial(beam_search, beam_size=3, length_penalty=0.6)
        beams = jax.jit(partial(decode, search=beams))(state.variables(), data)
    decoded = np.concatenate([decoded.tokens[:, None], beams.tokens], axis=1)
    return losses, state, float(scores.nll.sum()), decoded


@pytest.fixture(scope="module")
def one_device():
    return train((1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "context"), [*((sizes, 1) for sizes in MESHES.values()), *LONG_MESHES]
)
def test_a_mesh_gives_the_losses_of_one_device_dropout_included(sizes, context, one_device):
    losses, state, nll, decoded = train(sizes, context=context)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    np.testing.assert_allclose(nll, one_device[2], rtol=1e-4)
    np.testing.assert_array_equal(decoded, one_device[3])
    for name, value in state.params.items():
        if name.endswith("key/bias"):  # its gradient is 0 but for rounding, which Adam scales up
            continue
        np.testing.assert_allclose(value, one_device[1].params[name], atol=1e-3, err_msg=name)
    if context == 1:
        check_shards(sizes, state)


def check_shards(sizes, state):
    """Every dimension that a rule names is really split, in parameters and in both moments."""
    mesh, axes_of = mesh_of(*sizes), small_model(**CHANGES).axes
    moments = jax.tree.leaves(state.moments, is_leaf=lambda leaf: isinstance(leaf, dict))
    first, second = (each for each in moments if isinstance(each, dict))
    split = 0
    for name, axes in axes_of.items():
        ways = [mesh.shape[RULES[axis]] if RULES[axis] else 1 for axis in axes]
        for array in (state.params[name], first[name], second[name]):
            shapes = {shard.data.shape for shard in array.addressable_shards}
            expected = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
            assert shapes == {expected}, name
        split += np.prod(ways) > 1
    assert (split > len(axes_of) / 3) == (sizes != MESHES["data"])  # all matrices, or none


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_gives_on_a_mesh_what_it_gives_on_one_device(changes):
    """In training: the outputs, the statistics that batch norm sees, and the gradients."""
    model = small_model(**changes)
    variables, key = random_params(model, 0), jax.random.key(1)

    def outputs(variables, batch):
        module = model.bind(variables)
        logits = module(
            *(batch.source, batch.source_segments, batch.target_in, batch.target_segments),
            training=training_of(model, key),
        )
        seen = flatten(nnx.state(module, Statistic))
        return (cross_entropy(logits, batch.target_out) * batch.weights).sum(), (logits, seen)

    def on(mesh):
        where = parameter_shardings(mesh, model.shapes, model.axes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(variables, where)
            batch = jax.device_put(BATCH, NamedSharding(mesh, spec(("batch",))))
            result = jax.jit(jax.value_and_grad(outputs, has_aux=True))(placed, batch)
        return jax.device_get(result)

    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    if changes.get("heads") == 1:
        sizes |= {"data": 2, "tensor": 1}  # a single head cannot be split in two
    if "architecture" in changes:
        sizes = {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}  # others: see RunConfig
    one, other = on(one_device_mesh()), on(mesh_of(**sizes))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-4, atol=1e-4)


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


def test_what_looks_at_whole_arrays_and_batches_is_the_same_on_a_mesh():
    """Muon's orthogonal matrices, the statistics of batch norm, the average of parameters."""
    recipe = {"name": "muon", "ema_decay": 0.9}
    one, other = (
        train(sizes, 3, recipe, norm="batch", layers=1)
        for sizes in ((1, 1, 1), MESHES["all three"])
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[2], other[2], rtol=1e-5)


def test_packed_rows_split_along_their_length_give_the_losses_of_one_device():
    """Segments and positions are counted across the places where a row is cut."""
    pairs = Pairs(
        Ragged.unpadded(np.asarray(DATA.source)), Ragged.unpadded(np.asarray(DATA.target))
    )
    packed = Dataset.of(pack(alone(pairs), 21), DATA.batch_size)
    one, other = (train((1, 1, 1), 3, context=context, data=packed) for context in (1, 4))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5)
    assert len(packed) < len(DATA)


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
