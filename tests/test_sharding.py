"""Eight simulated devices against one, and what is really split where."""

import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import TOKENIZER, logits_of, refused, small_model, strings
from tests.test_training import initial, small_config
from transformer.data.batches import Dataset, make_batch
from transformer.data.corpus import Tokenizers
from transformer.data.packing import pack_rows, unpacked_rows
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dot_product_attention import SHORT_MASK_BACKENDS
from transformer.modules.masking import Mask
from transformer.parallel import mesh
from transformer.parallel.mesh import RULES, constrain, describe_mesh, replicated
from transformer.training.metrics import zero_sums
from transformer.training.optimizer import OPTIMIZERS
from transformer.training.step import abstract_state, make_train_step, make_train_steps

TEXTS = ["abcd"[: 1 + i % 4] + "efghijkl"[i % 8 :] for i in range(24)]
BATCH = strings(*((text, text[::-1]) for text in TEXTS))
DATA = Dataset(BATCH.source, BATCH.target_out, 8)
PAIRS = Tokenizers(TOKENIZER, TOKENIZER).encode(TEXTS, [text[::-1] for text in TEXTS])
PACKED = Dataset.from_rows(pack_rows(unpacked_rows(PAIRS), 21), 8)
CHANGES = {"num_heads": 8, "d_k": 4, "attention_bias": True}
STEP_CONFIG = {"warmup_steps": 2, "dropout_rate": 0.2}
STEP_CONFIG |= {"attention_dropout_rate": 0.1, "label_smoothing": 0.1}

# Packed rows count segments and positions across the cuts of a row; batch norm and Muon look at
# whole batches and matrices.
RUNS: Any = {
    "plain": ({}, {}, DATA),
    "packed": ({"norm": "batch"}, {"ema_decay": 0.9}, PACKED),
    "muon": ({"norm": "batch"}, {"name": "muon"}, DATA),
}
# data, fsdp, tensor, and context, which divides the lengths (10, packed 21) or does not
MESHES = [("packed", (2, 1, 2), 2)]
SLOW = [("packed", (8, 1, 1), 1), ("muon", (2, 2, 2), 1), ("plain", (1, 1, 1), 8)]
SLOW += [("packed", (1, 2, 1), 4)]
SLOW += [("plain", (1, 8, 1), 1), ("plain", (1, 1, 8), 1), ("plain", (2, 2, 2), 1)]
MESHES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def mesh_of(data, fsdp, tensor, replica=1, replicas=1, context=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    return mesh.make_mesh(mesh.MeshConfig(replica=replica, **sizes), replicas)


@cache
def train(run, sizes=(1, 1, 1), context=1):
    """The losses of each step, the last state, the validation loss and outputs."""
    changes, knobs, data = RUNS[run]
    model, config = small_model(**CHANGES | changes), small_config(**STEP_CONFIG | knobs)
    mesh = mesh_of(*sizes, context=context)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))
    with jax.set_mesh(mesh):
        data = jax.device_put(data, replicated(mesh))
        init = jax.jit(initial(model, config), out_shardings=where)
        steps = make_train_steps(make_train_step(model, config))
        step = jax.jit(steps, out_shardings=(where, replicated(mesh)))
        state, losses, outputs = init(np.uint32(0)), [], ()
        for _ in range(5):
            state, sums = step(state, zero_sums(), data, jnp.int32(1))
            sums = jax.device_get(sums)  # before the next program starts on the same threads
            losses.append(sums["train/objective"] / sums["tokens"])
        scores = jax.jit(partial(evaluation.score, model))(state.variables(), data)
        if sizes[1] == 1 or run == "plain":
            source = jax.device_put(DATA.source, replicated(mesh))  # one example a row, in any case
            outputs = jax.jit(partial(decode, model))(state.variables(), source)
    return losses, state, float(scores["nll"].sum()), outputs


def decode(model, *variables_and_source):  # greedily, and by beam search
    run = partial(evaluation.decode, model, *variables_and_source, max_length=6)
    options = {"beam_size": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 1.2}
    return run().tokens, run(None, jnp.array([7]), DecodingConfig(**options)).tokens


@pytest.mark.parametrize(("run", "sizes", "context"), MESHES)
def test_a_mesh_gives_the_losses_of_one_device_dropout_included(run, sizes, context):
    losses, state, nll, outputs = train(run, sizes, context)
    expected_losses, expected, expected_nll, expected_outputs = train(run)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5 if run == "muon" else 1e-4)
    jax.tree.map(np.testing.assert_array_equal, outputs, outputs and expected_outputs)
    for name, value in state.params.items():
        if not name.endswith("key/bias"):  # of no gradient but rounding, which Adam scales up
            np.testing.assert_allclose(value, expected.params[name], atol=1e-3, err_msg=name)


