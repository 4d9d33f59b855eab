"""Writes a run folder of weights of another library, such as those of Hugging Face Transformers.

    python scripts/import_weights.py --from=DIR --workdir=runs/opus
    echo "Hello." | python scripts/predict.py --workdir=runs/opus

Prediction, evaluation on a file and `--config.init_from` use the new folder like any other. Its
config holds the decoding defaults of the imported model. See docs/interop.md.
"""

from pathlib import Path

import jax
from absl import flags

from transformer import cli
from transformer.console import facts
from transformer.interop.importing import import_run

FROM = flags.DEFINE_string("from", None, "The folder of the weights.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The new run's folder.", required=True)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A SentencePiece model, for a folder that holds only a vocabulary."
)
SOURCE_PREFIX = flags.DEFINE_string(
    "source_prefix", None, "Tokens before each source, such as >>deu<<; text if it ends in a space."
)
TARGET_PREFIX = flags.DEFINE_string("target_prefix", None, "The first token of all outputs.")


def main() -> None:
    """Imports the weights and prints what was made of them."""
    jax.config.update("jax_platforms", "cpu")
    tokenizer = Path(TOKENIZER.value) if TOKENIZER.value else None
    prefixes = {"source_prefix": SOURCE_PREFIX.value, "target_prefix": TARGET_PREFIX.value}
    run = import_run(Path(FROM.value), Path(WORKDIR.value), tokenizer=tokenizer, **prefixes)
    origin, sides = run.workdir.read_record()["imported"], run.tokenizers
    sizes = dict.fromkeys(f"{each.vocab_size:,}" for each in sides)
    beams = run.config.decoding
    facts(
        {
            "imported": f"{origin['family']} from {origin['from']} ({origin['format']})",
            "parameters": f"{run.model.count_parameters():,}",
            "vocabulary": f"{' and '.join(sizes)} tokens",
            "decoding": f"{beams.beam_size} beams, at most {beams.max_length} tokens",
            "workdir": str(run.workdir.path),
        }
    )


if __name__ == "__main__":
    cli.run(main)
