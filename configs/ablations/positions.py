"""Position encodings, with accuracy on sources longer than any in training.

Usage:
    python scripts/sweep.py --sweep=configs/ablations/positions.py --jobs=4
"""

from lab.sweeps import Sweep

KINDS = ("sinusoidal", "learned", "rotary", "relative", "alibi", "none")

# Room for sources of 24 letters and EOS, and the positions that random ones are drawn from.
REACH = {"model.max_length": 32}
RANDOM = {"model.random_positions": 128}


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides=REACH,
        variants={kind: {"model.position_encoding": kind} for kind in KINDS}
        | {
            f"{kind}, random": {"model.position_encoding": kind, **RANDOM}
            for kind in ("sinusoidal", "learned", "rotary", "relative")
        },
        baseline="sinusoidal",
        seeds=5,
        splits=("test_longer",),
        note=(
            "Training sources have 1 to 16 letters, `test_longer` 17 to 24. `random` draws "
            "positions from 0 … 127 in training (Ruoss et al. 2023, there with an encoder alone) "
            "and spaces them by 4 in evaluation. Rotary, relative (T5) and ALiBi act in "
            "self-attention only."
        ),
    )
