"""The model against PyTorch's modules with the same weights: forward and gradients, float32.

Differences are in units of the largest number of the array compared; a parameter's gradients,
where none of them reaches 1, are compared as they are. Largest seen on a CPU: outputs 2.3e-7,
gradients 3.9e-6; allowed: 2e-6 and 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.modules import masking
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.cells import GRU, LSTM
from transformer.modules.layers import DecoderLayer
from transformer.modules.normalization import BatchNorm, LayerNorm
from transformer.modules.stacks import Decoder, Encoder

B, S, T, D, N, F = 3, 7, 6, 16, 4, 32
FLOAT32 = jnp.dtype("float32")
PLACEMENTS = pytest.mark.parametrize("placement", ["pre", "post"])
pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True, scope="module")
def _import_torch():
    """Imports PyTorch, which takes seconds, where a test runs, not where tests are collected."""
    global torch
    why = "PyTorch is the oracle: pip install '.[oracle]' to run these"
    torch = pytest.importorskip("torch", reason=why)


def of_placement(placement):
    return {"norm_placement": placement, "norm_epsilon": 1e-5, "rngs": nnx.Rngs(0)}  # PyTorch's


@pytest.fixture
def arrays(rng):
    """Inputs of every kind, and masks with padding and, for the target, causality."""
    valid = np.array([[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 1, 0, 0, 0, 0]], bool)
    target_valid = np.array([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    return {
        "source": rng.normal(size=(B, S, D)).astype(np.float32),
        "target": rng.normal(size=(B, T, D)).astype(np.float32),
        "valid": valid,
        "target_valid": target_valid,
        "mask": masking.padding(jnp.asarray(valid)),
        "target_mask": masking.causal(T) & masking.padding(jnp.asarray(target_valid)),
        "memory_mask": jnp.broadcast_to(masking.padding(jnp.asarray(valid)), (B, 1, T, S)),
    }


def randomize(module, rng):
    """Every PyTorch parameter random, biases and gains too."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            values = rng.normal(size=tuple(parameter.shape)) * scale
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return module.eval()


def array(tensor):
    return np.asarray(tensor.detach().numpy())


# From a PyTorch module to {path: array} of ours; gradients are carried over alike.


def of_linear(module, get):
    return {("kernel",): get(module.weight).T, ("bias",): get(module.bias)}


def of_norm(module, get):
    return {("scale",): get(module.weight), ("bias",): get(module.bias)}


def of_batch_norm(module, get):
    statistics = {("mean",): get(module.running_mean), ("var",): get(module.running_var)}
    return of_norm(module, get) | statistics


def of_attention(module, get):
    paths, head, in_weight = {}, D // N, get(module.in_proj_weight)
    in_bias = get(module.in_proj_bias)
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(i * D, (i + 1) * D)
        paths[name, "kernel"] = in_weight[rows].T.reshape(D, N, head)
        paths[name, "bias"] = in_bias[rows].reshape(N, head)
    paths["out", "kernel"] = get(module.out_proj.weight).T.reshape(N, head, D)
    return paths | {("out", "bias"): get(module.out_proj.bias)}


def under(prefix, paths):
    return {(*prefix, *path): value for path, value in paths.items()}


def of_layer(module, get):
    paths = under(("self_attention",), of_attention(module.self_attn, get))
    norms = [module.norm1, module.norm2]
    if hasattr(module, "multihead_attn"):
        paths |= under(("cross_attention",), of_attention(module.multihead_attn, get))
        norms.append(module.norm3)
    paths |= under(("feed_forward", "expand"), of_linear(module.linear1, get))
    paths |= under(("feed_forward", "contract"), of_linear(module.linear2, get))
    for i, norm in enumerate(norms):
        paths |= under(("residuals", i, "norm"), of_norm(norm, get))
    return paths


def of_stacks(module, get):
    paths = {}
    for side in ("encoder", "decoder"):
        stack = getattr(module, side)
        for i, layer in enumerate(stack.layers):
            paths |= under((side, "layers", i), of_layer(layer, get))
        if stack.norm is not None:
            paths |= under((side, "final_norm"), of_norm(stack.norm, get))
    return paths


