"""Our modules in anyone's Flax code: Flax's own modules are the oracles, its tools work on ours."""

import inspect
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import transformer
from transformer import DecoderLayer, EncoderLayer, FeedForward, LayerNorm, MultiHeadAttention
from transformer.modules.normalization import NORMS
from transformer.modules.positions import POSITIONS
from transformer.parallel.mesh import RULES

B, T, S, D = 3, 5, 7, 16
NEAR = {"rtol": 1e-5, "atol": 1e-5}
TOOLS = {"constant": nnx.initializers.constant(0.5), "normal": nnx.initializers.normal(0.3)}


def inputs(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


def both(name, args, options):
    """Flax's module and ours of the same arguments, with the same random state."""
    decode = {"decode": False} if name == "MultiHeadAttention" else {}  # Flax's alone has it
    theirs = getattr(nnx, name)(*args, **options, **decode, rngs=nnx.Rngs(0))
    pair = theirs, getattr(transformer, name)(*args, **options, rngs=nnx.Rngs(0))
    states = [nnx.state(each) for each in pair]
    rng = np.random.default_rng(1)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray((1.0 + 0.3 * noise if leaf.ndim == 1 else noise * 0.3), leaf.dtype)

    drawn = jax.tree.map(draw, nnx.to_pure_dict(states[0]))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, nnx.to_pure_dict(states[1]))
    for module, state in zip(pair, states, strict=True):
        nnx.replace_by_pure_dict(state, drawn)
        nnx.update(module, state)
    return pair


def compare(pair, args, call=lambda module, *args, **options: module(*args, **options), **options):
    """Outputs, and gradients of their sine by parameters and floating inputs, are Flax's."""

    def outputs(module):
        structure, params, rest = nnx.split(module, nnx.Param, ...)

        def loss(params, args):
            out = call(nnx.merge(structure, params, rest, copy=True), *args, **options)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))
        gradients, out = gradient(params, args)
        return out, nnx.to_pure_dict(gradients[0]), gradients[1]

    def near(theirs, ours):
        assert theirs.dtype == ours.dtype
        if theirs.dtype != jax.dtypes.float0:
            loose = jnp.bfloat16 in (theirs.dtype, results[0][0].dtype)
            wide = (np.asarray(each.astype(jnp.float32)) for each in (ours, theirs))
            np.testing.assert_allclose(*wide, **({"rtol": 0.1, "atol": 0.1} if loose else NEAR))

    results = [outputs(module) for module in pair]
    jax.tree.map(near, *results)


CAUSAL = nnx.make_causal_mask(jnp.ones((B, T)))  # float32, as Flax makes it
PADDING = jnp.arange(S) < jnp.array([3, 7, 5])[:, None, None, None]
HEADS = jax.random.bernoulli(jax.random.key(3), 0.7, (B, 4, T, T)).at[..., 0].set(True)
ATTENTION = [
    ({}, {}),
    ({}, {"mask": CAUSAL}),
    ({}, {"mask": HEADS}),
    ({}, {"is_causal": True}),
    ({}, {"is_causal": True, "mask": HEADS}),
    ({"use_bias": False}, {}),
    ({"num_kv_heads": 2}, {"mask": CAUSAL}),
    ({"num_kv_heads": 1, "normalize_qk": True}, {}),
    ({"normalize_qk": True, "qkv_features": 24, "out_features": 10}, {"mask": HEADS}),
    ({"dropout_rate": 0.5, "deterministic": True}, {}),
    ({"dropout_rate": 0.5}, {"deterministic": True}),
    ({"dropout_rate": 0.5, "deterministic": False}, {"deterministic": True}),
    ({"kernel_init": TOOLS["normal"], "bias_init": TOOLS["constant"]}, {}),
    ({"dtype": jnp.bfloat16}, {"mask": CAUSAL}),
    ({"dtype": jnp.float32, "param_dtype": jnp.bfloat16}, {"is_causal": True}),
]


@pytest.mark.parametrize(("made", "called"), ATTENTION)
def test_attention_is_flaxs(made, called):
    with jax.numpy_dtype_promotion("standard"):
        compare(both("MultiHeadAttention", (4, D), made), [inputs(B, T, D)], **called)


@pytest.mark.parametrize("sequences", [2, 3])
@pytest.mark.parametrize("batch", [(), (B,), (2, B)])
def test_attention_to_other_sequences_is_flaxs_whatever_the_batch_axes(batch, sequences):
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = (T, S, S)[:sequences]
    args = [jax.random.normal(k, (*batch, n, D)) for k, n in zip(keys, lengths, strict=False)]
    mask = jnp.broadcast_to(PADDING[0], (*batch, 1, T, S)) if batch != (B,) else PADDING
    compare(both("MultiHeadAttention", (4, D), {}), args, mask=mask)


