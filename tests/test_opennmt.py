"""Checkpoints in the layout of OpenNMT-py 3, against a plain forward pass in PyTorch."""

from argparse import Namespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import refused
from transformer.data.tokenizer import BOS, EOS
from transformer.interop.importing import import_run
from transformer.interop.layout import parameters
from transformer.interop.opennmt import read
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

pytestmark = pytest.mark.oracle

D, HEADS, F = 16, 2, 24
SPECIALS = ["<unk>", "<blank>", "<s>", "</s>"]
PIECES = {"src": [*SPECIALS, *"abcdefgh"], "tgt": [*SPECIALS, *"uvwxyz"]}


def checkpoint(path, *, shared=False, bias=False, gated=False, **options):
    """Writes a checkpoint of two encoder layers and one decoder layer with random weights."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {}

    def linear(name, rows, columns, has_bias=bias):
        state[f"{name}.weight"] = draw(rows, columns)
        state.update({f"{name}.bias": draw(rows)} if has_bias else {})

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(D) / 4, draw(D)

    stacks = ("encoder", "transformer", 2), ("decoder", "transformer_layers", 1)
    for stack, layers, depth in stacks:
        side = "src" if stack == "encoder" or shared else "tgt"
        table = f"{stack}.embeddings.make_embedding.emb_luts.0.weight"
        state[table] = draw(len(PIECES[side]), D)
        state[f"{stack}.embeddings.make_embedding.pe.pe"] = draw(50, 1, D)
        for name in (f"{stack}.{layers}.{i}" for i in range(depth)):
            attentions = ["self_attn", *["context_attn"] * (stack == "decoder")]
            for k, attention in enumerate(attentions):
                for part in ("linear_query", "linear_keys", "linear_values", "final_linear"):
                    linear(f"{name}.{attention}.{part}", D, D)
                norm(f"{name}.layer_norm" + (f"_{k + 1}" if stack == "decoder" else ""))
            linear(f"{name}.feed_forward.w_1", F, D, True)
            linear(f"{name}.feed_forward.w_2", D, F, True)
            if gated:
                linear(f"{name}.feed_forward.w_3", F, D, True)
            norm(f"{name}.feed_forward.layer_norm")
        norm(f"{stack}.layer_norm")
    target = state["decoder.embeddings.make_embedding.emb_luts.0.weight"]
    if shared:
        target = state["encoder.embeddings.make_embedding.emb_luts.0.weight"]
        state["decoder.embeddings.make_embedding.emb_luts.0.weight"] = target
    own = {"weight": target if shared else draw(*target.shape), "bias": draw(len(target))}
    opt = {"heads": HEADS, "position_encoding": True, "max_relative_positions": 0} | options
    vocab = {"src": PIECES["src"], "tgt": PIECES["src" if shared else "tgt"]}
    saved = {"model": state, "generator": own, "vocab": vocab, "opt": Namespace(**opt)}
    torch.save(saved, path)
    return state | {f"generator.{name}": value for name, value in own.items()}


def forward(state, source, target, activation, concat):
    """Their logits, without padding."""

    import torch

    functional = torch.nn.functional

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return functional.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def attend(x, memory, name, causal=False):
        names, parts = ("linear_query", "linear_keys", "linear_values"), []
        for y, part in zip((x, memory, memory), names, strict=True):
            parts.append(linear(y, f"{name}.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2))
        found = functional.scaled_dot_product_attention(*parts, is_causal=causal)
        return linear(found.transpose(1, 2).flatten(-2), f"{name}.final_linear")

    def embed(tokens, stack):
        x = state[f"{stack}.embeddings.make_embedding.emb_luts.0.weight"][tokens] * D**0.5
        place, half = torch.arange(tokens.shape[1])[:, None].float(), torch.arange(D // 2)
        rates = 10000.0 ** (-half / (D // 2 - 1) if concat else -2 * half / D)
        waves = torch.sin(place * rates), torch.cos(place * rates)
        return x + (torch.cat(waves, 1) if concat else torch.stack(waves, 2).flatten(1))

    def feed(x, name):
        y = norm(x, f"{name}.feed_forward.layer_norm")
        inner = getattr(functional, activation)(linear(y, f"{name}.feed_forward.w_1"))
        if f"{name}.feed_forward.w_3.weight" in state:
            inner = inner * linear(y, f"{name}.feed_forward.w_3")
        return x + linear(inner, f"{name}.feed_forward.w_2")

    x = embed(source, "encoder")
    for name in ("encoder.transformer.0", "encoder.transformer.1"):
        y = norm(x, f"{name}.layer_norm")
        x = feed(x + attend(y, y, f"{name}.self_attn"), name)
    memory, x = norm(x, "encoder.layer_norm"), embed(target, "decoder")
    name = "decoder.transformer_layers.0"
    y = norm(x, f"{name}.layer_norm_1")
    x = x + attend(y, y, f"{name}.self_attn", causal=True)
    x = x + attend(norm(x, f"{name}.layer_norm_2"), memory, f"{name}.context_attn")
    return linear(norm(feed(x, name), "decoder.layer_norm"), "generator")


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "relu"),
        ({"shared": True, "position_encoding_type": "SinusoidalConcat"}, "relu"),
        ({"bias": True, "pos_ffn_activation_fn": "gelu"}, "gelu"),
        ({"gated": True, "pos_ffn_activation_fn": "gated-silu"}, "silu"),
    ],
)
def test_logits_are_those_of_a_plain_forward_pass(changes, activation, tmp_path):
    torch = pytest.importorskip("torch")
    state = checkpoint(tmp_path / "model.pt", **changes)
    found = read(tmp_path / "model.pt", None)
    source, target = found.tokenizers
    roles = SPECIALS.index("<blank>"), SPECIALS.index("<s>"), SPECIALS.index("</s>")
    assert tuple(source.theirs[:3]) == tuple(target.theirs[:3]) == roles
    assert target.start == BOS
    assert EOS not in source.encode("a b")
    assert source.encode("") == [EOS]
    model = Model(ModelConfig(**found.knobs), source.vocab_size, target.vocab_size)
    assert (model.config.tie_embeddings == "all") == changes.get("shared", False)
    shapes = {name: leaf.shape for name, leaf in model.shapes.items()}
    rows = {"source": np.arange(source.vocab_size), "target": np.arange(target.vocab_size)}
    held = parameters(found.tensors, found.layout, shapes, rows)
    params = {name: jnp.asarray(value) for name, value in held}
    assert params.keys() == shapes.keys()
    given, outputs = np.array([[4, 6, 5, 8, 7]], np.int32), np.array([[2, 5, 9, 4]], np.int32)
    segments = {"source_segments": jnp.ones((1, 5), jnp.int32)}
    segments["target_segments"] = jnp.ones((1, 4), jnp.int32)
    ours = model.bind(params)(jnp.asarray(given), jnp.asarray(outputs), **segments)
    concat = "position_encoding_type" in changes
    tokens = torch.tensor(given).long(), torch.tensor(outputs).long()
    theirs = forward(state, *tokens, activation, concat)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_a_checkpoint_makes_a_run_that_decodes_as_the_forward_pass_does(tmp_path):
    torch = pytest.importorskip("torch")
    state = checkpoint(tmp_path / "model.pt")
    model = import_run(tmp_path / "model.pt", tmp_path / "run").trained_model()
    ((found,),) = model.generate(["c a b"], beam_size=1, max_length=6, min_length=5)
    source, target = torch.tensor([[6, 4, 5]]), [SPECIALS.index("<s>")]  # no EOS in the source
    banned = [SPECIALS.index(name) for name in ("<blank>", "<s>", "</s>")]
    while len(target) < 6:
        logits = forward(state, source, torch.tensor([target]), "relu", False)[0, -1]
        logits[banned] = -torch.inf
        target.append(int(logits.argmax()))
    pieces = [PIECES["tgt"][number] for number in target[1:]]
    assert found.text.split()[:5] == pieces


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    path.write_bytes(b"nothing")
    refused("is not a file of PyTorch", read, path, None)
    torch.save({"model": {}}, path)
    refused("lacks model, generator, vocab or opt", read, path, None)
    checkpoint(path, max_relative_positions=-1)
    refused("max_relative_positions=-1 is not supported", read, path, None)
    checkpoint(path, pos_ffn_activation_fn="fast_gelu")
    refused("pos_ffn_activation_fn=fast_gelu", read, path, None)
