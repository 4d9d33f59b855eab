"""The toy task `reverse`: hello → olleh, strings of 1 to 16 letters.

Usage:
    python train.py --config=configs/toy_reverse.py
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.data.task = "reverse"
    config.data.pack_length = 32  # three strings a row
    config.batch_size = 16
    return config
