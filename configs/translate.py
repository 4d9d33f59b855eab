"""Translation, or any other text-to-text task, on your own files.

A file has one pair per line, source<TAB>target or JSON (`.jsonl`); or two parallel files are given
as sources,targets. Files may be compressed (`.gz`). docs/data.md describes the formats.

Usage:
    python train.py --config=configs/translate.py --config.data.train=corpus/train.tsv
    python train.py --config=configs/translate.py \\
        --config.data.train=corpus/train.de,corpus/train.en \\
        --config.data.validation=corpus/dev.de,corpus/dev.en

If no files are given for them, validation and test are split off the training file.
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 20_000
    config.batch_size = 64  # rows of `pack_length` tokens
    config.eval_every = 1_000
    config.save_every = 1_000
    config.label_smoothing = 0.1
    config.best_metric = "loss"
    config.data.dataset = "files"
    config.data.train = "corpus/train.tsv"
    config.data.tokenizer = "bpe"
    config.data.max_length = 128
    config.data.metrics = ("bleu", "chrf")
    config.data.pack_length = 128
    config.model.num_layers = 3
    config.model.d_model = 256
    config.model.d_ff = 1_024
    config.model.dropout_rate = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 1_000
    return config
