"""Every knob at its default: the small model of the toy tasks.

The knobs are the fields of `RunConfig` and its sections, each with its default and its meaning:
transformer/config.py, model_config.py, optimizer.py, sharding.py and data/data_config.py. Config
files change `default_config()` in a few lines.

Usage:
    python train.py --config=configs/base.py --config.model.norm=rms
"""

from transformer.config import default_config


def get_config():
    return default_config()
