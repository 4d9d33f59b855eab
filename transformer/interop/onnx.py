"""Export to ONNX by jax2onnx, for sources of fixed shapes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Int

from transformer.data.tokenizer import PAD
from transformer.errors import UserError, explained
from transformer.inference.generation import TrainedModel
from transformer.interop import stablehlo
from transformer.modules.config import ModelConfig
from transformer.modules.transformer import Cache


def check(config: ModelConfig) -> None:
    """Raises a UserError for a model that jax2onnx cannot convert, with the knob's name."""
    if config.architecture != "transformer":
        remedy = "export to stablehlo"
        raise UserError(f"ONNX cannot hold model.architecture={config.architecture}: {remedy}")


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Batch sizes and source lengths, written as 8x32."""
    shapes = []
    for text in texts:
        rows, _, length = text.partition("x")
        if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
            raise UserError(f"--shapes: {text!r} is not rows x length, such as 8x32")
        shapes.append((int(rows), int(length)))
    return shapes


def export(model: TrainedModel, out: Path, shapes: Sequence[tuple[int, int]]) -> None:
    """Writes a folder for each shape [B, S] of sources, and the tokenizers.

    `greedy.onnx` maps sources to outputs [B, 1, T] and their log p, `encoder.onnx` to the first
    cache, and `decoder_step.onnx` maps a token of each source [B, 1] and the cache to logits and
    what changes in the cache.

    Raises:
      UserError: jax2onnx cannot convert the model, or is not installed.
    """
    check(model.config.model)
    decoding = replace(model.config.decoding, beam_size=1)
    margin = decoding.margin(model.config.decode_margin)
    for rows, length in shapes:
        folder = out / f"{rows}x{length}"
        folder.mkdir()
        greedy = stablehlo.decoder(model, decoding, length, dtype="float32", scan_layers=False)
        source = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        _write(folder / "greedy.onnx", greedy, {"source": source}, ["tokens", "scores"])
        most = model.config.model.reach(int(decoding.limits(np.array([length]), margin)[0]))
        _write_parts(model, folder, source, most)
    model.tokenizers.save(out / "tokenizers")


def _write_parts(
    model: TrainedModel, folder: Path, source: jax.ShapeDtypeStruct, most: int
) -> None:
    """Writes the encoder and a decoding step with room for `most` target tokens."""
    whole, variables = stablehlo.portable(model, dtype="float32", scan_layers=False)

    def encode(source: Int[Array, "B S"]) -> Cache:
        module, segments = whole.bind(variables), (source != PAD).astype(jnp.int32)
        return module.start_cache(module.encode(source, segments), segments, most)

    cache = jax.eval_shape(encode, source)
    paths, structure = jax.tree_util.tree_flatten_with_path(cache)
    named = {jax.tree_util.keystr(path, simple=True, separator="_"): x for path, x in paths}
    changed = [name for name in named if name.startswith(("filled", "decoded"))]

    def step(token: Int[Array, "B 1"], *leaves: Array) -> tuple[Array, ...]:
        logits, new = whole.bind(variables).decode_step(token, structure.unflatten(leaves))
        after = dict(zip(named, jax.tree.leaves(new), strict=True))
        return logits[:, 0], *(after[name] for name in changed)

    _write(folder / "encoder.onnx", encode, {"source": source}, list(named))
    token = jax.ShapeDtypeStruct((source.shape[0], 1), jnp.int32)
    names = ["logits", *(f"next_{name}" for name in changed)]
    _write(folder / "decoder_step.onnx", step, {"token": token} | named, names)


def _write(path: Path, function: Callable, inputs: dict[str, Any], outputs: list[str]) -> None:
    """Writes a function of arrays.

    It is traced here: jax2onnx has rules of its own for modules of Flax, which subclasses break.
    """
    # It asks for an older orbax-checkpoint, which it does not need for this.
    with explained("export to ONNX: pip install --no-deps jax2onnx onnx onnx-ir", ImportError):
        from jax2onnx import to_onnx
    with jax.enable_x64(False):
        traced = jaxpr_as_fun(jax.make_jaxpr(function)(*inputs.values()))
        names = {"input_names": list(inputs), "output_names": outputs}
        options: dict[str, Any] = {"return_mode": "file", "output_path": str(path), **names}
        to_onnx(lambda *arrays: tuple(traced(*arrays)), list(inputs.values()), **options)
