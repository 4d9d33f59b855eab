"""Writes a trained model in the format of another library.

    python scripts/export.py --workdir=runs/x --to=ctranslate2 --out=exported [--quantization=int8]

The model takes the tokens of its vocabulary files, and ends a source with EOS by itself. Decode
with `suppress_sequences=[["<pad>"], ["<s>"]]` and `min_decoding_length=0`, as this library does.
"""

from pathlib import Path

import jax
from absl import flags

from transformer import cli
from transformer.console import facts
from transformer.errors import UserError, explained
from transformer.interop import ctranslate2
from transformer.run import Run

TARGETS = {"ctranslate2": ctranslate2}
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
TO = flags.DEFINE_enum("to", None, list(TARGETS), "The format.", required=True)
OUT = flags.DEFINE_string("out", None, "The new folder.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Which replica of a population.")
QUANTIZATION = flags.DEFINE_enum(
    "quantization", None, list(ctranslate2.QUANTIZATIONS), "Of the weights; default float32."
)
cli.define_plugins_flag()


def main() -> None:
    """Writes the folder and prints its name."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the run
    out = Path(OUT.value)
    with explained(f"--out={out}: choose a folder that can be written", OSError):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out={out} is not an empty folder; choose a new one")
        run = Run.saved(WORKDIR.value)
        TARGETS[TO.value].check(run.config.model)
        model = run.trained_model(CHECKPOINT.value, REPLICA.value)
        out.mkdir(parents=True, exist_ok=True)
        TARGETS[TO.value].export(model, out, QUANTIZATION.value)
    facts({TO.value: str(out)})


if __name__ == "__main__":
    cli.run(main)
