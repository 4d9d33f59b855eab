"""The Transformer against recurrent encoder-decoders with attention, at equal parameters.

`python scripts/sweep.py --sweep=configs/ablations/recurrence.py --jobs=4`
"""

from lab.sweeps import Sweep, combined

# At these widths they have about as many parameters as the Transformer; a test checks it.
WIDTHS = {"lstm": 68, "gru": 76}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def get_sweep():
    kinds = {"transformer": {}} | {
        cell: {"model.architecture": "recurrent", "model.cell": cell, "model.d_model": width}
        for cell, width in WIDTHS.items()
    }
    return Sweep(
        config="configs/ablations/small.py",
        # As in convergence_4.py: a schedule without an end favours no kind.
        overrides={
            "steps": 800,
            "save_every": 800,
            "log_every": 20,
            "eval_every": 20,
            "data.validation": "validation[:500]",
            "optimizer.schedule": "inverse_sqrt",
        },
        variants=combined(kinds, {str(rate): {"optimizer.learning_rate": rate} for rate in RATES}),
        baseline="transformer, 0.008",
        seeds=8,
        target=0.8,
        splits=("test_longer",),
        note=(
            "Each kind is trained at five learning rates. Widths are chosen to match the number of "
            f"parameters of the Transformer: {', '.join(f'{k} {n}' for k, n in WIDTHS.items())}."
        ),
    )
