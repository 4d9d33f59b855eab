"""WMT 2014 English → German as Vaswani et al. 2017 trained and scored it: section 5 whole.

`configs/vaswani_base.py` with the text: BPE of 37,000 pieces for both languages together, and
about 25,000 source and 25,000 target tokens a batch. Validation is newstest2013, test
newstest2014. TFDS downloads and prepares `wmt14_translate/de-en` when it is first used.
Made for accelerators, and not run here, where the text cannot be downloaded.

Usage:
    python train.py --config=configs/wmt14_ende.py
    python scripts/average.py --workdir=runs/wmt14_ende --last=5
    python eval.py --workdir=runs/wmt14_ende --beam_size=4 --length_penalty=0.6

`--workdir` of the last command is the folder that average.py names, which holds the mean of the
last 5 checkpoints. An output has at most 50 tokens more than its own source (`decode_margin`).

The paper's BLEU is 27.3 on newstest2014 (Table 2) and 25.8 on newstest2013 (Table 3). Its authors
took words apart at hyphens to count it (tensor2tensor's `utils/get_ende_bleu.sh`); sacrebleu,
which eval.py calls, does not, and the same outputs have 0.7 to 1 less (tensor2tensor's issue 317).
"""

from pathlib import Path

from transformer.config import load_config


def get_config():
    config = load_config(Path(__file__).with_name("vaswani_base.py"))
    config.batch_size = 104  # rows of 256 tokens, some 95% full
    config.save_every = 1_500  # ten minutes of the paper's machine, 0.4 s a step

    config.best_metric = "loss"
    config.data.dataset = "wmt14_translate/de-en"
    config.data.source = "en"
    config.data.target = "de"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 37_000
    config.data.max_length = 256
    config.data.pack_length = 256
    config.data.metrics = ("bleu", "chrf")
    return config
