"""SCAN's length cut-off by the recipe of `scan_simple.py`, in hours on a CPU.

The paper's own recipe is in `scan_length.py`.

    python scripts/reproduce.py scan_length_short
"""

from dataclasses import replace
from pathlib import Path

from transformer.config import load_config

FOLDER = Path(__file__).parent


def get_config():
    config = load_config(FOLDER / "scan_simple.py")
    config.steps = 5_000
    config.data.dataset = "scan_grammar/length_26"
    config.data.validation = "validation"
    return config


def get_published():
    return replace(
        load_config(FOLDER / "scan_length.py", "get_published"),
        seeds=3,
        flops=4.59e13,
        note="""The recipe is that of scan_simple, not the one of the paper, with 5,000 updates, a
thirtieth of the computation. It tests whether the paper's result needs the paper's recipe: after
learning the training distribution, every seed with relative positions is better on longer outputs
than every one with absolute positions, but the seeds are too far apart for a verdict.""",
    )
