"""`read`, a checkpoint of OpenNMT-py 3 in the words of this code; needs PyTorch, not OpenNMT-py."""

from pathlib import Path
from typing import Any

from transformer.errors import UserError
from transformer.interop.layout import (
    BEAMS,
    SIDES,
    Imported,
    Naming,
    Values,
    count_layers,
    expand,
    find,
    infer_knobs,
    tied,
)
from transformer.interop.readers import load_torch, plain_tokenizers, token_ids, torch_tensors
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

NAMING = Naming(
    both="""
    *.transformer.#.self_attn.linear_{query,keys}  */layers/#/self_attention/{query,key}
    *.transformer.#.self_attn.linear_values        */layers/#/self_attention/value
    *.transformer.#.self_attn.final_linear         */layers/#/self_attention/out
    *.transformer.#.feed_forward.{w_1,w_3,w_2}     */layers/#/feed_forward/{expand,gate,contract}
    *.layer_norm                                   */final_norm
    """,
    encoder="""
    *.transformer.#.layer_norm                     */layers/#/residuals/0/norm
    *.transformer.#.feed_forward.layer_norm        */layers/#/residuals/1/norm
    *.embeddings.make_embedding.emb_luts.0.weight  embedding/embedding
    """,
    decoder="""
    *.transformer.#.context_attn.linear_{query,keys}  */layers/#/cross_attention/{query,key}
    *.transformer.#.context_attn.linear_values     */layers/#/cross_attention/value
    *.transformer.#.context_attn.final_linear      */layers/#/cross_attention/out
    *.transformer.#.layer_norm_1                   */layers/#/residuals/0/norm
    *.transformer.#.layer_norm_2                   */layers/#/residuals/1/norm
    *.transformer.#.feed_forward.layer_norm        */layers/#/residuals/2/norm
    *.embeddings.make_embedding.emb_luts.0.weight  target_embedding/embedding
    generator.weight                               output_embedding/embedding
    generator.bias                                 logits_bias
    """,
)
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_erf", "silu": "swish", "gated-silu": "swiglu"}
SINUSOIDS = {"SinusoidalInterleaved": ("neighbours", "paper")}
SINUSOIDS |= {"SinusoidalConcat": ("halves", "tensor2tensor")}
# Options that change outputs, and the values that a model here can have.
HOLDS: dict[str, tuple[Any, ...]] = {
    "encoder_type": ("transformer",),
    "decoder_type": ("transformer",),
    "position_encoding": (True,),
    "max_relative_positions": (0,),
    "parallel_residual": (False,),
    "num_experts": (0,),
    "sliding_window": (0,),
    "copy_attn": (False,),
    "feat_merge": ("concat", None),
    "aan_useffn": (False,),
    "generator_function": ("softmax",),
    "pos_ffn_activation_fn": tuple(ACTIVATIONS),
    "position_encoding_type": (None, *SINUSOIDS),
}
TABLES = [f"{stack}.embeddings.make_embedding.emb_luts.0.weight" for stack in SIDES]
TABLES += ["generator.weight"]
POSITIONS = [f"{stack}.embeddings.make_embedding.pe.pe" for stack in SIDES]
DECODING: Values = BEAMS | {"beam_size": 5, "length_penalty": 0.0, "early_stopping": "true"}
DECODING |= {"max_length": 250}


def read(path: Path, tokenizer: Path | None) -> Imported:
    """Returns the model in a checkpoint file; see `plain_tokenizers` for `tokenizer`.

    Raises:
      UserError: it is no such file, or our model has no such part.
    """
    saved = load_torch(path)
    if not {"model", "generator", "vocab", "opt"} <= saved.keys():
        raise UserError(f"{path} lacks model, generator, vocab or opt: not from OpenNMT-py 3")
    state = {name.replace("_layers.", "."): value for name, value in saved["model"].items()}
    tensors = torch_tensors(state | {f"generator.{k}": v for k, v in saved["generator"].items()})
    options, vocab = vars(saved["opt"]), saved["vocab"]
    for name, values in HOLDS.items():
        if name in options and options[name] not in values:
            raise UserError(f"{path}: {name}={options[name]} is not supported")
    depths = count_layers(NAMING, tensors)
    knobs = _knobs(tensors, options, depths)
    pieces = {"source": list(vocab["src"]), "target": list(vocab["tgt"])}
    model = Model(ModelConfig(**knobs), len(pieces["source"]), len(pieces["target"]))
    layout = find(expand(NAMING, depths, model.shapes), tensors, {*TABLES, *POSITIONS})
    first = {"source": "<s>", "target": vocab.get("decoder_start_token") or "<s>"}
    ids = {
        side: token_ids(own, "<blank>", "</s>", first[side], "<s>", "<unk>")
        for side, own in pieces.items()
    }
    tokenizers = plain_tokenizers(pieces, ids, tokenizer, source_eos=False)
    return Imported("Transformer", knobs, dict(DECODING), tokenizers, layout, tensors)


def _knobs(tensors: Any, options: Values, depths: Values) -> Values:
    """The knobs of `ModelConfig`."""
    heads = options.get("heads", 8)
    kind = options.get("position_encoding_type") or "SinusoidalInterleaved"
    layout, rates = SINUSOIDS[kind]
    return infer_knobs(tensors, expand(NAMING, depths), heads, pre=True) | {
        "num_layers": depths["encoder"],
        "decoder_layers": depths["decoder"],
        "feed_forward": ACTIVATIONS[options.get("pos_ffn_activation_fn", "relu")],
        "norm_epsilon": options.get("norm_eps", 1e-6),
        "sinusoid_layout": layout,
        "sinusoid_rates": rates,
        "tie_embeddings": tied(*(tensors[name] for name in TABLES)),
    }
