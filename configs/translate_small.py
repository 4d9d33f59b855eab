"""Translation, or any other text-to-text task, on your own small corpus: 1,000 to 50,000 pairs.

Unlike configs/translate.py, which is for larger ones, it has a small model and vocabulary, and much
dropout. The run decodes a part of validation while it trains, and ends when its BLEU no longer
improves. docs/data.md describes the files.

Usage:
    python train.py --config=configs/translate_small.py --config.data.train=corpus/train.tsv
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 4_000  # at most
    config.batch_size = 32  # rows of `pack_length` tokens
    config.eval_every = 100
    config.save_every = 1_000
    config.label_smoothing = 0.1
    config.best_metric = "bleu"
    config.decode_every = 1
    config.patience = 8
    config.data.dataset = "files"
    config.data.train = "corpus/train.tsv"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2_000
    config.data.max_length = 64
    config.data.pack_length = 64
    config.data.metrics = ("bleu",)
    config.model.num_layers = 2
    config.model.d_model = 128
    config.model.d_ff = 512
    config.model.dropout_rate = 0.3
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 400
    return config
