"""Writes a trained model in the format of another library.

    python scripts/export.py --workdir=runs/x --to=huggingface --out=exported
    python scripts/export.py --workdir=runs/x --to=ctranslate2 --out=exported [--quantization=int8]
    python scripts/export.py --workdir=runs/x --to=stablehlo --out=exported --beam_size=4
    python scripts/export.py --workdir=runs/x --to=onnx --out=exported --shapes=1x16,8x32

CTranslate2 takes the tokens of its vocabulary files, and ends a source with EOS by itself. Decode
with `min_decoding_length=0` and `suppress_sequences` of `<pad>`, `<s>` and all `<unused …>`, which
this library never outputs.
StableHLO is the whole loop of decoding with the given settings; `load.py` in the folder loads it.
ONNX has greedy decoding, the encoder and a step of the decoder for each shape of sources.
"""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from transformer import cli
from transformer.console import facts
from transformer.errors import UserError, explained
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.interop import ctranslate2, huggingface_export, programs
from transformer.run import Run


class Target(NamedTuple):
    """A format: the flags that it uses, and what writes a folder."""

    flags: tuple[str, ...]
    export: Callable[[TrainedModel, Path], None]


def to_ctranslate2(model: TrainedModel, out: Path) -> None:
    """Writes a folder for `ctranslate2.Translator`."""
    ctranslate2.export(model, out, QUANTIZATION.value)


def to_stablehlo(model: TrainedModel, out: Path) -> None:
    """Writes a program for `jax.export` and its loader."""
    longest = LONGEST.value or min(512, model.positions)
    programs.to_stablehlo(model, out, cli.decoding(model.config.decoding), longest)


def to_onnx(model: TrainedModel, out: Path) -> None:
    """Writes graphs for ONNX runtimes."""
    shapes = []
    for text in SHAPES.value:
        rows, _, length = text.partition("x")
        if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
            raise UserError(f"--shapes: {text!r} is not rows x length, such as 8x32")
        shapes.append((int(rows), int(length)))
    programs.to_onnx(model, out, shapes)


TARGETS = {
    "huggingface": Target((), huggingface_export.export),
    "ctranslate2": Target(("quantization",), to_ctranslate2),
    "stablehlo": Target(("longest", *(x.name for x in fields(DecodingConfig))), to_stablehlo),
    "onnx": Target(("shapes",), to_onnx),
}
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
TO = flags.DEFINE_enum("to", None, list(TARGETS), "The format.", required=True)
OUT = flags.DEFINE_string("out", None, "The new folder.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Which replica of a population.")
QUANTIZATION = flags.DEFINE_enum(
    "quantization", None, list(ctranslate2.QUANTIZATIONS), "Of the weights; default float32."
)
LONGEST = flags.DEFINE_integer(
    "longest", None, "Tokens in a source at most; default 512, or the positions.", lower_bound=1
)
SHAPES = flags.DEFINE_list("shapes", ["1x32"], "Rows x length of sources, such as 1x16,8x32.")
cli.define_decoding_flags()
cli.define_plugins_flag()


def main() -> None:
    """Writes the folder and prints its name."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the run
    out, target = Path(OUT.value), TARGETS[TO.value]
    for name in {name for each in TARGETS.values() for name in each.flags} - {*target.flags}:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does nothing for --to={TO.value}; leave it out")
    unwritable = f"--out={out}: {{reason}}; choose a folder that can be written"
    with explained(unwritable, OSError):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out={out} is not an empty folder; choose a new one")
    model = Run.saved(WORKDIR.value).trained_model(CHECKPOINT.value, REPLICA.value)
    with explained(unwritable, OSError):
        out.mkdir(parents=True, exist_ok=True)
        try:
            target.export(model, out)
        except BaseException:  # a part would look like a model, and be in the way next time
            shutil.rmtree(out, ignore_errors=True)
            raise
    facts({TO.value: str(out)})


if __name__ == "__main__":
    cli.run(main)
