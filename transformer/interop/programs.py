"""Export of decoding as programs with the weights inside: StableHLO by `jax.export`, and ONNX."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Int

from transformer.data.tokenizer import PAD
from transformer.errors import UserError, explained, needs
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.modules.model import Model, Params
from transformer.modules.transformer import Cache

Shape = jax.ShapeDtypeStruct
LONGEST = 2**31 - 2**24  # bytes of weights; a file of StableHLO ends at 2 GiB
LOADER = '''"""decode(tokens) → tokens [B, J, T] and scores [B, J] of the outputs, best first.

`tokens` are int32 [B, S]: each source's token ids with EOS (2), then zeros.
"""

from pathlib import Path

import jax
import jax.export  # needs flatbuffers

PROGRAM = Path(__file__).with_name("model.stablehlo").read_bytes()
decode = jax.jit(jax.export.deserialize(bytearray(PROGRAM)).call)
'''


def portable(model: TrainedModel, **knobs: Any) -> tuple[Model, Params]:
    """The model without kernels for one platform, with other `knobs`, and its variables."""
    config = replace(model.model.config, attention_backend="einsum", **knobs)
    variables = {name: jnp.asarray(np.asarray(leaf)) for name, leaf in model.variables.items()}
    return Model.of(config, *model.tokenizers), variables


def longest_output(model: TrainedModel, decoding: DecodingConfig, source: int) -> int:
    """The most tokens in the output for a source of this length."""
    (limit,) = decoding.limits(np.array([source]), model.config.decode_margin).tolist()
    return model.config.model.reach(limit)


def decoder(model: TrainedModel, decoding: DecodingConfig, longest: int, **knobs: Any) -> Callable:
    """Decoding of [B, S] sources with S up to `longest`, as a function of the tokens alone."""
    for name, neutral in (("temperature", 0.0), ("length_ratio", 1.0), ("distinct", False)):
        if (value := getattr(decoding, name)) != neutral:
            raise UserError(f"an exported program cannot do {name}={value}; set {name}={neutral}")
    if longest > model.positions:
        raise UserError(f"sources of {longest} tokens exceed the model's {model.positions:,}")
    whole, variables = portable(model, **knobs)
    shortest, most = (longest_output(model, decoding, length) for length in (1, longest))
    static, prefix = decoding.split_prefix(model.tokenizers.target, shortest)
    first = None if prefix is None else jnp.asarray(prefix)

    def decode(tokens: Int[Array, "B S"]) -> tuple[Array, Array]:
        limits = {"margin": model.config.decode_margin, "max_length": most}
        found = evaluation.decode(whole, variables, tokens, None, first, static, **limits)
        return found.tokens, found.scores

    return decode


def to_stablehlo(model: TrainedModel, out: Path, decoding: DecodingConfig, longest: int) -> None:
    """Writes `model.stablehlo`, the tokenizers, and `load.py`, which needs jax and flatbuffers.

    The program decodes any number of sources of up to `longest` tokens on CPUs, GPUs and TPUs.
    """
    decode = decoder(model, decoding, longest)
    if sum(leaf.nbytes for leaf in model.variables.values()) > LONGEST:
        raise UserError("the weights exceed 2 GiB, the most in such a file; export to huggingface")
    limits = ("b >= 1", "s >= 1", f"s <= {longest}")
    sources = Shape(jax.export.symbolic_shape("b, s", constraints=limits), jnp.int32)
    with jax.enable_x64(False):
        exported = jax.export.export(jax.jit(decode), platforms=("cpu", "cuda", "tpu"))(sources)
    with needs("export"):
        blob = exported.serialize()
    model.tokenizers.save(out / "tokenizers")
    (out / "model.stablehlo").write_bytes(blob)
    (out / "load.py").write_text(LOADER, encoding="utf-8")


def to_onnx(model: TrainedModel, out: Path, shapes: Iterable[tuple[int, int]]) -> None:
    """Writes a folder for each shape [B, S] of sources, and the tokenizers.

    `greedy.onnx` maps sources to outputs [B, 1, T] and their log p, `encoder.onnx` to the first
    cache, and `decoder_step.onnx` maps a token of each source [B, 1] and the cache to logits and
    what changes in the cache.
    """
    if (name := model.config.model.architecture) != "transformer":
        raise UserError(f"ONNX cannot hold model.architecture={name}: export to stablehlo")
    for rows, length in shapes:
        _write_graphs(model, out / f"{rows}x{length}", Shape((rows, length), jnp.int32))
    model.tokenizers.save(out / "tokenizers")


def _write_graphs(model: TrainedModel, folder: Path, source: Shape) -> None:
    """Writes the three graphs for sources of one shape."""
    simple = {"dtype": "float32", "scan_layers": False}  # what jax2onnx can convert
    decoding, (rows, length) = replace(model.config.decoding, beam_size=1), source.shape
    greedy, inputs = decoder(model, decoding, length, **simple), {"source": source}
    whole, variables = portable(model, **simple)

    def encode(source: Int[Array, "B S"]) -> Cache:
        module, segments = whole.bind(variables), (source != PAD).astype(jnp.int32)
        memory, most = module.encode(source, segments), longest_output(model, decoding, length)
        cache = module.start_cache(memory, segments, most)
        # Its layers share their zeros; outputs of a graph have one name each.
        return cache._replace(decoded=jax.tree.map(jnp.zeros_like, cache.decoded))

    paths, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(encode, source))
    cache = {jax.tree_util.keystr(path, simple=True, separator="_"): leaf for path, leaf in paths}
    changed = [name for name in cache if name.startswith(("filled", "decoded"))]

    def step(token: Int[Array, "B 1"], *leaves: Array) -> tuple[Array, ...]:
        logits, new = whole.bind(variables).decode_step(token, structure.unflatten(leaves))
        after = dict(zip(cache, jax.tree.leaves(new), strict=True))
        return logits[:, 0], *(after[name] for name in changed)

    _write(folder / "greedy.onnx", greedy, inputs, ["tokens", "scores"])
    _write(folder / "encoder.onnx", encode, inputs, list(cache))
    names = ["logits", *(f"next_{name}" for name in changed)]
    inputs = {"token": Shape((rows, 1), jnp.int32)} | cache
    _write(folder / "decoder_step.onnx", step, inputs, names)


def _write(path: Path, function: Callable, inputs: dict[str, Shape], outputs: list[str]) -> None:
    """Writes a function of arrays as ONNX.

    It is traced here: jax2onnx has rules of its own for modules of Flax, which subclasses break.
    """
    # It asks for an older orbax-checkpoint, which it does not need for this.
    with explained("export to ONNX: pip install --no-deps jax2onnx onnx onnx-ir", ImportError):
        from jax2onnx import to_onnx as convert
    path.parent.mkdir(exist_ok=True)
    given, failed = list(inputs.values()), "jax2onnx cannot convert this model: export to stablehlo"
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs}
    with jax.enable_x64(False), explained(f"{failed} ({{kind}}: {{reason}})"):
        traced = jaxpr_as_fun(jax.make_jaxpr(function)(*given))
        convert(lambda *x: tuple(traced(*x)), given, return_mode="file", output_path=path, **names)
