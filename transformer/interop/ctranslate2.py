"""Export to CTranslate2, through its public `TransformerSpec`; needs no PyTorch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from transformer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from transformer.errors import UserError, explained
from transformer.inference.generation import TrainedModel
from transformer.interop.layout import PARTS, Layout, to_theirs
from transformer.modules.config import ModelConfig
from transformer.modules.layers import FEED_FORWARDS
from transformer.modules.positions import Sinusoidal

if TYPE_CHECKING:
    from ctranslate2.specs import TransformerSpec

Weights = Mapping[str, np.ndarray]
ROWS = 2048  # of the table that positions without one are written as; longer texts are refused
SPECIAL = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
ACTIVATIONS = {"relu": "RELU", "gelu": "GELUTanh", "gelu_erf": "GELU", "swish": "SWISH"}
ACTIVATIONS |= {"glu": "Sigmoid", "reglu": "RELU", "geglu": "GELUTanh", "swiglu": "SWISH"}
QUANTIZATIONS = ("int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16")
# The values of knobs that the export was compared for; every other value is refused.
HOLDS: dict[str, tuple[Any, ...]] = {
    "architecture": ("transformer",),
    "norm": ("layer", "rms"),
    "position_encoding": ("none", "sinusoidal", "learned", "rotary", "relative"),
    "random_positions": (0,),
    "window": (None,),
    "normalize_qk": (False,),
}
SIDES = {"encoder": "source", "decoder": "target"}
TABLES = ("none", "sinusoidal", "learned")  # positions that are written as tables
# Tables of embeddings by `tie_embeddings`: those of the target and of the logits.
TARGET_TABLES = {
    "all": ("embedding", "embedding"),
    "inputs": ("embedding", "output_embedding"),
    "target_output": ("target_embedding", "target_embedding"),
    "none": ("target_embedding", "output_embedding"),
}


def check(config: ModelConfig) -> None:
    """Raises a UserError for a model that CTranslate2 cannot hold, with the knob's name."""
    for knob, values in HOLDS.items():
        if (value := getattr(config, knob)) not in values:
            names = f"train with {' or '.join(map(str, values))}, or export to stablehlo"
            raise UserError(f"CTranslate2 cannot hold model.{knob}={value}: {names}")
    if config.values_width() != config.attention_width():
        remedy = "train with d_v=None, or export to stablehlo"
        raise UserError(f"CTranslate2 cannot hold model.d_v unlike model.d_k: {remedy}")


def vocabulary(tokenizer: Tokenizer, size: int) -> list[str]:
    """A distinct text for each of `size` token ids; the ids themselves if symbols coincide."""
    known = range(len(tokenizer.pieces))
    texts = [SPECIAL.get(i) or tokenizer.pieces[i] for i in known]
    if len(set(texts)) < len(texts):  # bytes, whose parts of characters look alike
        texts = [SPECIAL.get(i) or str(i) for i in known]
    return texts + [f"<unused {i}>" for i in range(len(texts), size)]


def layout(config: ModelConfig) -> Layout:
    """CTranslate2's variables, and the parameters side by side in them, if the model has these."""
    out: Layout = {}

    def add(theirs: str, *ours: str, norm: bool = False) -> None:
        parts = {"gamma": "scale", "beta": "bias"} if norm else {"weight": "kernel", "bias": "bias"}
        for name, own in parts.items():
            out[f"{theirs}/{name}"] = tuple(f"{each}/{own}" for each in ours)

    for stack, depth in (("encoder", config.num_layers), ("decoder", config.decoder_depth())):
        crosses = stack == "decoder"
        for i in range(depth):
            ours, theirs = f"{stack}/layers/{i}", f"{stack}/layer_{i}"
            query, key, value, into = (f"{ours}/self_attention/{part}" for part in PARTS)
            add(f"{theirs}/self_attention/linear_0", query, key, value)
            add(f"{theirs}/self_attention/linear_1", into)
            if crosses:
                query, key, value, into = (f"{ours}/cross_attention/{part}" for part in PARTS)
                add(f"{theirs}/attention/linear_0", query)
                add(f"{theirs}/attention/linear_1", key, value)
                add(f"{theirs}/attention/linear_2", into)
            for name, part in (("0", "expand"), ("0_noact", "gate"), ("1", "contract")):
                add(f"{theirs}/ffn/linear_{name}", f"{ours}/feed_forward/{part}")
            for name, part in _norms(config.norm_placement == "both", crosses):
                add(f"{theirs}/{name}", f"{ours}/residuals/{part}", norm=True)
            if config.position_encoding == "relative":
                place = f"/{i}" if config.relative_per_layer else ""
                table = f"{SIDES[stack]}_position{place}/embedding"
                out[f"{theirs}/self_attention/relative_attention_bias"] = (table,)
        add(f"{stack}/layer_norm", f"{stack}/final_norm", norm=True)
        add(f"{stack}/layernorm_embedding", f"{SIDES[stack]}_embedding_norm", norm=True)
        if config.position_encoding == "learned":
            table = f"{SIDES[stack]}_position/embedding"
            out[f"{stack}/position_encodings/encodings"] = (table,)
    target, logits = TARGET_TABLES[config.tie_embeddings]
    out["encoder/embeddings_0/weight"] = ("embedding/embedding",)
    out["decoder/embeddings/weight"] = (f"{target}/embedding",)
    out["decoder/projection/weight"] = (f"{logits}/embedding",)
    return out | {"decoder/projection/bias": ("logits_bias",)}


