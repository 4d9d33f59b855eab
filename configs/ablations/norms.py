"""Norm × placement × warm-up (Xiong et al. 2020: post-norm needs a warm-up, pre-norm does not).

`python scripts/sweep.py --sweep=configs/ablations/norms.py --jobs=4`
"""

from lab.sweeps import Sweep, combined


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        # Deep for its width: the placement of norms matters more with more layers.
        overrides={"model.num_layers": 4, "model.d_model": 32, "model.d_ff": 128, "batch_size": 32},
        variants=combined(
            {name: {"model.norm": name} for name in ("layer", "rms", "batch")},
            {name: {"model.norm_placement": name} for name in ("pre", "post", "both")},
            {"": {"optimizer.warmup_steps": 50}, "no warm-up": {"optimizer.warmup_steps": 0}},
        )
        | {
            "none": {"model.norm": "none", "optimizer.warmup_steps": 50},
            "none, no warm-up": {"model.norm": "none", "optimizer.warmup_steps": 0},
        },
        baseline="layer, pre",
        seeds=5,
        target=0.5,
        note="Xiong et al. 2020 say that post-norm needs a warm-up of the learning rate and "
        "pre-norm does not. Four layers of width 32; warm-up is 50 steps or none.",
    )
