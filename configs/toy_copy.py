"""The toy task `copy`: hello → hello, strings of 1 to 16 letters.

Usage:
    python train.py --config=configs/toy_copy.py
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.data.task = "copy"
    config.data.pack_length = 32  # three strings a row
    config.batch_size = 16
    return config