def _norms(both: bool, crosses: bool) -> Iterator[tuple[str, str]]:
    """Names of norms in a layer, and of ours in its residuals."""
    if not both:
        names = ["self_attention", *["attention"] * crosses, "ffn"]
        yield from ((f"{name}/layer_norm", f"{k}/norm") for k, name in enumerate(names))
        return
    cross = "external_{}_encoder_attention_layer_norm"
    pairs = [("input_layer_norm", "post_attention_layer_norm")]
    pairs += [(cross.format("pre"), cross.format("post"))] * crosses
    pairs += [("pre_feedforward_layer_norm", "post_feedforward_layer_norm")]
    for k, (before, after) in enumerate(pairs):
        yield from ((before, f"{k}/norm"), (after, f"{k}/output_norm"))


def variables(config: ModelConfig, weights: Weights) -> dict[str, np.ndarray]:
    """The float32 arrays of CTranslate2's variables, by their names."""
    out = {}
    for name, ours in layout(config).items():
        if ours[0] in weights:
            out[name] = np.concatenate([to_theirs(weights[each], each) for each in ours])
    if config.position_encoding in TABLES:
        for stack in SIDES:
            name = f"{stack}/position_encodings/encodings"
            out[name] = (
                out[name][config.position_offset :] if name in out else position_table(config)
            )
    return {name: np.ascontiguousarray(array, np.float32) for name, array in out.items()}


def position_table(config: ModelConfig, rows: int = ROWS) -> Float[np.ndarray, "T D"]:
    """The first rows of what is added to embedded tokens, zeros or sinusoids."""
    zeros = np.zeros((1, rows, config.d_model), np.float32)
    if config.position_encoding == "none":  # without a table there are sinusoids
        return zeros[0]
    names = {"layout": config.sinusoid_layout, "rates": config.sinusoid_rates}
    encoding = Sinusoidal(config.d_model, **names, offset=config.position_offset)
    return np.asarray(encoding(jnp.asarray(zeros)))[0]


def spec(config: ModelConfig, weights: Weights) -> "TransformerSpec":
    """The model as a specification of CTranslate2, without vocabularies."""
    with explained("export to CTranslate2: pip install ctranslate2", ImportError):
        from ctranslate2 import specs
    check(config)
    both, pre = config.norm_placement == "both", config.norm_placement != "post"
    options: dict[str, Any] = {
        "pre_norm": True,  # has the final norm
        "pre_post_layer_norm": both,
        "activation": specs.Activation[ACTIVATIONS[config.feed_forward]],
        "ffn_glu": FEED_FORWARDS[config.feed_forward][1],
        "rms_norm": config.norm == "rms",
        "layernorm_embedding": config.embedding_norm,
        "relative_attention_bias": config.position_encoding == "relative",
        "num_heads_kv": config.num_kv_heads,
        "head_dim": config.attention_width(),
        "no_final_norm": not (pre if config.final_norm is None else config.final_norm),
    }
    if config.position_encoding == "rotary":
        options |= {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": config.rotary_base}
    depths, heads = (config.num_layers, config.decoder_depth()), config.num_heads
    encoder: Any = specs.TransformerEncoderSpec(depths[0], heads, **options)
    options["external_pre_post_encoder_layers"] = both
    decoder: Any = specs.TransformerDecoderSpec(depths[1], heads, **options)
    built = specs.TransformerSpec(encoder, decoder)
    if config.logits_scale != 1.0:
        decoder.scale_outputs = np.float32(config.logits_scale)
    for stack in (encoder, decoder):
        scale, stack.pre_norm = config.embedding_scale, pre
        stack.scale_embeddings = True if scale is None else np.float32(scale)
        for layer in stack.layer:
            own = layer.self_attention
            for attention in (own, layer.attention) if stack is decoder else (own,):
                if config.attention_scale is not None:
                    attention.queries_scale = np.float32(config.attention_scale)
            if config.position_encoding == "relative":
                own.relative_attention_max_distance = np.int32(config.relative_distance)
    for name, array in variables(config, weights).items():
        *path, last = name.split("/")
        node = built
        for part in path:
            name, _, index = part.rpartition("_")  # layer_0 is an element of the list `layer`
            node = getattr(node, part) if hasattr(node, part) else getattr(node, name)[int(index)]
        setattr(node, last, array)
    return built


def export(model: TrainedModel, out: Path, quantization: str | None = None) -> None:
    """Writes a model folder for `ctranslate2.Translator`, and the tokenizers.

    Raises:
      UserError: CTranslate2 cannot hold the model, or is not installed.
    """
    config = model.config.model
    check(config)
    if getattr(model.tokenizers.source, "suffix", ()):
        remedy = "export to stablehlo"
        raise UserError(
            f"CTranslate2 ends a source with EOS, and this tokenizer does not: {remedy}"
        )
    weights = {name: np.asarray(array, np.float32) for name, array in model.variables.items()}
    built: Any = spec(config, weights)
    sizes = (built.encoder.embeddings[0].weight, built.decoder.embeddings.weight)
    source, target = map(vocabulary, model.tokenizers, map(len, sizes))
    built.register_source_vocabulary(source)
    built.register_target_vocabulary(target)
    built.config.bos_token, built.config.eos_token = SPECIAL[BOS], SPECIAL[EOS]
    built.config.decoder_start_token = target[model.model.outputs.start]
    built.config.add_source_eos = True
    built.config.layer_norm_epsilon = config.norm_epsilon
    built.validate()
    built.optimize(quantization=quantization)
    built.save(str(out))
    model.tokenizers.save(out / "tokenizers")
