"""The model against PyTorch's modules with the same weights: outputs and gradients, float32.

Differences are relative to the largest number of an array. Largest seen on a CPU: outputs 2.3e-7,
gradients 3.9e-6; allowed: 2e-6 and 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.modules import masking
from transformer.modules.cells import GRU, LSTM
from transformer.modules.stacks import Decoder, Encoder

B, S, T, D, N, F = 3, 7, 6, 16, 4, 32
FLOAT32 = jnp.dtype("float32")
pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True, scope="module")
def _import_torch():
    """Imports PyTorch, which takes seconds, when a test runs."""
    global torch
    torch = pytest.importorskip("torch", reason="pip install '.[oracle]' to run these")


def randomize(module, rng):
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            values = rng.normal(size=tuple(parameter.shape)) * scale
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return module.eval()


def array(tensor):
    return np.asarray(tensor.detach().numpy())


# From a PyTorch module to {path: array} of ours, for parameters and for their gradients.
def of_linear(module, get):
    return {("kernel",): get(module.weight).T, ("bias",): get(module.bias)}


def of_norm(module, get):
    return {("scale",): get(module.weight), ("bias",): get(module.bias)}


def of_attention(module, get):
    kernels, biases = (get(each) for each in (module.in_proj_weight, module.in_proj_bias))
    paths = {("out", "kernel"): get(module.out_proj.weight).T.reshape(N, D // N, D)}
    paths["out", "bias"] = get(module.out_proj.bias)
    for i, name in enumerate(("query", "key", "value")):
        paths[name, "kernel"] = kernels[i * D : (i + 1) * D].T.reshape(D, N, D // N)
        paths[name, "bias"] = biases[i * D : (i + 1) * D].reshape(N, D // N)
    return paths


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


def near(ours, theirs, tolerance, name="", least=0.0):
    atol = tolerance * max(np.abs(theirs).max(), least)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=str(name))


@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, "LSTMCell"), (GRU, "GRUCell")])
def test_recurrent_cells(rng, ours, theirs):
    """Our LSTM adds 1 to the forget gate; PyTorch's GRU has a second bias for the candidate."""
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


class Stacks(nnx.Module):
    def __init__(self, placement):
        options = {"norm_placement": placement, "norm_epsilon": 1e-5, "rngs": nnx.Rngs(0)}
        self.encoder = Encoder(2, D, N, F, **options)
        self.decoder = Decoder(2, D, N, F, **options)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of inference; none is run
def test_the_whole_transformer(placement, rng):
    """Its outputs, and the gradients of sum(sin(output)) by every parameter and input.

    `torch.nn.Transformer` ends each stack with a norm, which post-norm does not need.
    """
    inputs = [rng.normal(size=(B, n, D)).astype(np.float32) for n in (S, T)]
    valid, target_valid = np.arange(S) < [[5], [7], [3]], np.arange(T) < [[6], [4], [5]]
    options = {"dropout": 0.0, "batch_first": True, "norm_first": placement == "pre"}
    theirs = torch.nn.Transformer(D, N, 2, 2, F, **options)
    if placement == "post":
        theirs.encoder.norm = theirs.decoder.norm = None
    randomize(theirs, rng).train()

    graph, state = nnx.split(Stacks(placement))
    params = jax.tree.map(jnp.asarray, of_stacks(theirs, array))
    shapes, flat = jax.tree.map(jnp.shape, params), dict(nnx.to_flat_state(state))
    assert jax.tree.map(jnp.shape, flat) == shapes
    mask, target_mask = (masking.padding(jnp.asarray(each)) for each in (valid, target_valid))
    memory_mask = jnp.broadcast_to(mask, (B, 1, T, S))

    def loss(params, inputs):
        module = nnx.merge(graph, nnx.traversals.unflatten_mapping(params))
        memory = module.encoder(inputs[0], mask=mask)
        masks = {"mask": masking.causal(T) & target_mask, "memory_mask": memory_mask}
        out = module.decoder(inputs[1], memory, **masks)
        return jnp.sin(out).sum(), out

    gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, out = gradient_of(params, [*map(jnp.asarray, inputs)])
    causal = torch.tensor(~np.tril(np.ones((T, T), bool)))
    paddings = {f"{side}_key_padding_mask": torch.tensor(~valid) for side in ("src", "memory")}
    paddings["tgt_key_padding_mask"] = torch.tensor(~target_valid)
    tensors = [torch.tensor(each, requires_grad=True) for each in inputs]
    torch_out = theirs(*tensors, tgt_mask=causal, **paddings)
    torch.sin(torch_out).sum().backward()

    near(out, array(torch_out), 2e-6)
    for path, expected in of_stacks(theirs, lambda parameter: array(parameter.grad)).items():
        near(gradients[0][path], expected, 2e-5, path, least=1.0)
    for found, tensor in zip(gradients[1], tensors, strict=True):
        near(found, array(tensor.grad), 2e-5)
