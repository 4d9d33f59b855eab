"""Export to CTranslate2, through its public `TransformerSpec`; needs no PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from transformer.errors import UserError, needs
from transformer.inference.generation import TrainedModel
from transformer.interop.layout import SIDES, Naming, Tensors, expand, position_table, to_theirs
from transformer.modules.config import ModelConfig
from transformer.modules.layers import FEED_FORWARDS

if TYPE_CHECKING:
    from ctranslate2.specs import TransformerSpec

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
NAMING = Naming(
    both="""
    */layer_#/self_attention/linear_0            */layers/#/self_attention/query+key+value
    */layer_#/self_attention/linear_1            */layers/#/self_attention/out
    */layer_#/ffn/linear_{0,0_noact,1}           */layers/#/feed_forward/{expand,gate,contract}
    */layer_#/self_attention/layer_norm          */layers/#/residuals/0/norm
    */layer_#/input_layer_norm                   */layers/#/residuals/0/norm
    */layer_#/post_attention_layer_norm          */layers/#/residuals/0/output_norm
    */layer_#/self_attention/relative_attention_bias  @_position/#/embedding
    */layer_#/self_attention/relative_attention_bias  @_position/embedding
    */layer_norm                                 */final_norm
    */layernorm_embedding                        @_embedding_norm
    */position_encodings/encodings               @_position/embedding
    decoder/projection/bias                      logits_bias
    """,
    encoder="""
    */layer_#/ffn/layer_norm                     */layers/#/residuals/1/norm
    */layer_#/{pre,post}_feedforward_layer_norm  */layers/#/residuals/1/{norm,output_norm}
    */embeddings_0/weight                        embedding/embedding
    """,
    decoder="""
    */layer_#/attention/linear_0                 */layers/#/cross_attention/query
    */layer_#/attention/linear_1                 */layers/#/cross_attention/key+value
    */layer_#/attention/linear_2                 */layers/#/cross_attention/out
    */layer_#/attention/layer_norm               */layers/#/residuals/1/norm
    */layer_#/ffn/layer_norm                     */layers/#/residuals/2/norm
    */layer_#/external_pre_encoder_attention_layer_norm   */layers/#/residuals/1/norm
    */layer_#/external_post_encoder_attention_layer_norm  */layers/#/residuals/1/output_norm
    */layer_#/{pre,post}_feedforward_layer_norm  */layers/#/residuals/2/{norm,output_norm}
    */embeddings/weight                          target_embedding/embedding
    */projection/weight                          output_embedding/embedding
    """,
    linear=("/weight", "/bias"),
    norm=("/gamma", "/beta"),
)


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


def variables(config: ModelConfig, weights: Tensors) -> dict[str, np.ndarray]:
    """The float32 arrays of CTranslate2's variables; norms have the names of both placements."""
    depths = {"encoder": config.num_layers, "decoder": config.decoder_depth()}
    # One name of ours has two places there, of which a kind of position takes one.
    other = "encodings" if config.position_encoding == "relative" else "relative_attention_bias"
    layout = expand(NAMING, depths, weights)
    layout = {name: ours for name, ours in layout.items() if not name.endswith(f"/{other}")}
    source = "embedding/embedding"
    target = "target_embedding/embedding" if "target_embedding/embedding" in weights else source
    layout.setdefault("decoder/embeddings/weight", (target,))
    layout.setdefault("decoder/projection/weight", (target,))
    parts = {theirs: [to_theirs(weights[x], x) for x in ours] for theirs, ours in layout.items()}
    out = {theirs: np.concatenate(arrays) for theirs, arrays in parts.items()}
    if config.position_encoding in ("none", "sinusoidal", "learned"):  # without a table: sinusoids
        for stack in SIDES:
            name = f"{stack}/position_encodings/encodings"
            learned = out[name][config.position_offset :] if name in out else None
            out[name] = position_table(config, ROWS) if learned is None else learned
    return {name: np.ascontiguousarray(array, np.float32) for name, array in out.items()}


def spec(config: ModelConfig, weights: Tensors) -> "TransformerSpec":
    """The model as a specification of CTranslate2, without vocabularies."""
    with needs("export"):
        from ctranslate2 import specs
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
    heads = config.num_heads
    encoder: Any = specs.TransformerEncoderSpec(config.num_layers, heads, **options)
    options["external_pre_post_encoder_layers"] = both
    decoder: Any = specs.TransformerDecoderSpec(config.decoder_depth(), heads, **options)
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
        _set(built, name.split("/"), array)
    return built


def _set(node: Any, path: list[str], array: np.ndarray) -> None:
    """Sets a variable of a specification; norms of the other layout have no place there."""
    for part in path[:-1]:
        if not hasattr(node, part):
            name, _, index = part.rpartition("_")  # layer_0 is an element of the list `layer`
            if not index.isdecimal():
                return
            node = getattr(node, name)[int(index)]
        else:
            node = getattr(node, part)
    setattr(node, path[-1], array)


def export(model: TrainedModel, out: Path, quantization: str | None = None) -> None:
    """Writes a model folder for `ctranslate2.Translator`, and the tokenizers.

    Raises:
      UserError: CTranslate2 cannot hold the model, or is not installed.
    """
    config = model.config.model
    check(config)
    if len(model.tokenizers.source.end) > 1:
        problem = "CTranslate2 has no tokens after the EOS of a source, as this tokenizer has"
        raise UserError(f"{problem}: export to stablehlo")
    weights = {name: np.asarray(array, np.float32) for name, array in model.variables.items()}
    built: Any = spec(config, weights)
    sizes = (built.encoder.embeddings[0].weight, built.decoder.embeddings.weight)
    source, target = map(vocabulary, model.tokenizers, map(len, sizes))
    built.register_source_vocabulary(source)
    built.register_target_vocabulary(target)
    built.config.bos_token, built.config.eos_token = SPECIAL[BOS], SPECIAL[EOS]
    built.config.decoder_start_token = target[model.model.outputs.start]
    built.config.add_source_eos = bool(model.tokenizers.source.end)
    built.config.layer_norm_epsilon = config.norm_epsilon
    built.validate()
    built.optimize(quantization=quantization)
    built.save(str(out))
    model.tokenizers.save(out / "tokenizers")
