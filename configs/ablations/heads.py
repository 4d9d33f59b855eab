"""Heads at fixed width: rows A of Table 3 (Vaswani et al. 2017), at a laptop's size.

`python scripts/sweep.py --sweep=configs/ablations/heads.py --jobs=4`
"""

from lab.sweeps import PaperRow, Sweep


def get_sweep():
    names = {n: f"{n} head{'s' * (n > 1)}" for n in (1, 2, 4, 8, 16, 32)}
    paper = {1: 512, 4: 128, 8: 64, 16: 32, 32: 16}
    return Sweep(
        config="configs/ablations/small.py",
        variants={names[n]: {"model.num_heads": n} for n in (1, 2, 4, 8, 16)},
        baseline="4 heads",
        seeds=16,
        paper={
            f"{names[n]} of {width}": PaperRow({"model.num_heads": n}) for n, width in paper.items()
        },
        note="Width 64 throughout, so that N heads are 64/N wide. The paper's baseline is 8 of 64.",
    )
