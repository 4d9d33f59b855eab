"""IWSLT 2014 German → English, fairseq's `transformer_iwslt_de_en`.

Numbers are those of the command in fairseq's examples/translation/README.md and of the architecture
in its models/transformer, unless a comment says otherwise. The text is made by its
examples/translation/prepare-iwslt14.sh; put {train,valid,test}.{de,en} of the folder
iwslt14.tokenized.de-en into corpus/iwslt14: lower-cased, tokenized text in joint BPE pieces.

    python scripts/reproduce.py iwslt14
"""

from pathlib import Path

from transformer.config import load_config

FOLDER = "corpus/iwslt14"


def get_config():
    config = load_config(Path(__file__).with_name("multi30k.py"))  # what fairseq always does
    config.steps = 50_000  # the command has no limit: our choice, about 55 epochs
    config.batch_size = 16  # rows of 256 tokens: --max-tokens 4096
    config.eval_every = 1_000
    config.save_every = 1_000
    config.patience = 0
    config.decode_margin = 10  # --eval-bleu-args: 1.2 times the source, and 10
    for split, name in {"train": "train", "validation": "valid", "test": "test"}.items():
        config.data[split] = f"{FOLDER}/{name}.de,{FOLDER}/{name}.en"
    config.data.target_tokenizer = "words"  # a vocabulary for each language
    config.data.pack_length = 256
    config.model.num_layers = 6
    config.model.d_model = 512
    config.model.d_ff = 1_024
    config.model.tie_embeddings = "target_output"  # --share-decoder-input-output-embed
    config.optimizer.name = "adamw"  # fairseq's Adam decouples the weight decay
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 4_000
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 0.0
    config.decoding.length_ratio = 1.2
    return config


def get_published():
    from lab.published import Figure, Published

    return Published(
        task="IWSLT 2014 German → English, tokenized and lower-cased",
        source="fairseq reaches 34.5 to 34.7, JoeyNMT 33.7",
        data="fairseq's examples/translation/prepare-iwslt14.sh",
        metric="joined_bleu",
        figures={"fairseq": Figure(value=34.5, margin=0.5, words="34.5 to 34.7")},
        seeds=3,
        average=10,
        flops=4.5e16,
        note="""fairseq's README evaluates the checkpoint that is best by BLEU on the validation
split, which it decodes after each epoch. Here the last ten checkpoints are averaged, which needs no
decoding during training. It names no length of training: 50,000 updates, about 55 epochs.""",
    )
