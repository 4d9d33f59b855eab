"""hello → ehllo, lengths 1 to 16.

Usage:
    python train.py --config=configs/toy_sort.py
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.task = "sort"
    return config
