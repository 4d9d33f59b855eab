"""Position encodings, with accuracy on sources longer than any in training.

`python scripts/sweep.py --sweep=configs/ablations/positions.py --jobs=4`
"""

from lab.sweeps import Sweep

KINDS = ("sinusoidal", "learned", "rotary", "relative", "alibi", "none")


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides={"model.max_length": 32},  # room for sources of 24 letters and EOS
        variants={kind: {"model.position_encoding": kind} for kind in KINDS}
        | {
            f"{kind}, random": {"model.position_encoding": kind, "model.random_positions": 128}
            for kind in KINDS[:4]
        },
        baseline="sinusoidal",
        seeds=5,
        splits=("test_longer",),
        note="Training sources have 1 to 16 letters, `test_longer` 17 to 24. `random` draws "
        "positions from 0 … 127 in training (Ruoss et al. 2023, there with an encoder alone) "
        "and spaces them by 4 in evaluation. Rotary, relative (T5) and ALiBi act in "
        "self-attention only.",
    )