def load(module, paths):
    """Our module with these weights; every parameter must be given, with its shape."""
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    assert flat.keys() == paths.keys()
    for path, value in paths.items():
        assert flat[path].shape == value.shape, path
    return graph, {path: jnp.asarray(value) for path, value in paths.items()}


def compare(ours, theirs, tolerance):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * np.abs(other).max())


def check(module, of_module, torch_module, call, torch_call, inputs):
    """Outputs, and gradients of sum(sin(output)) by every parameter and input."""
    graph, params = load(module, of_module(torch_module, array))

    def loss(params, inputs):
        bound = nnx.merge(graph, nnx.traversals.unflatten_mapping(params))
        out = call(bound, *inputs)
        return jnp.sin(out).sum(), out

    gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, out = gradient_of(params, [jnp.asarray(each) for each in inputs])

    tensors = [torch.tensor(each, requires_grad=True) for each in inputs]
    torch_out = torch_call(torch_module, *tensors)
    torch.sin(torch_out).sum().backward()

    def gradient_there(leaf):
        """What is no parameter in PyTorch has no gradient there, and must have none here."""
        return np.zeros(leaf.shape, np.float32) if leaf.grad is None else array(leaf.grad)

    compare(out, array(torch_out), 2e-6)
    for path, expected in of_module(torch_module, gradient_there).items():
        near = {"rtol": 0, "atol": 2e-5 * max(np.abs(expected).max(), 1.0)}
        np.testing.assert_allclose(gradients[0][path], expected, **near, err_msg=str(path))
    compare(gradients[1], [array(tensor.grad) for tensor in tensors], 2e-5)


def test_layer_norm(arrays, rng):
    theirs = randomize(torch.nn.LayerNorm(D), rng)
    ours = LayerNorm(D, epsilon=theirs.eps, rngs=nnx.Rngs(0))
    check(ours, of_norm, theirs, lambda m, x: m(x), lambda m, x: m(x), [arrays["source"]])


def test_batch_norm_in_training_and_in_evaluation(arrays, rng):
    """PyTorch sees the tokens alone, ours the batch and where its padding is."""
    theirs = randomize(torch.nn.BatchNorm1d(D, eps=1e-5, momentum=0.1), rng).train()
    ours = BatchNorm(D, momentum=0.9, rngs=nnx.Rngs(0))
    ours.scale[...], ours.bias[...] = (jnp.asarray(array(p)) for p in theirs.parameters())
    valid = arrays["valid"]
    for mode in (True, True, False):
        theirs.train(mode)
        x = rng.normal(1.0, 2.0, size=(B, S, D)).astype(np.float32)
        expected = array(theirs(torch.tensor(x[valid])))
        out = ours(jnp.asarray(x), not mode, mask=jnp.asarray(valid)[..., None])[valid]
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_allclose(ours.mean[...], array(theirs.running_mean), atol=1e-6)
        np.testing.assert_allclose(ours.var[...], array(theirs.running_var), rtol=1e-5)


def test_gradients_of_batch_norm_in_training(arrays, rng):
    """They pass through mean and variance, and not through the running averages."""
    ours = BatchNorm(D, momentum=0.9, rngs=nnx.Rngs(0))
    theirs = randomize(torch.nn.BatchNorm1d(D, eps=1e-5), rng).train()
    valid = arrays["valid"]
    calls = (
        lambda m, x: m(x, mask=jnp.asarray(valid)[..., None])[valid],
        lambda m, x: m(x[torch.tensor(valid)]),
    )
    check(ours, of_batch_norm, theirs, *calls, [arrays["source"]])


