"""Export to CTranslate2, through its public `TransformerSpec`; needs no PyTorch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from transformer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from transformer.errors import UserError, explained
from transformer.inference.generation import TrainedModel
from transformer.modules.config import ModelConfig
from transformer.modules.layers import FEED_FORWARDS
from transformer.modules.positions import Sinusoidal

if TYPE_CHECKING:
    from ctranslate2.specs import TransformerSpec

Weights = Mapping[str, np.ndarray]
ROWS = 2048  # of the table that sinusoidal positions are written as; longer texts are refused there
SPECIAL = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
ACTIVATIONS = {"relu": "RELU", "gelu": "GELUTanh", "swish": "SWISH", "glu": "Sigmoid"}
ACTIVATIONS |= {"reglu": "RELU", "geglu": "GELUTanh", "swiglu": "SWISH"}
QUANTIZATIONS = ("int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16")
# The values of knobs that the export was compared for; every other value is refused.
HOLDS: dict[str, tuple[Any, ...]] = {
    "architecture": ("transformer",),
    "norm": ("layer", "rms"),
    "norm_placement": ("pre", "post"),
    "position_encoding": ("sinusoidal", "learned", "rotary"),
    "random_positions": (0,),
    "window": (None,),
    "normalize_qk": (False,),
}


def check(config: ModelConfig) -> None:
    """Raises a UserError for a model that CTranslate2 cannot hold, with the knob's name."""
    for knob, values in HOLDS.items():
        if (value := getattr(config, knob)) not in values:
            names = " or ".join(map(str, values))
            raise UserError(f"CTranslate2 cannot hold model.{knob}={value}: train with {names}")
    if config.values_width() != config.attention_width():
        raise UserError("CTranslate2 cannot hold model.d_v unlike model.d_k: train with d_v=None")


def vocabulary(tokenizer: Tokenizer, size: int) -> list[str]:
    """A distinct text for each of `size` token ids; the ids themselves if symbols coincide."""
    known = range(len(tokenizer.pieces))
    texts = [SPECIAL.get(i) or tokenizer.pieces[i] for i in known]
    if len(set(texts)) < len(texts):  # bytes, whose parts of characters look alike
        texts = [SPECIAL.get(i) or str(i) for i in known]
    return texts + [f"<unused {i}>" for i in range(len(texts), size)]


