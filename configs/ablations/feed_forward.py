"""Kinds of feed-forward at equal parameters (Shazeer 2020; Narang et al. 2021).

`python scripts/sweep.py --sweep=configs/ablations/feed_forward.py --jobs=4`
"""

from lab.sweeps import Sweep

from transformer.modules.layers import FEED_FORWARDS


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        overrides={"model.d_ff": 192},  # two thirds of it are a multiple of 8
        variants={name: {"model.feed_forward": name} for name in FEED_FORWARDS},
        baseline="relu",
        seeds=5,
        note="For a T5 of 220M parameters Narang et al. 2021 report final losses of 1.838 (relu), "
        "1.838 (gelu), 1.847 (swish), 1.814 (glu), 1.792 (geglu) and 1.789 (swiglu).",
    )
