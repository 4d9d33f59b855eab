"""Grapheme-to-phoneme conversion on the CMU Pronouncing Dictionary, without stress, on a CPU.

Nothing is downloaded: `pip install -e '.[text]'` includes the dictionary.

Usage:
    python train.py --config=configs/pronunciations.py
    python eval.py --workdir=runs/pronunciations [--beam_size=4]
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 2_500
    config.batch_size = 64  # packed rows of about seven words
    config.eval_every = 500
    config.save_every = 500
    config.keep_checkpoints = 5
    config.label_smoothing = 0.1
    config.best_metric = "loss"
    config.data.dataset = "pronunciations/plain"
    config.data.train = "train"
    config.data.tokenizer = "characters"
    config.data.target_tokenizer = "words"
    config.data.vocab_size = 264
    config.data.pack_length = 64
    config.data.metrics = ("sequence_error_rate", "unit_error_rate")
    config.model.num_layers = 2
    config.model.d_model = 128
    config.model.num_heads = 4
    config.model.d_ff = 512
    config.model.dropout_rate = 0.1
    config.model.tie_embeddings = "none"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 250
    return config