def _projection(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """`weight` [out, in], and `bias` if there is one, of projections side by side."""
    kernels, biases = [], []
    for name in names:
        kernel = weights[f"{name}/kernel"]
        axes = kernel.ndim - 1 if name.endswith("/out") else 1  # those that are the input's
        kernels.append(kernel.reshape(np.prod(kernel.shape[:axes], dtype=int), -1).T)
        if (bias := weights.get(f"{name}/bias")) is not None:
            biases.append(bias.reshape(-1))
    yield "weight", np.concatenate(kernels)
    if biases:
        yield "bias", np.concatenate(biases)


def variables(config: ModelConfig, weights: Weights) -> dict[str, np.ndarray]:
    """The float32 arrays of CTranslate2's variables, by their names."""
    out: dict[str, np.ndarray] = {}

    def project(target: str, *sources: str) -> None:
        for part, array in _projection(weights, sources):
            out[f"{target}/{part}"] = array

    def normalize(target: str, source: str) -> None:
        for part, ours in (("gamma", "scale"), ("beta", "bias")):
            if f"{source}/{ours}" in weights:
                out[f"{target}/{part}"] = weights[f"{source}/{ours}"]

    for stack, side in (("encoder", "source"), ("decoder", "target")):
        for i in range(config.num_layers):
            ours, theirs = f"{stack}/layers/{i}", f"{stack}/layer_{i}"
            names = ["self_attention", "ffn"]
            one = f"{ours}/self_attention"
            project(
                f"{theirs}/self_attention/linear_0",
                *(f"{one}/{x}" for x in ("query", "key", "value")),
            )
            project(f"{theirs}/self_attention/linear_1", f"{one}/out")
            if stack == "decoder":
                names.insert(1, "attention")
                one = f"{ours}/cross_attention"
                project(f"{theirs}/attention/linear_0", f"{one}/query")
                project(f"{theirs}/attention/linear_1", f"{one}/key", f"{one}/value")
                project(f"{theirs}/attention/linear_2", f"{one}/out")
            project(f"{theirs}/ffn/linear_0", f"{ours}/feed_forward/expand")
            if FEED_FORWARDS[config.feed_forward][1]:
                project(f"{theirs}/ffn/linear_0_noact", f"{ours}/feed_forward/gate")
            project(f"{theirs}/ffn/linear_1", f"{ours}/feed_forward/contract")
            for k, name in enumerate(names):
                normalize(f"{theirs}/{name}/layer_norm", f"{ours}/residuals/{k}/norm")
        normalize(f"{stack}/layer_norm", f"{stack}/final_norm")
        if config.position_encoding != "rotary":
            table = weights.get(f"{side}_position/embedding")
            out[f"{stack}/position_encodings/encodings"] = (
                _sinusoids(config) if table is None else table
            )
    tables = {
        name: weights.get(f"{name}/embedding", weights["embedding/embedding"])
        for name in ("embedding", "target_embedding", "output_embedding")
    }
    out["encoder/embeddings_0/weight"] = tables["embedding"]
    out["decoder/embeddings/weight"] = tables["target_embedding"]
    out["decoder/projection/weight"] = tables["output_embedding"]
    return {name: np.ascontiguousarray(array, np.float32) for name, array in out.items()}


def _sinusoids(config: ModelConfig) -> Float[np.ndarray, "T D"]:
    zeros = np.zeros((1, ROWS, config.d_model), np.float32)
    return np.asarray(Sinusoidal(config.d_model)(jax.numpy.asarray(zeros)))[0]


def spec(config: ModelConfig, weights: Weights) -> "TransformerSpec":
    """The model as a specification of CTranslate2, without vocabularies."""
    with explained("export to CTranslate2: pip install ctranslate2", ImportError):
        from ctranslate2 import specs
    check(config)
    options: dict[str, Any] = {
        "pre_norm": config.norm_placement == "pre",
        "activation": specs.Activation[ACTIVATIONS[config.feed_forward]],
        "ffn_glu": FEED_FORWARDS[config.feed_forward][1],
        "rms_norm": config.norm == "rms",
        "num_heads_kv": config.num_kv_heads,
        "head_dim": config.attention_width(),
    }
    if config.position_encoding == "rotary":
        options |= {"rotary_dim": 0, "rotary_interleave": False}
    size = config.num_layers, config.num_heads
    encoder = specs.TransformerEncoderSpec(*size, **options)
    decoder = specs.TransformerDecoderSpec(*size, **options)
    built = specs.TransformerSpec(encoder, decoder)
    for stack in (encoder, decoder):
        stack.scale_embeddings = True
    for name, array in variables(config, weights).items():
        *path, last = name.split("/")
        node = built
        for part in path:
            name, _, index = part.rpartition("_")  # layer_0 is an element of the list `layer`
            node = getattr(node, part) if hasattr(node, part) else getattr(node, name)[int(index)]
        setattr(node, last, array)
    return built


def export(model: TrainedModel, out: Path, quantization: str | None = None) -> None:
    """Writes a model folder for `ctranslate2.Translator`.

    Raises:
      UserError: CTranslate2 cannot hold the model, or is not installed.
    """
    config = model.config.model
    check(config)
    weights = {name: np.asarray(array, np.float32) for name, array in model.variables.items()}
    built = spec(config, weights)
    sizes = (built.encoder.embeddings[0].weight, built.decoder.embeddings.weight)
    source, target = map(vocabulary, model.tokenizers, map(len, sizes))
    built.register_source_vocabulary(source)
    built.register_target_vocabulary(target)
    built.config.bos_token, built.config.eos_token = SPECIAL[BOS], SPECIAL[EOS]
    built.config.decoder_start_token, built.config.add_source_eos = SPECIAL[BOS], True
    built.config.layer_norm_epsilon = config.norm_epsilon
    built.validate()
    built.optimize(quantization=quantization)
    built.save(str(out))
