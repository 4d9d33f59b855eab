"""Export of decoding as one StableHLO program, by `jax.export`, with the weights inside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Int

from transformer.errors import UserError, explained
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.modules.model import Model, Params

Decoder = Callable[[Array], tuple[Array, Array]]
PLATFORMS = ("cpu", "cuda", "tpu")
LONGEST = 2**31 - 2**24  # bytes of weights; the file format ends at 2 GiB
LOADER = '''"""decode(tokens) → tokens [B, J, T] and scores [B, J] of the outputs, best first.

`tokens` are int32 [B, S]: each source's token ids with EOS (2), then zeros.
"""

from pathlib import Path

import jax
import jax.export  # needs flatbuffers

PROGRAM = Path(__file__).with_name("model.stablehlo").read_bytes()
decode = jax.jit(jax.export.deserialize(bytearray(PROGRAM)).call)
'''


def check(decoding: DecodingConfig) -> None:
    """Raises a UserError for decoding that an exported program cannot do."""
    for name, neutral in (("temperature", 0.0), ("length_ratio", 1.0), ("distinct", False)):
        if (value := getattr(decoding, name)) != neutral:
            raise UserError(f"an exported program cannot do {name}={value}; set {name}={neutral}")


def portable(model: TrainedModel, **changes: Any) -> tuple[Model, Params]:
    """The model without kernels for one platform, with `changes` of knobs, and its variables."""
    own = model.model
    config = replace(own.config, attention_backend="einsum", **changes)
    sizes = own.vocab_size, own.target_vocab_size
    whole = Model(config, *sizes, tokens=own.tokens, outputs=own.outputs)
    return whole, {name: jnp.asarray(np.asarray(leaf)) for name, leaf in model.variables.items()}


def decoder(model: TrainedModel, decoding: DecodingConfig, longest: int, **changes: Any) -> Decoder:
    """Decoding of [B, S] sources with S up to `longest`, as a function of the tokens alone."""
    check(decoding)
    whole, variables = portable(model, **changes)
    margin = decoding.margin(model.config.decode_margin)
    if longest > model.positions:
        raise UserError(f"sources of {longest} tokens exceed the model's {model.positions:,}")
    most = whole.config.reach(int(decoding.limits(np.array([longest]), margin)[0]))
    static, prefix = decoding.split_prefix(model.tokenizers.target, most)
    if prefix is not None and len(prefix) > margin:  # a short source leaves no room
        raise UserError(f"prefix has {len(prefix)} tokens: raise decode_margin to as many")
    first = None if prefix is None else jnp.asarray(prefix)

    def decode(tokens: Int[Array, "B S"]) -> tuple[Array, Array]:
        options = {"prefix": first, "decoding": static, "margin": margin, "max_length": most}
        found = evaluation.decode(whole, variables, tokens, **options)
        return found.tokens, found.scores

    return decode


def program(model: TrainedModel, decoding: DecodingConfig, longest: int) -> jax_export.Exported:
    """`decoder` for any B and S on all `PLATFORMS`."""
    decode = decoder(model, decoding, longest)
    if sum(leaf.nbytes for leaf in model.variables.values()) > LONGEST:
        raise UserError("the weights exceed 2 GiB, the most in such a file; export to huggingface")
    shape = jax_export.symbolic_shape("b, s", constraints=("b >= 1", "s >= 1", f"s <= {longest}"))
    sources = jax.ShapeDtypeStruct(shape, jnp.int32)
    with jax.enable_x64(False):
        return jax_export.export(jax.jit(decode), platforms=PLATFORMS)(sources)


def export(model: TrainedModel, out: Path, decoding: DecodingConfig, longest: int) -> None:
    """Writes `model.stablehlo`, the tokenizers, and `load.py`, which needs jax and flatbuffers.

    Raises:
      UserError: such a program cannot do what is asked for, or flatbuffers is not installed.
    """
    exported = program(model, decoding, longest)
    with explained("export to StableHLO: pip install flatbuffers", ImportError):
        blob = exported.serialize()
    model.tokenizers.save(out / "tokenizers")
    (out / "model.stablehlo").write_bytes(blob)
    (out / "load.py").write_text(LOADER, encoding="utf-8")
