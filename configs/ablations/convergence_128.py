"""Steps to a target accuracy with each norm, in batches of 128 strings (after Ba et al. 2016).

`python scripts/sweep.py --sweep=configs/ablations/convergence_128.py --jobs=4`
"""

import runpy
from pathlib import Path


def get_sweep():
    rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    convergence = runpy.run_path(str(Path(__file__).with_name("convergence_4.py")))["convergence"]
    return convergence(batch_size=128, steps=320, eval_every=20, rates=rates)