# Every backend that runs here, for 4 query heads: backend x mesh, backend x key heads, backend x
# mask and mesh x key heads, each pair once or more; the full product is slow.
BACKENDS = ["einsum", "xla", "chunked", "splash"]
SPLITS: Any = [(1, 1, 1), (8, 1, 1), (2, 1, 4), (2, 1, 1, 1, 1, 4)]  # the last over the context
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 20], np.int32).repeat(4, 0)
SHORT_MASKS: Any = {"padding": {}, "packed": {}, "causal": {"causal": True}}
SHORT_MASKS["window"] = {"causal": True, "window": 3}
GRID = list(itertools.product(range(4), range(4), range(3), range(4)))
PAIRWISE = [(b, m, (b + m + 2) % 3, (b + m) % 4) for b, m, k, s in GRID if k == s == 0]
GRID = PAIRWISE + [pytest.param(*c, marks=pytest.mark.slow) for c in GRID if c not in PAIRWISE]


@cache
def attended(backend, split, kv_heads, mask):
    """The output of multi-head attention and the gradients of its parameters and inputs."""
    rng, queries = np.random.default_rng(0), jnp.asarray(SEGMENTS)
    keys = (queries > 0).astype(jnp.int32)[:, :13] if mask == "padding" else queries
    mask = Mask(queries, keys, **SHORT_MASKS[mask])
    x, y = (jnp.asarray(rng.normal(size=(8, n, 16)), jnp.float32) for n in (20, mask.keys.shape[1]))
    with jax.set_mesh(mesh_of(*split)):
        module = MultiHeadAttention(4, 16, num_kv_heads=kv_heads, backend=backend, rngs=nnx.Rngs(0))
        structure, state = nnx.split(module)
        taken = mask if backend in SHORT_MASK_BACKENDS else mask.array()

        def loss(state, x, y):
            module = nnx.merge(structure, state)
            out = module(x, y, mask=taken)
            return jnp.sin(out + 1.0).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(state, x, y)


