"""The toy task `sort`: hello → ehllo, strings of 1 to 16 letters.

Usage:
    python train.py --config=configs/toy_sort.py
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.data.task = "sort"
    config.data.pack_length = 32  # three strings a row
    config.batch_size = 16
    return config
