"""WMT 2014 English → German with the training and evaluation of Vaswani et al. 2017, section 5.

`configs/vaswani_base.py` with the data: a BPE vocabulary of 37,000 pieces shared by both languages,
and batches of about 25,000 source and 25,000 target tokens. Validation is newstest2013, test is
newstest2014. TFDS downloads and prepares `wmt14_translate/de-en` on first use. The config is meant
for accelerators; it has not been run, since the corpus could not be downloaded here.

Usage:
    python train.py --config=configs/wmt14_ende.py
    python scripts/average.py --workdir=runs/wmt14_ende --last=5
    python eval.py --workdir=runs/wmt14_ende_average --beam_size=4 --length_penalty=0.6

average.py writes the mean of the last 5 checkpoints as a run of its own. An output has at most 50
tokens more than its source (`decode_margin`).

The paper's BLEU is 27.3 on newstest2014 (Table 2) and 25.8 on newstest2013 (Table 3). Its authors
split words at hyphens for scoring (tensor2tensor's `utils/get_ende_bleu.sh`); sacreBLEU, which
eval.py uses, does not, and scores the same outputs 0.7 to 1 lower (tensor2tensor's issue 317).
"""

from pathlib import Path

from transformer.config import load_config


def get_config():
    config = load_config(Path(__file__).with_name("vaswani_base.py"))
    config.batch_size = 104  # rows of 256 tokens, about 95% full
    config.save_every = 1_500  # ten minutes on the paper's machine, at 0.4 s per step

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
