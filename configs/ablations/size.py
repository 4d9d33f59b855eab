"""Layers, width and feed-forward width: rows C of Table 3 (Vaswani et al. 2017), small.

`python scripts/sweep.py --sweep=configs/ablations/size.py --jobs=4`
"""

from lab.sweeps import PaperRow, Sweep


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides={"model.d_model": 32, "model.d_ff": 128},
        variants={
            "base": {},
            "2 layers": {"model.num_layers": 2},
            "4 layers": {"model.num_layers": 4},
            "width 16": {"model.d_model": 16},
            "width 64": {"model.d_model": 64},
            "ff 64": {"model.d_ff": 64},
            "ff 256": {"model.d_ff": 256},
        },
        baseline="base",
        seeds=5,
        paper={
            "base": PaperRow(millions=65),
            "2 layers": PaperRow({"model.num_layers": 2}, 36),
            "4 layers": PaperRow({"model.num_layers": 4}, 50),
            "8 layers": PaperRow({"model.num_layers": 8}, 80),
            "width 256, d_k 32": PaperRow({"model.d_model": 256, "model.d_k": 32}, 28),
            "width 1024, d_k 128": PaperRow({"model.d_model": 1024, "model.d_k": 128}, 168),
            "ff 1024": PaperRow({"model.d_ff": 1024}, 53),
            "ff 4096": PaperRow({"model.d_ff": 4096}, 90),
        },
        note="The baseline has 1 layer of width 32 with a feed-forward of 128, 4 heads throughout.",
    )
