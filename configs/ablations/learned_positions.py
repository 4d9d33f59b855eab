"""Learned instead of sinusoidal positions: row E of Table 3 (Vaswani et al. 2017).

`python scripts/sweep.py --sweep=configs/ablations/learned_positions.py --jobs=4`
"""

from lab.sweeps import PaperRow, Sweep


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        variants={name: {"model.position_encoding": name} for name in ("sinusoidal", "learned")},
        baseline="sinusoidal",
        seeds=10,
        paper={
            "base, sinusoidal": PaperRow(millions=65),
            "learned": PaperRow({"model.position_encoding": "learned"}),
        },
        note="The paper finds no difference. `learned` adds 2 · `max_length` · D parameters.",
    )
