"""The width of keys, d_k: rows B of Table 3 (Vaswani et al. 2017), at a laptop's size.

`python scripts/sweep.py --sweep=configs/ablations/head_width.py --jobs=4`
"""

from lab.sweeps import PaperRow, Sweep


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides={"model.d_v": 16},
        variants={f"d_k {width}": {"model.d_k": width} for width in (1, 2, 4, 8, 16, 32)},
        baseline="d_k 16",
        seeds=16,
        paper={
            "base, d_k 64": PaperRow(millions=65),
            "d_k 16": PaperRow({"model.d_k": 16, "model.d_v": 64}, 58),
            "d_k 32": PaperRow({"model.d_k": 32, "model.d_v": 64}, 60),
        },
        note="4 heads throughout, with values of width 16; the paper has 8 with values of 64.",
    )
