import jax.numpy as jnp
import numpy as np
import pytest

from transformer.errors import UserError
from transformer.interop.layout import (
    bart_layout,
    check_names,
    t5_layout,
    to_ours,
    to_theirs,
)
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

SMALL = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_k": 3, "d_v": 3, "d_ff": 24}
FAMILIES = {
    "post": (
        bart_layout(2, 2, final_norm=False),
        {"norm_placement": "post", "attention_bias": True},
    ),
    "pre": (bart_layout(2, 2, final_norm=True), {"norm_placement": "pre", "attention_bias": True}),
    "t5": (
        t5_layout(2, 2, gated=False),
        {"norm": "rms", "position_encoding": "relative", "attention_bias": False},
    ),
    "t5 gated": (
        t5_layout(2, 2, gated=True),
        {"norm": "rms", "position_encoding": "relative", "feed_forward": "geglu"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_names_every_parameter_of_the_layers_once(family):
    layout, knobs = FAMILIES[family]
    model = Model(ModelConfig(**{**SMALL, **knobs}), 11, 11)
    named = [name for names in layout.values() for name in names]
    assert len(named) == len(set(named))
    layers = {name for name in model.shapes if "embedding" not in name}
    if family.startswith("t5"):
        layers -= {name for name in layers if "feed_forward" in name and name.endswith("bias")}
    assert set(named) == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_conversions_are_inverse_bit_for_bit(family):
    layout, knobs = FAMILIES[family]
    model, rng = Model(ModelConfig(**{**SMALL, **knobs}), 11, 11), np.random.default_rng(0)
    for (name,) in layout.values():
        ours = rng.normal(size=model.shapes[name].shape).astype(np.float32)
        theirs = to_theirs(ours, name)
        assert theirs.ndim == (2 if name.endswith("kernel") else 1)
        assert theirs.flags.c_contiguous
        again = to_ours(theirs, name, ours.shape)
        assert again.flags.c_contiguous
        np.testing.assert_array_equal(again, ours)


def test_a_kernel_multiplies_as_their_linear_layer_does():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(6, 8)), rng.normal(size=8)
    query = to_ours(weight, "query/kernel", (8, 2, 3))
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, query).ravel(), weight @ x)
    heads = rng.normal(size=(2, 3))
    out = to_ours(weight.T.copy(), "attention/out/kernel", (2, 3, 8))
    np.testing.assert_allclose(np.einsum("nh,nhd->d", heads, out), weight.T @ heads.ravel())


def test_rows_of_tables_follow_the_tokenizer():
    table, theirs = np.arange(8.0).reshape(4, 2), np.array([3, 1, 0, 2])
    ours = to_ours(table, "embedding/embedding", (4, 2), theirs)
    np.testing.assert_array_equal(ours[0], table[3])
    np.testing.assert_array_equal(to_theirs(ours, "embedding/embedding", theirs), table)


def test_mismatches_name_the_tensor():
    with pytest.raises(UserError, match=r"query/kernel needs \(6, 8\), not \(8, 6\)"):
        to_ours(np.zeros((8, 6)), "query/kernel", (8, 2, 3))
    with pytest.raises(UserError, match="x/bias of shape"):
        to_ours(np.zeros(3), "x/bias", (4,))
    layout = {"a": ("x",), "b": ("y",)}
    check_names({"a": 0, "b": 0, "c": 0}, layout, frozenset("c"))
    with pytest.raises(UserError, match="lack b"):
        check_names({"a": 0}, layout, frozenset())
    with pytest.raises(UserError, match="no parameter holds c"):
        check_names({"a": 0, "b": 0, "c": 0}, layout, frozenset())


@pytest.mark.oracle
def test_logits_of_pegasus_are_those_of_its_own_class():
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes["activation_function"] = "relu"
    config = hf.PegasusConfig(
        vocab_size=11, d_model=8, scale_embedding=True, max_position_embeddings=16, **sizes, **heads
    )
    torch.manual_seed(0)
    reference = hf.PegasusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.5)
        for stack in ("encoder", "decoder"):  # positions are random: the learned table holds them
            reference.state_dict()[f"model.{stack}.embed_positions.weight"].normal_()
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}

    knobs = {"attention_bias": True, "norm_epsilon": 1e-5, "position_encoding": "learned"}
    model = Model(ModelConfig(**{**SMALL, "d_k": 4, "d_v": 4, "max_length": 16, **knobs}), 11, 11)
    tables = {"model.shared.weight": ("embedding/embedding",)}
    for stack, side in (("encoder", "source"), ("decoder", "target")):
        tables[f"model.{stack}.embed_positions.weight"] = (f"{side}_position/embedding",)
    layout = bart_layout(2, 2, final_norm=True) | tables
    copies = {f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    check_names(state, layout, frozenset(copies | {"lm_head.weight", "final_logits_bias"}))
    params = {
        name: to_ours(state[theirs], name, model.shapes[name].shape)
        for theirs, (name,) in layout.items()
    }
    assert params.keys() == model.shapes.keys()
    source, target = np.random.default_rng(0).integers(3, 11, (2, 3, 6))
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target)
        ).logits.numpy()
    tokens = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    found = model.bind({name: jnp.asarray(value) for name, value in params.items()})(*tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["Marian", "Bart", "MBart", "Pegasus", "M2M100", "T5", "UMT5"])
def test_layouts_name_the_tensors_of_their_classes(name):
    hf = pytest.importorskip("transformers")
    if "T5" in name:
        config = {"d_ff": 24, "d_kv": 3, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
        layout, head = t5_layout(2, 3, gated=name == "UMT5"), "ForConditionalGeneration"
    else:
        config = {f"{stack}_{key}": 2 for stack in ("encoder", "decoder") for key in KEYS}
        config |= {"decoder_layers": 3, "max_position_embeddings": 16, "pad_token_id": 0}
        layout = bart_layout(2, 3, final_norm=name not in ("Marian", "Bart"))
        head = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    made = getattr(hf, f"{name}Config")(vocab_size=11, d_model=8, **config)
    found = getattr(hf, name + head)(made).state_dict()
    others = ("shared", "embed", "relative", "lm_head", "final_logits_bias")
    check_names(found, layout, frozenset(n for n in found if any(word in n for word in others)))


KEYS = ("layers", "attention_heads", "ffn_dim")
