"""How soon each norm gets to a target, at a batch of 4 strings (after Ba et al. 2016).

Usage:
    python scripts/sweep.py --sweep=configs/ablations/convergence_4.py --jobs=4
"""

from collections.abc import Sequence

from lab.sweeps import Sweep, combined


def convergence(*, batch_size: int, steps: int, eval_every: int, rates: Sequence[float]) -> Sweep:
    """The norms in a deep and in a shallow stack, each at the same few learning rates."""
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
            # Narrow, so that four layers cost what one of width 64 does.
            "model.d_model": 32,
            "model.d_ff": 128,
            # One that knows no end, so that the way to the target does not depend on how long
            # a run was meant to be.
            "optimizer.schedule": "inverse_sqrt",
        },
        variants=combined(norms, depths, learning_rates),
        baseline=f"layer, 4 layers, {rates[2]}",
        seeds=8,
        target=0.5,
        note=(
            f"Pre-norm, batches of {batch_size}. Every norm has the same {len(rates)} learning "
            "rates, to be compared at its own best (`scripts/claims.py` does)."
        ),
    )


def get_sweep():
    return convergence(
        batch_size=4, steps=3_600, eval_every=100, rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    )
