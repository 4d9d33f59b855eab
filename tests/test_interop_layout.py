"""Names and layouts of tensors of other libraries."""

import numpy as np
import pytest

from transformer.errors import UserError
from transformer.interop.huggingface import BART, T5
from transformer.interop.layout import (
    COMPUTED,
    TABLES,
    expand,
    find,
    parameters,
    position_knobs,
    position_table,
    tied,
    to_ours,
    to_theirs,
)
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

SMALL = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_k": 3, "d_v": 3, "d_ff": 24}
DEPTHS = {"encoder": 2, "decoder": 3}
BIASED = {"attention_bias": True, "logits_bias": True}
RELATIVE = {"norm": "rms", "position_encoding": "relative", "ff_bias": False}
FAMILIES = {
    "post": (BART, BIASED | {"norm_placement": "post", "embedding_norm": True}),
    "pre": (BART, BIASED | {"position_encoding": "learned"}),
    "t5": (T5, RELATIVE),
    "t5 gated": (T5, RELATIVE | {"feed_forward": "geglu", "relative_per_layer": True}),
}


def model_of(knobs):
    return Model(ModelConfig(**{"decoder_layers": 3} | SMALL | knobs), 11, 11)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_names_every_parameter_but_the_tables_of_embeddings(family):
    naming, knobs = FAMILIES[family]
    shapes = model_of(knobs).shapes
    layout = expand(naming, DEPTHS, shapes)
    named = {name for names in layout.values() for name in names}
    assert named == shapes.keys() - {name for name in TABLES if name != "logits_bias"}


@pytest.mark.parametrize("family", FAMILIES)
def test_conversions_are_inverse_bit_for_bit(family):
    shapes, rng = model_of(FAMILIES[family][1]).shapes, np.random.default_rng(0)
    for name, leaf in shapes.items():
        ours = rng.normal(size=leaf.shape).astype(np.float32)
        theirs = to_theirs(ours, name)
        assert theirs.ndim == (2 if name.endswith(("kernel", "embedding")) else 1)
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


def test_a_tensor_may_hold_several_parameters():
    rows, tensor = {"source": np.arange(2), "target": np.array([1, 0])}, np.arange(24.0)
    shapes = {"a/query/kernel": (3, 1, 2), "a/key/kernel": (3, 1, 2), "logits_bias": (2,)}
    layout = {"qk": ("a/query/kernel", "a/key/kernel"), "b": ("logits_bias",)}
    tensors = {"qk": tensor[:12].reshape(4, 3), "b": tensor[:2].reshape(1, 2)}
    found = dict(parameters(tensors, layout, shapes, rows))
    np.testing.assert_array_equal(found["a/key/kernel"][:, 0].T, tensors["qk"][2:])
    assert found["logits_bias"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"qk of shape \(3, 3\) needs 4 rows"):
        list(parameters(tensors | {"qk": np.zeros((3, 3))}, layout, shapes, rows))


def test_mismatches_name_the_tensor():
    with pytest.raises(UserError, match=r"query/kernel needs a tensor of shape \(6, 8\), not \(8,"):
        to_ours(np.zeros((8, 6)), "query/kernel", (8, 2, 3))
    layout, one = {"a": ("x",), "old a": ("x",), "b": ("y",)}, np.zeros(1)
    assert find(layout, {"old a": one, "b": one, "c": one}, {"c"}).keys() == {"old a", "b"}
    with pytest.raises(UserError, match="lack b"):
        find(layout, {"a": one})
    with pytest.raises(UserError, match="no parameter holds c"):
        find(layout, {"a": one, "b": one, "c": one})


def test_tables_tell_ties_and_positions():
    one, other = np.zeros((3, 2)), np.ones((3, 2))
    assert tied(one.copy(), one, one.copy()) == "all"
    assert tied(one.copy(), one, other) == "inputs"
    assert tied(other, one, one.copy()) == "target_output"
    assert tied(one, other, one) == "none"
    for knobs in COMPUTED:
        table = position_table(ModelConfig(d_model=8, num_heads=1, **knobs), 5)
        assert position_knobs(table, table) == knobs
        assert position_knobs(table, table + 1) == {"position_encoding": "learned", "max_length": 5}