@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, "LSTMCell"), (GRU, "GRUCell")])
def test_recurrent_cells(rng, ours, theirs):
    """Gates stand in PyTorch's order. Its forget bias begins at 0, ours adds 1; its GRU has a
    second bias, of which only the candidate's part is not a part of the first.
    """
    other = randomize(getattr(torch.nn, theirs)(D, F), rng)
    cell = ours(D, F, dtype=FLOAT32, rngs=nnx.Rngs(0))
    bias = array(other.bias_ih) + array(other.bias_hh)
    with torch.no_grad():
        if ours is LSTM:
            bias[F : 2 * F] -= 1.0
        else:
            bias[2 * F :] -= array(other.bias_hh)[2 * F :]
            other.bias_hh[2 * F :] = 0.0
    cell.input.kernel[...] = jnp.asarray(array(other.weight_ih).T)
    cell.input.bias[...] = jnp.asarray(bias)
    cell.recurrent.kernel[...] = jnp.asarray(array(other.weight_hh).T)
    state, expected = cell.start(B), None
    for _ in range(3):
        x = rng.normal(size=(B, D)).astype(np.float32)
        state = cell.step(state, cell.input(jnp.asarray(x)))
        expected = other(torch.tensor(x), expected)
        hidden = expected[0] if ours is LSTM else expected
        np.testing.assert_allclose(state[0], array(hidden), atol=1e-5)


@pytest.mark.parametrize("masks", ["padding", "causal"])
def test_multi_head_attention(arrays, rng, masks):
    theirs = randomize(torch.nn.MultiheadAttention(D, N, batch_first=True), rng)
    ours = MultiHeadAttention(N, D, rngs=nnx.Rngs(0))
    if masks == "padding":
        mask, kwargs = arrays["mask"], {"key_padding_mask": torch.tensor(~arrays["valid"])}
    else:
        mask = masking.causal(T, S)
        kwargs = {"attn_mask": torch.tensor(~np.asarray(mask[0, 0]))}

    def call(m, x, y):
        return m(x, y, mask=mask)

    def torch_call(m, x, y):
        return m(x, y, y, need_weights=False, **kwargs)[0]

    check(ours, of_attention, theirs, call, torch_call, [arrays["target"], arrays["source"]])


def torch_masks(arrays):
    return {
        "tgt_mask": torch.tensor(~np.tril(np.ones((T, T), bool))),
        "tgt_key_padding_mask": torch.tensor(~arrays["target_valid"]),
        "memory_key_padding_mask": torch.tensor(~arrays["valid"]),
    }


@PLACEMENTS
def test_decoder_layer(arrays, rng, placement):
    ours = DecoderLayer(D, N, F, **of_placement(placement))
    options = {"dropout": 0.0, "batch_first": True, "norm_first": placement == "pre"}
    theirs = randomize(torch.nn.TransformerDecoderLayer(D, N, F, **options), rng).train()

    def call(m, x, memory):
        return m(x, memory, mask=arrays["target_mask"], memory_mask=arrays["memory_mask"])

    def torch_call(m, x, memory):
        return m(x, memory, **torch_masks(arrays))

    check(ours, of_layer, theirs, call, torch_call, [arrays["target"], arrays["source"]])


class Stacks(nnx.Module):
    def __init__(self, placement):
        self.encoder = Encoder(2, D, N, F, **of_placement(placement))
        self.decoder = Decoder(2, D, N, F, **of_placement(placement))


@PLACEMENTS
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of inference; none is run
def test_the_whole_transformer(arrays, rng, placement):
    """`torch.nn.Transformer`. It ends each stack with a norm, which post-norm does not need."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": placement == "pre"}
    theirs = torch.nn.Transformer(D, N, 2, 2, F, **options)
    if placement == "post":
        theirs.encoder.norm = theirs.decoder.norm = None
    randomize(theirs, rng).train()
    padding = torch.tensor(~arrays["valid"])

    def call(m, source, target):
        memory = m.encoder(source, mask=arrays["mask"])
        masks = {"mask": arrays["target_mask"], "memory_mask": arrays["memory_mask"]}
        return m.decoder(target, memory, **masks)

    def torch_call(m, source, target):
        return m(source, target, src_key_padding_mask=padding, **torch_masks(arrays))

    inputs = [arrays["source"], arrays["target"]]
    check(Stacks(placement), of_stacks, theirs, call, torch_call, inputs)
