"""Every knob, once, with its default: the small model of the toy tasks.

The other configs are a few lines over this one.

Usage:
    python train.py --config=configs/base.py --config.model.norm=rms
"""

from typing import Any

from ml_collections import ConfigDict, config_dict


def get_config() -> Any:
    config = ConfigDict()

    config.seed = 0  # of initialisation, dropout and the order of the data
    config.replicas = 1  # runs trained at once in one program, with seeds seed, seed + 1, …
    config.steps = 1_800  # updates in all; schedules end here
    config.batch_size = 128  # rows a step, over all devices
    config.accumulate = 1  # parts of a batch, taken one after another to save memory
    config.max_skipped_steps = 0  # left out, for a NaN or Inf in them, before the run stops
    config.debug_nans = False  # a run that stops for a NaN or Inf says which operation made it
    config.steps_per_call = 100  # at most so many steps in one dispatch; changes no result
    config.log_every = 100  # steps
    config.eval_every = 250  # steps; the validation split
    config.save_every = 500  # steps
    config.keep_checkpoints = 2  # the latest so many, and the best
    config.label_smoothing = 0.0  # ε of the smoothed targets; the paper's is 0.1
    config.ema_decay = 0.0  # of a moving average of parameters, to evaluate with; 0: there is none
    config.decode_margin = 50  # an output may be so many tokens longer than its source

    config.data = ConfigDict()
    config.data.dataset = "toy_strings"  # transformer/data/datasets.py: DATASETS; or a name of TFDS
    config.data.task = "reverse"  # of toy_strings; transformer/data/toy.py: TASKS
    config.data.size = "small"  # of toy_strings; transformer/data/toy.py: SIZES
    config.data.source = "source"  # what the dataset calls the two texts of a pair
    config.data.target = "target"
    config.data.train = "train"  # TFDS splits, slices too: train[:10%]; of files, the file
    config.data.validation = "validation"
    config.data.test = "test"
    config.data.tokenizer = "characters"  # transformer/data/tokenizer.py: TOKENIZERS
    config.data.vocab_size = 8_000  # pieces to learn, at most, for bpe and unigram
    config.data.target_tokenizer = config_dict.placeholder(str)  # None: one for both languages
    config.data.longest = 0  # tokens; longer examples are left out of training; 0: none is
    config.data.metrics = ()  # of decoded text; transformer/text_metrics.py: METRICS
    config.data.bleu_tokenizer = "13a"  # sacrebleu's; of Chinese zh, of Japanese ja-mecab or char
    config.data.workers = 0  # processes that make batches on the host; 0: all rows lie on devices
    config.data.pack = 0  # tokens a row of training, with as many examples as fit; 0: one a row

    # Where the replicas of a population differ: a value each, in order; empty: in nothing (but
    # in their seeds).
    config.per_replica = ConfigDict()
    config.per_replica.seed = ()
    config.per_replica.learning_rate = ()
    config.per_replica.warmup_steps = ()
    config.per_replica.weight_decay = ()
    config.per_replica.label_smoothing = ()
    config.per_replica.dropout = ()
    config.per_replica.attention_dropout = ()

    config.model = ConfigDict()
    config.model.architecture = "transformer"  # transformer/model_config.py: ARCHITECTURES
    config.model.layers = 1  # L, of the encoder and of the decoder
    config.model.width = 64  # D
    config.model.heads = 4  # N
    config.model.head_width = config_dict.placeholder(int)  # H, d_k; None: width / heads
    config.model.value_width = config_dict.placeholder(int)  # E, d_v; None: head_width
    config.model.kv_heads = config_dict.placeholder(int)  # K, of keys and values; None: heads
    config.model.ff_width = 256  # F; the gated kinds have 2/3 of it, and as many parameters
    config.model.feed_forward = "relu"  # transformer/layers.py: FEED_FORWARDS
    config.model.cell = "lstm"  # of the recurrent architecture; transformer/recurrent.py: CELLS
    config.model.init = "glorot_uniform"  # transformer/layers.py: INITIALIZERS
    config.model.dropout = 0.0  # on each sublayer's output and on the embedded tokens
    config.model.attention_dropout = 0.0  # on the attention weights
    config.model.norm = "layer"  # transformer/normalization.py: NORMS
    config.model.norm_placement = "pre"  # pre (Xiong 2020), post (Vaswani 2017) or both
    config.model.norm_epsilon = 1e-6  # added to the variance
    config.model.position = "sinusoidal"  # transformer/positions.py: POSITIONS
    config.model.max_length = 512  # tokens, where positions are learned or random
    config.model.random_positions = 0  # draw them from so many in training (Ruoss 2023); 0: do not
    config.model.window = config_dict.placeholder(int)  # self-attention reaches less far; None: all
    config.model.tie_embeddings = True  # one table for source, target and logits
    config.model.attention_bias = False  # on the four projections of attention
    config.model.qk_norm = False  # RMS norm of queries and keys, head by head
    config.model.fused_qkv = False  # queries, keys and values of a sequence in one product
    config.model.attention_backend = "einsum"  # in transformer/dot_product_attention.py
    config.model.scan_layers = False  # compiled once for all layers of a stack
    config.model.remat = "none"  # computed anew in the gradient; REMATS there
    config.model.dtype = "float32"  # of the computation; parameters are always float32

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # transformer/optimizer.py: OPTIMIZERS
    config.optimizer.learning_rate = 4e-3  # its highest value
    config.optimizer.schedule = "linear"  # after the warm-up; transformer/optimizer.py: SCHEDULES
    config.optimizer.warmup_steps = 50
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-9
    config.optimizer.weight_decay = 0.0  # transformer/optimizer.py: DECAYING
    config.optimizer.clip_norm = 1.0  # of all gradients together; 0: they are not clipped

    config.mesh = ConfigDict()  # how many ways each axis is split; -1: all devices that are left
    config.mesh.replica = -1  # the replicas of a population; -1: as many as divide them
    config.mesh.data = -1  # the batch
    config.mesh.fsdp = 1  # the batch, parameters and optimizer moments
    config.mesh.tensor = 1  # heads, feed-forward and vocabulary inside each layer
    config.mesh.context = 1  # the positions of each sequence, for long ones

    return config
