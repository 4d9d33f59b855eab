"""Steps to a target accuracy with each norm, in batches of 4 strings (after Ba et al. 2016).

`python scripts/sweep.py --sweep=configs/ablations/convergence_4.py --jobs=4`
"""

from collections.abc import Sequence

from lab.sweeps import Sweep, combined


def convergence(*, batch_size: int, steps: int, eval_every: int, rates: Sequence[float]) -> Sweep:
    """Each norm in a deep and in a shallow stack, at the same learning rates."""
    depths = {f"{n} layer{'s' * (n > 1)}": {"model.num_layers": n} for n in (4, 1)}
    learning_rates = {str(rate): {"optimizer.learning_rate": rate} for rate in rates}
    norms = {name: {"model.norm": name} for name in ("layer", "batch", "none")}
    return Sweep(
        config="configs/ablations/small.py",
        overrides={
            "batch_size": batch_size,
            "steps": steps,
            "log_every": eval_every,
            "eval_every": eval_every,
            "save_every": steps,
            "data.validation": "validation[:500]",
            # Narrow, so that four layers cost as much as one of width 64.
            "model.d_model": 32,
            "model.d_ff": 128,
            # A schedule without an end: the path to the target does not depend on the steps.
            "optimizer.schedule": "inverse_sqrt",
        },
        variants=combined(norms, depths, learning_rates),
        baseline=f"layer, 4 layers, {rates[2]}",
        seeds=8,
        target=0.5,
        note=f"Pre-norm, batches of {batch_size}. Every norm is trained at the same {len(rates)} "
        "learning rates; `scripts/claims.py` compares each at its best.",
    )


def get_sweep():
    rates = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    return convergence(batch_size=4, steps=3_600, eval_every=100, rates=rates)
