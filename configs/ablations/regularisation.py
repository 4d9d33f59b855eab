"""Dropout and label smoothing: rows D of Table 3 (Vaswani et al. 2017), at a laptop's size.

`python scripts/sweep.py --sweep=configs/ablations/regularisation.py --jobs=4`
"""

from lab.sweeps import PaperRow, Sweep


def get_sweep():
    return Sweep(
        config="configs/ablations/small.py",
        # Few examples, each seen 32 times, so that the model overfits.
        overrides={"data.train": "train[:1000]"},
        variants={
            "neither": {},
            "dropout 0.1": {"model.dropout_rate": 0.1},
            "dropout 0.2": {"model.dropout_rate": 0.2},
            "smoothing 0.1": {"label_smoothing": 0.1},
            "smoothing 0.2": {"label_smoothing": 0.2},
            "both 0.1": {"model.dropout_rate": 0.1, "label_smoothing": 0.1},
        },
        baseline="neither",
        seeds=5,
        paper={
            "base: dropout 0.1, smoothing 0.1": PaperRow(millions=65),
            "dropout 0.0": PaperRow({"model.dropout_rate": 0.0}),
            "dropout 0.2": PaperRow({"model.dropout_rate": 0.2}),
            "smoothing 0.0": PaperRow({"label_smoothing": 0.0}),
            "smoothing 0.2": PaperRow({"label_smoothing": 0.2}),
        },
        target=0.5,
        note="Trained on 1,000 strings. All variants share programs, so variants without dropout "
        "pay for its random numbers too: the speeds in the table do not compare variants.",
    )
