"""The base model of Vaswani et al. 2017 and its training settings, without the corpus.

Architecture: Table 3, row base. Training: section 5. With 37,000 shared pieces the model has 63.0
million parameters (docs/paper.md). The toy task stands in for WMT, and 768 sentences per batch for
about 25,000 tokens on each side; `configs/wmt14_ende.py` has the corpus. Meant for accelerators: a
step takes minutes on a CPU. The model has not been trained here.

Usage:
    python train.py --config=configs/vaswani_base.py
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 100_000
    config.batch_size = 768
    config.eval_every = 5_000
    config.save_every = 5_000
    config.keep_checkpoints = 5
    config.label_smoothing = 0.1

    config.model.num_layers = 6
    config.model.d_model = 512
    config.model.num_heads = 8
    config.model.d_ff = 2048
    config.model.dropout_rate = 0.1
    config.model.norm_placement = "post"
    config.model.dtype = "bfloat16"

    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 4_000
    config.optimizer.learning_rate = (512 * 4_000) ** -0.5  # the peak of equation 3
    config.optimizer.clip_norm = 0.0
    return config