OTHERS = [
    ("LayerNorm", {}),
    ("LayerNorm", {"use_bias": False, "epsilon": 0.1}),
    ("LayerNorm", {"use_scale": False, "bias_init": TOOLS["normal"]}),
    ("LayerNorm", {"dtype": jnp.bfloat16}),
    ("RMSNorm", {"scale_init": TOOLS["normal"], "epsilon": 0.1}),
    ("RMSNorm", {"use_scale": False, "param_dtype": jnp.bfloat16}),
    ("BatchNorm", {}),
    ("BatchNorm", {"use_running_average": True, "epsilon": 0.1}),
    ("BatchNorm", {"use_bias": False, "momentum": 0.5}),
    ("Linear", {}),
    ("Linear", {"use_bias": False, "kernel_init": TOOLS["constant"]}),
    ("Linear", {"dtype": jnp.bfloat16, "dot_general": jax.lax.dot_general}),
    ("Linear", {"precision": "highest", "param_dtype": jnp.bfloat16}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_norms_and_linear_are_flaxs(name, options):
    args = (D, 6) if name == "Linear" else (D,)
    with jax.numpy_dtype_promotion("standard"):
        compare(both(name, args, options), [inputs(B, T, D)])


@pytest.mark.parametrize("options", [{}, {"embedding_init": TOOLS["normal"]}])
def test_embed_is_flaxs(options):
    pair = both("Embed", (11, D), options)
    compare(pair, [jnp.arange(B * T).reshape(B, T) % 11])
    compare(pair, [inputs(B, T, D)], lambda module, x: module.attend(x))


def test_masked_batch_norm_is_flaxs_but_for_the_unbiased_running_variance():
    theirs, ours = both("BatchNorm", (D,), {})
    before, x = np.asarray(ours.var[...]), inputs(B, T, D)
    mask = jnp.arange(T)[None, :, None] < jnp.array([2, 5, 3])[:, None, None]
    compare((theirs, ours), [x], lambda norm, x: jnp.where(mask, norm(x, mask=mask), 0.0))
    for norm in (theirs, ours):
        norm(x, mask=mask)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], **NEAR)
    change = (theirs.var[...] - 0.99 * before) * 10 / 9
    np.testing.assert_allclose(ours.var[...] - 0.99 * before, change, **NEAR)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "LayerNorm", "RMSNorm", "Embed", "Linear"])
def test_arguments_are_flaxs_and_unknown_ones_a_type_error(name):
    parameters = [inspect.signature(getattr(home, name)).parameters for home in (transformer, nnx)]
    ours, theirs = parameters
    for key in ours.keys() & theirs.keys() - {"options"}:
        assert ours[key].kind == theirs[key].kind, key
        if isinstance(theirs[key].default, int | float | str | bool | None):
            assert ours[key].default == theirs[key].default, key
    args = {"Embed": (4, D), "Linear": (D, D), "MultiHeadAttention": (4, D)}.get(name, (D,))
    for unknown in ("gain", "axis_name", "batch_axis", "decode"):
        with pytest.raises(TypeError):
            getattr(transformer, name)(*args, rngs=nnx.Rngs(0), **{unknown: None})
    if name == "MultiHeadAttention":
        with pytest.raises(TypeError):
            MultiHeadAttention(4, D, rngs=nnx.Rngs(0))(inputs(B, T, D), decode=True)
        for sizes in ((3, D), (4, D, 10)):
            with pytest.raises(ValueError, match="does not divide"):
                MultiHeadAttention(*sizes, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"8 features, not {D}"):
            MultiHeadAttention(4, D, rngs=nnx.Rngs(0))(inputs(B, T, 8))


@pytest.mark.parametrize("name", ["MultiHeadAttention", "Linear"])
def test_a_module_works_under_a_users_own_mesh(name):
    module = getattr(transformer, name)(
        4 if name == "MultiHeadAttention" else D, D, rngs=nnx.Rngs(0)
    )
    x = inputs(4, T, D)
    expected, auto = module(x), (AxisType.Auto, AxisType.Auto)
    own = jax.make_mesh((2, 2), ("data", "model"), auto, devices=jax.devices()[:4])
    with jax.set_mesh(own):
        sharded = jax.device_put(x, NamedSharding(own, PartitionSpec("data", None, "model")))
        np.testing.assert_allclose(jax.jit(lambda x: module(x))(sharded), expected, **NEAR)