@pytest.mark.parametrize(("backend", "split", "kv", "mask"), GRID)
def test_attention_on_a_mesh_is_the_reference_on_one_device(backend, split, kv, mask, monkeypatch):
    monkeypatch.setattr("transformer.modules.dot_product_attention.CHUNK", 8)
    rest = [4, 2, 1][kv], list(SHORT_MASKS)[mask]
    mine = attended(BACKENDS[backend], SPLITS[split], *rest)
    check = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(check, mine, attended("einsum", SPLITS[0], *rest))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_dimension_that_a_rule_names_is_split(sizes):
    mesh, model = mesh_of(*sizes), small_model(**CHANGES)
    params, split = abstract_state(model, small_config(), mesh).params, 0
    for name, axes in model.axes.items():
        ways = [mesh.shape[RULES[axis]] if RULES[axis] else 1 for axis in axes]
        whole, part = params[name].shape, params[name].sharding.shard_shape(params[name].shape)
        assert [size // way for size, way in zip(whole, ways, strict=True)] == [*part], name
        split += np.prod(ways) > 1
    assert (split > len(model.axes) / 3) == (sizes != (8, 1, 1))  # all matrices, or none
    for name, axes in small_model(position_encoding="learned", tie_embeddings="none").axes.items():
        if len(axes) > 1 and "position" not in axes:
            assert {RULES[axis] for axis in axes} - {None} == {"fsdp", "tensor"}, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_live_where_their_parameters_do(name):
    like = abstract_state(small_model(**CHANGES), small_config(name=name), mesh_of(1, 2, 2, 2, 2))
    beside = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(like.opt_state):
        param = like.params.get(getattr(path[-1], "key", None))
        if param is not None and leaf.shape == param.shape:
            assert leaf.sharding == param.sharding, path
            beside += 1
        else:  # a count, or an empty place
            assert leaf.sharding.is_fully_replicated, path
    assert beside >= len(like.params)


def test_context_divides_the_memory_of_a_long_sequence():
    model = small_model(d_model=8, num_heads=2, d_ff=8)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(params, tokens):
        return jnp.square(logits_of(model, params, make_batch(tokens, tokens))).sum()

    def needed(context):
        with jax.set_mesh(mesh_of(1, 1, 1, context=context)):
            compiled = jax.jit(jax.grad(loss)).lower(model.shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(4) < 0.3 * needed(1)


def test_minus_one_takes_what_is_left_and_the_batch_is_split_over_data_and_fsdp():
    eight = mesh_of(-1, 2, 1)
    kind = f"cpu ({mesh.cpu_name()}, {mesh.cpu_cores()} cores)"
    assert describe_mesh(eight) == f"8 × {kind}, mesh data 4, fsdp 2"
    with jax.set_mesh(eight):
        data = jax.device_put(DATA, replicated(eight))
        batch = jax.jit(lambda data: data.batch(jax.random.key(0), jnp.int32(0)))(data)
    for tokens in (batch.source, batch.target_out):
        assert tokens.sharding.shard_shape(tokens.shape) == (1, tokens.shape[1])
    assert constrain(batch.source, "batch", "length") is batch.source  # without a mesh


def test_replicas_take_as_many_ways_as_divide_them_and_the_devices():
    expected = {4: ((1, 1, 1), 4, 1), 6: ((-1, 1, 1), 2, 4), 3: ((-1, 1, 1), 1, 8)}
    expected |= {2: ((-1, 2, 1), 2, 2), 16: ((-1, 1, 1), 8, 1), 32: ((-1, 2, 2), 2, 1)}
    for replicas, (sizes, replica, data) in expected.items():
        shape = mesh_of(*sizes, replica=-1, replicas=replicas).shape
        assert (shape["replica"], shape["data"]) == (replica, data), replicas


UNFIT = {
    (-1, 1, 16): "needs 16 devices and there are 8 .*lower mesh.data",
    (-1, 3, 1): "3 does not divide the 8 devices; set mesh.data",
    (-1, -1, 1): "at most one is -1",
    (0, 1, 1): "sizes are positive",
    (1, 1, 1, 2, 1): "mesh.replica=2 does not divide replicas=1; try -1",
    (1, 1, 1, 0, 6): "mesh.replica=0 does not divide replicas=6",
}


@pytest.mark.parametrize("sizes", UNFIT)
def test_a_mesh_that_does_not_fit_is_explained(sizes):
    refused(UNFIT[sizes], mesh_of, *sizes)


def test_what_a_mesh_does_not_divide_is_explained():
    message = r"mesh.tensor=8 does not divide the 2 of axis 'heads' in \S+/kernel"
    refused(message, abstract_state, small_model(), small_config(), mesh_of(1, 1, 8))
    shapes, both = {"table": jax.ShapeDtypeStruct((6, 3), "float32")}, {"table": ("batch", "head")}
    found = mesh.parameter_shardings(mesh_of(1, 2, 1), shapes, both)["table"]
    assert found.shard_shape((6, 3)) == (3, 3)
    message = "mesh.data × mesh.fsdp=4 does not divide the 6 of axis"
    refused(message, mesh.parameter_shardings, mesh_of(2, 2, 1), shapes, both)
    mesh.check_batch(mesh_of(2, 4, 1), 16)
    mesh.check_batch(mesh_of(1, 1, 1, 8, 8), 3)  # each replica has a batch of its own
    refused("batch_size=12 .* a multiple of 8", mesh.check_batch, mesh_of(2, 4, 1), 12)


def test_what_memory_cannot_hold_is_refused(monkeypatch):
    state = abstract_state(small_model(), small_config(), mesh_of(1, 8, 1))
    size = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(state))
    mesh.check_memory(state)
    monkeypatch.setattr(mesh, "device_memory", lambda: size / 2)  # most is split over 8
    mesh.check_memory(state)
    monkeypatch.setattr(mesh, "device_memory", lambda: size / 9)
    refused(r"take 0\.0 GiB of a device .* mesh.fsdp", mesh.check_memory, state)


@pytest.mark.parametrize("replica", [1, 2])
def test_a_kernel_is_given_parts_that_no_axis_splits_further(replica):
    """Pallas' are refused on a TPU where one might; also inside of a population's vmap."""
    seen, axes = [], ("batch", "heads", "length", "head")

    def kernel(x):
        seen.append((x.shape[-4:], jax.sharding.get_abstract_mesh().auto_axes))
        return 2.0 * x

    x = jnp.arange(2.0 * 4 * 4 * 3 * 5).reshape(2, 4, 4, 3, 5)
    with jax.set_mesh(mesh_of(2, 1, 2, replica=replica, replicas=replica)):
        call = jax.vmap(mesh.shard_by_rules(kernel, (axes,), axes), spmd_axis_name="replica")
        np.testing.assert_array_equal(jax.jit(call)(x), 2.0 * x)
    assert set(seen) == {((2, 2, 3, 5), ())}
