"""The run that the shipped sweeps start from: reverse at a size where a seed takes seconds.

Cut short on purpose: after 500 steps of 64 strings a good model is near the top and
not at it, so that there is something to tell variants apart by.

Usage:
    python train.py --config=configs/ablations/small.py
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 500
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 50
    config.save_every = 500
    config.keep_checkpoints = 1
    return config