class Classifier(nnx.Module):
    """What a Flax user writes without having read our sources."""

    def __init__(self, vocabulary, classes, *, rngs):
        self.embed = nnx.Embed(vocabulary, 32, rngs=rngs)
        self.position = transformer.Sinusoidal(32)
        self.attention = MultiHeadAttention(4, 32, dropout_rate=0.1, deterministic=False, rngs=rngs)
        self.norm = LayerNorm(32, rngs=rngs)
        self.feed_forward = FeedForward(32, 64, rngs=rngs)
        self.layer = EncoderLayer(32, 4, 64, dropout_rate=0.1, norm="batch", rngs=rngs)
        self.head = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.position(self.embed(tokens)), (tokens != 0)[:, None, None, :]
        x = x + self.attention(self.norm(x), mask=mask)
        x = x + self.feed_forward(x)
        return self.head(self.layer(x, mask=mask).mean(1))


def test_a_classifier_of_our_parts_trains():
    model = Classifier(12, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    tokens = jax.random.randint(jax.random.key(0), (64, 8), 1, 12)
    labels = (tokens == 3).any(1).astype(jnp.int32)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    model.train()
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam relies on it
        losses = [float(train_step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    training = [model(tokens) for _ in range(2)]
    assert (training[0] != training[1]).any()
    evaluated = nnx.view(model, deterministic=True, use_running_average=True)(tokens)
    model.eval()
    np.testing.assert_allclose(model(tokens), evaluated, **NEAR)
    np.testing.assert_array_equal(model(tokens), model(tokens))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    np.testing.assert_allclose(nnx.merge(graph, params, rest)(tokens), evaluated, **NEAR)
    kinds = {type(leaf) for _, leaf in nnx.to_flat_state(rest)}
    assert kinds == {nnx.BatchStat, nnx.RngKey, nnx.RngCount}


@pytest.mark.parametrize("norm", NORMS)
def test_layers_stacks_and_positions_work_alone(norm):
    rngs, x, memory = nnx.Rngs(0), inputs(B, T, D), inputs(B, S, D)
    options = {"norm": norm, "dropout_rate": 0.2, "rngs": rngs}
    encoder = transformer.Encoder(2, D, 4, 32, **options)
    decoder = transformer.Decoder(2, D, 4, 32, **options)
    layer = DecoderLayer(D, 4, 32, **options)
    for name, position in POSITIONS.items():
        assert position(D, rngs=rngs)(x).shape == x.shape, name
        with pytest.raises(TypeError):
            position(D, heads=4, rngs=rngs)
    mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
    for module, args in ((encoder, (x,)), (decoder, (x, memory)), (layer, (x, memory))):
        with pytest.raises(TypeError):
            type(module)(2, D, 4, placement="post", rngs=rngs)
        one, other = (module(*args, mask=mask) for _ in range(2))
        assert one.shape == x.shape
        assert (one != other).any()
        same = (module(*args, mask=mask, rngs=nnx.Rngs(1)) for _ in range(2))
        np.testing.assert_array_equal(*same)
        module.eval()
        np.testing.assert_array_equal(*(module(*args, mask=mask) for _ in range(2)))


def test_a_transformer_is_a_module_with_partition_specs():
    config = transformer.ModelConfig(d_model=D, d_ff=32, dropout_rate=0.1)
    model = transformer.Transformer(config, 30, rngs=nnx.Rngs(0))
    source = jnp.arange(B * S).reshape(B, S) % 29 + 1
    logits = nnx.jit(lambda model, source: model(source, source))(model, source)
    assert logits.shape == (B, S, 30)
    assert (model(source, source) != logits).any()
    np.testing.assert_array_equal(*(nnx.view(model, deterministic=True)(source, source),) * 2)
    specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
    kernel = specs["encoder"]["layers"][0]["self_attention"]["query"]["kernel"]
    assert kernel.get_value() == jax.P("embed", "heads", "head")
    with nnx.logical_axis_rules(tuple(RULES.items())):
        specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
    assert specs["embedding"]["embedding"].get_value() == jax.P("tensor", "fsdp")
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model", None))
    with nnx.use_eager_sharding(False):
        own = transformer.Linear(D, (4, 4), kernel_init=init, rngs=nnx.Rngs(0))
    spec = nnx.get_partition_spec(nnx.state(own))["kernel"].get_value()
    assert spec == jax.P(None, "model", None)


def test_every_public_module_can_be_imported_from_the_package():
    names = [*itertools.chain(*transformer.PUBLIC.values())]
    assert set(dir(transformer)) == {"load", "config_of", *names}
    for name in names:
        assert getattr(transformer, name).__name__ == name
    with pytest.raises(AttributeError):
        transformer.Nothing  # noqa: B018
    assert flax.__version__ >= "0.12"
