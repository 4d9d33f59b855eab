"""The big model of Vaswani et al. 2017 and its training settings, without the corpus.

Table 3, row big: 214.2 million parameters with 37,000 shared pieces, 300,000 steps. Meant for
accelerators. The model has not been trained here.

Usage:
    python train.py --config=configs/vaswani_big.py
"""

from pathlib import Path

from transformer.config import load_config


def get_config():
    config = load_config(Path(__file__).with_name("vaswani_base.py"))
    config.steps = 300_000

    config.model.d_model = 1024
    config.model.num_heads = 16
    config.model.d_ff = 4096
    config.model.dropout_rate = 0.3

    config.optimizer.learning_rate = (1024 * 4_000) ** -0.5
    return config
