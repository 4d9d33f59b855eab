"""hello → hello, lengths 1 to 16.

Usage:
    python train.py --config=configs/toy_copy.py
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.task = "copy"
    return config
