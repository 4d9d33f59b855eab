"""Translation, or any task from text to text, learned from files of one's own.

A file has a pair a line: source<TAB>target, or JSON (`.jsonl`); or there are two files of as many
lines, written sources,targets; `.gz` too. transformer/data/text.py says how lines are read.

Usage:
    python train.py --config=configs/translate.py --config.data.train=corpus/train.tsv
    python train.py --config=configs/translate.py \\
        --config.data.train=corpus/train.de,corpus/train.en \\
        --config.data.validation=corpus/dev.de,corpus/dev.en

Without files for them, validation and test are cut from the training file.
"""

from transformer.config import default_config


def get_config():
    config = default_config()
    config.steps = 20_000
    config.batch_size = 64  # rows of `pack` tokens
    config.eval_every = 1_000
    config.save_every = 1_000
    config.label_smoothing = 0.1
    config.best_metric = "loss"
    config.data.dataset = "files"
    config.data.train = "corpus/train.tsv"
    config.data.tokenizer = "bpe"
    config.data.max_length = 128
    config.data.pack_length = 128
    config.model.num_layers = 3
    config.model.d_model = 256
    config.model.d_ff = 1_024
    config.model.dropout_rate = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 1_000
    return config
