"""IWSLT 2014 German → English, fairseq's `transformer_iwslt_de_en`.

Numbers are those of the command in fairseq's examples/translation/README.md and of the architecture
in its models/transformer, unless a comment says otherwise. The text is made by its
examples/translation/prepare-iwslt14.sh; put {train,valid,test}.{de,en} of the folder
iwslt14.tokenized.de-en into corpus/iwslt14: lower-cased, tokenized text in joint BPE pieces.

    python scripts/reproduce.py iwslt14
"""

from transformer.config import default_config

FOLDER = "corpus/iwslt14"


def get_config():
    config = default_config()
    config.steps = 50_000  # the command has no limit: our choice, about 55 epochs
    config.batch_size = 16  # rows of 256 tokens: --max-tokens 4096
    config.eval_every = 1_000
    config.save_every = 1_000
    config.keep_checkpoints = 10
    config.best_metric = "loss"
    config.label_smoothing = 0.1
    config.decode_margin = 10  # --eval-bleu-args: 1.2 times the source, and 10
    config.data.dataset = "files"
    for split, name in {"train": "train", "validation": "valid", "test": "test"}.items():
        config.data[split] = f"{FOLDER}/{name}.de,{FOLDER}/{name}.en"
    config.data.tokenizer = "words"  # the pieces, with a vocabulary for each language
    config.data.target_tokenizer = "words"
    config.data.vocab_size = 12_000  # all of them
    config.data.pack_length = 256
    config.data.metrics = ("joined_bleu",)
    config.data.bleu_tokenizer = "none"
    config.model.num_layers = 6
    config.model.d_model = 512
    config.model.num_heads = 4
    config.model.d_ff = 1_024
    config.model.dropout_rate = 0.3
    config.model.norm_placement = "post"
    config.model.norm_epsilon = 1e-5  # of torch.nn.LayerNorm
    config.model.attention_bias = True
    config.model.tie_embeddings = "target_output"  # --share-decoder-input-output-embed
    config.optimizer.name = "adamw"  # fairseq's Adam decouples the weight decay
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 4_000
    config.optimizer.weight_decay = 1e-4
    config.optimizer.epsilon = 1e-8  # fairseq's default
    config.optimizer.clip_norm = 0.0
    config.decoding.beam_size = 5
    config.decoding.length_ratio = 1.2
    config.decoding.penalty = "length"  # fairseq divides by the length
    config.decoding.length_penalty = 1.0
    config.decoding.early_stopping = "true"
    return config


def get_published():
    from lab.published import Figure, Published

    return Published(
        task="IWSLT 2014 German → English, tokenized and lower-cased",
        source="fairseq reaches 34.5 to 34.7, JoeyNMT 33.7",
        data="fairseq's examples/translation/prepare-iwslt14.sh",
        metric="joined_bleu",
        figures={"fairseq": Figure(value=34.5, margin=0.5)},
        seeds=3,
        average=10,
        flops=4.5e16,
    )
