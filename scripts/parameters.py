"""Counts the parameters of the paper's models, by shape evaluation alone and by formula.

Nothing is computed or stored: any machine will do. The paper rounds to millions and does
not say how large the vocabulary of Table 3 is; its text speaks of about 37,000 shared pieces.

Usage:
    python scripts/parameters.py
"""

from pathlib import Path

from transformer.config import load_config
from transformer.console import table
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

PIECES = 37_000
CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = {"base": 65, "big": 213}  # Table 3, last column, millions


def formula(config: ModelConfig, vocab_size: int) -> int:
    """The parameters of the paper's architecture: post-norm, tied, no bias in attention.

    A layer's attention has 4 D², its feed-forward 2 D F + F + D, each norm 2 D; the
    encoder's layer has one attention and two norms, the decoder's two and three.
    """
    width, ff_width = config.d_model, config.d_ff
    attention, norm = 4 * width**2, 2 * width
    feed_forward = 2 * width * ff_width + ff_width + width
    layer_pair = 3 * attention + 2 * feed_forward + 5 * norm
    return config.num_layers * layer_pair + vocab_size * width


def main() -> None:
    """Prints the table."""
    rows = []
    for name, paper in PAPER.items():
        config = ModelConfig(**load_config(CONFIGS / f"vaswani_{name}.py").model)
        exact = Model(config, PIECES).count_parameters()
        by_hand = formula(config, PIECES)
        # The vocabulary that the paper's figure would need, all else being equal.
        needed = (paper * 1e6 - formula(config, 0)) / config.d_model
        rows.append(
            (
                name,
                f"{exact:,}",
                f"{by_hand:,}",
                f"{paper}M",
                f"{exact / 1e6 - paper:+.1f}M",
                f"{needed:,.0f}",
            )
        )
    columns = ("model", "by shapes", "by formula", "paper", "difference", "pieces to match")
    table(f"parameters with {PIECES:,} shared pieces", columns, rows)


if __name__ == "__main__":
    main()
