"""hello → olleh, lengths 1 to 16.

Usage:
    python train.py --config=configs/toy_reverse.py
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.task = "reverse"
    return config
