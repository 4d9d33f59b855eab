"""The config that the sweeps start from: the reverse task at a size where a seed takes seconds.

Training is deliberately short: after 500 steps of 64 strings a good model is close to, but below,
perfect accuracy, so that variants can be told apart.

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
