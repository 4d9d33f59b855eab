"""Every knob with its default and meaning; the other config files change some.

Written by `python scripts/write_base_config.py` from the dataclasses that define the knobs.

    python train.py --config=configs/base.py --config.model.norm=rms
"""

from transformer.config import default_config


def get_config():
    config = default_config()

    config.seed = 0  # for initialisation, dropout and data order
    config.replicas = 1  # runs trained at once, with seeds seed, seed+1…
    config.steps = 1_800  # updates; schedules end here
    config.batch_size = 128  # rows of a step, over all devices
    config.accumulation_steps = 1  # gradient accumulation: number of microbatches
    config.max_skipped_steps = 0  # non-finite updates before an error
    config.debug_nans = False  # find the operation that produced the NaN or Inf
    config.log_every = 100  # steps
    config.eval_every = 250  # steps; on the validation split
    config.save_every = 500  # steps
    config.keep_checkpoints = 2  # latest checkpoints to keep, besides the best
    config.label_smoothing = 0.0  # the paper's is 0.1
    config.ema_decay = 0.0  # moving average of the parameters, for evaluation; 0: none
    config.decode_margin = 50  # tokens an output may exceed its source by
    config.init_from = ""  # the folder of a run whose parameters this run starts from
    config.init_new = ()  # patterns of those to initialise anew, such as ("decoder/*",)
    config.freeze = ()  # patterns of parameters that stay fixed, such as ("encoder/*",)
    # picks the best checkpoint; one of decoded text needs decode_every
    config.best_metric = "sequence_accuracy"
    # evaluations without a better best_metric after which the run ends; 0: never
    config.patience = 0
    config.decode_every = 0  # evaluations between decodings of a sample for data.metrics; 0: never
    config.decode_examples = 256  # of validation, in the sample
    config.plugins = ()  # modules, imported first, that add entries to tables

    # Where the replicas of a population differ: a value for each, or () for the run's.
    config.per_replica.seed = ()  # by default seed, seed + 1, …
    config.per_replica.learning_rate = ()  # optimizer.learning_rate
    config.per_replica.warmup_steps = ()  # optimizer.warmup_steps
    config.per_replica.weight_decay = ()  # optimizer.weight_decay
    config.per_replica.label_smoothing = ()  # label_smoothing
    config.per_replica.dropout_rate = ()  # model.dropout_rate
    config.per_replica.attention_dropout_rate = ()  # model.attention_dropout_rate

    # The dataset, its splits, the tokenizers, packing and text metrics.
    config.data.dataset = "toy_strings"  # DATASETS in data/datasets.py, or a name in TFDS
    config.data.task = "reverse"  # for toy_strings; TASKS in data/toy.py
    config.data.size = "small"  # for toy_strings; SIZES in data/toy.py
    config.data.source = "source"  # the field of the source text
    config.data.target = "target"  # the field of the target text
    config.data.train = "train"  # TFDS split or slice, such as train[:10%]; for files, a file
    config.data.validation = "validation"  # likewise
    config.data.test = "test"  # likewise
    config.data.tokenizer = "characters"  # TOKENIZERS in data/tokenizer.py
    config.data.target_tokenizer = None  # None: one for both sides
    config.data.tokenizer_model = None  # the file of a SentencePiece model, instead of tokenizer
    config.data.target_tokenizer_model = None  # likewise of the target alone
    config.data.vocab_size = 8_000  # maximum, for words, bpe, unigram
    config.data.max_length = 0  # filters out longer training examples; 0: no filter
    config.data.metrics = ()  # for decoded text; TEXT_METRICS in inference/text_metrics.py
    # sacrebleu's tokenizer; zh for Chinese, ja-mecab for Japanese
    config.data.bleu_tokenizer = "13a"
    config.data.num_workers = 0  # to stream batches; 0: rows on devices
    config.data.pack_length = 0  # length of packed training rows; 0: one example per row

    # The architecture; a UserError names an option that is invalid or contradicts another.
    config.model.architecture = "transformer"  # or recurrent
    config.model.num_layers = 1  # L, of the encoder and of the decoder
    config.model.decoder_layers = None  # None: num_layers
    config.model.d_model = 64  # D, model width
    config.model.num_heads = 4  # N, attention heads
    config.model.d_k = None  # H, width of a query or key; None: d_model / num_heads
    config.model.d_v = None  # E, width of a value; None: d_k
    config.model.num_kv_heads = None  # K, heads of keys and values; None: num_heads
    config.model.d_ff = 256  # F, feed-forward width; gated kinds use 2/3 of it
    config.model.scale_gated = True  # False: gated kinds are as wide as d_ff says
    config.model.feed_forward = "relu"  # modules/layers.py
    config.model.ff_bias = True  # on the projections of the feed-forward
    config.model.cell = "lstm"  # for architecture=recurrent; modules/cells.py
    config.model.kernel_init = "glorot_uniform"  # modules/linear.py
    config.model.dropout_rate = 0.0  # on sublayer outputs and embedded tokens
    config.model.attention_dropout_rate = 0.0  # on the attention weights
    config.model.ff_dropout_rate = 0.0  # on the hidden units of the feed-forward
    config.model.norm = "layer"  # NORMS in modules/normalization.py
    config.model.norm_placement = "pre"  # pre, post (paper) or both
    config.model.final_norm = None  # after the last layer; None: unless norm_placement is post
    config.model.norm_epsilon = 1e-06  # added to the variance
    config.model.position_encoding = "sinusoidal"  # modules/positions.py
    config.model.max_length = 512  # tokens, for learned or random positions
    config.model.position_offset = 0  # number of the first sinusoidal or learned position
    config.model.sinusoid_layout = "neighbours"  # of sine and cosine
    config.model.sinusoid_rates = "paper"  # modules/positions.py
    config.model.rotary_base = 10000.0  # of rotary positions' wavelengths
    config.model.relative_buckets = 32  # of distances, for relative positions
    config.model.relative_distance = 128  # from which distances share the last bucket
    config.model.relative_per_layer = False  # relative or transformer_xl for each layer, not stack
    config.model.random_positions = 0  # range to draw from in training (Ruoss et al. 2023); 0: off
    config.model.window = None  # width of local self-attention, each side; None: no limit
    config.model.tie_embeddings = "all"  # which sides share a table; TIES
    # vocabulary size per side; False: the larger for both
    config.model.separate_vocabularies = True
    config.model.embedding_scale = None  # of embedded tokens; None: √d_model
    config.model.embedding_norm = False  # a norm of embedded tokens, after absolute positions
    config.model.logits_scale = 1.0  # of the decoder's output, before the product with the table
    config.model.logits_bias = False  # one number for each target token
    config.model.attention_bias = False  # on the four projections of attention
    config.model.attention_scale = None  # of the scores; None: 1/√d_k
    config.model.normalize_qk = False  # RMS norm of queries and keys, per head
    config.model.qk_norm_epsilon = None  # for normalize_qk; None: norm_epsilon
    config.model.attention_backend = "einsum"  # modules/dot_product_attention.py
    config.model.scan_layers = False  # scan over the layers, which compiles one for all
    config.model.remat = "none"  # what the backward pass recomputes
    config.model.dtype = "float32"  # of the computation; params are float32

    # Greedy decoding by default; sampling if temperature > 0; beam search if beam_size > 1.
    config.decoding.beam_size = 1  # hypotheses per source; above 1: beam search
    config.decoding.length_penalty = 0.6  # α; larger ones favour longer outputs
    config.decoding.temperature = 0.0  # divides the logits; 0: no sampling
    config.decoding.top_k = 0  # sample among the k most likely tokens; 0: all
    config.decoding.top_p = 1.0  # sample among the likeliest, up to probability p
    config.decoding.seed = 0  # for sampling
    # Tokens by which an output may exceed its source; None: the run's.
    config.decoding.decode_margin = None
    config.decoding.length_ratio = 1.0  # times the source, before the margin
    config.decoding.max_length = None  # of an output, EOS included; None: ratio and margin alone
    config.decoding.min_length = 0  # tokens before EOS at least
    config.decoding.prefix = ""  # the text that every hypothesis starts with
    config.decoding.distinct = False  # among hypotheses of the same text only the best is an output
    config.decoding.no_repeat_ngram_size = 0  # n: no n tokens occur twice in an output; 0: any may
    # Divides the positive scores of tokens that the output has, multiplies the negative ones.
    config.decoding.repetition_penalty = 1.0
    # Of beam search: what is raised to α, ((5 + length) / 6) or the length.
    config.decoding.penalty = "gnmt"
    # When a row is done: never before no hypothesis can improve; false: nor at its present length;
    # true: as soon as beam_size have finished.
    config.decoding.early_stopping = "never"
    # How hypotheses without EOS rank at the length limit: last, or equal to finished ones.
    config.decoding.unfinished = "last"
    # Of beam search: the probabilities of the tokens that are not banned sum to 1.
    config.decoding.renormalize = False

    # The optimizer section of a config.
    config.optimizer.name = "adam"  # OPTIMIZERS in training/optimizer.py
    config.optimizer.learning_rate = 0.004  # the peak
    config.optimizer.schedule = "linear"  # after the warm-up
    config.optimizer.warmup_steps = 50  # updates of linear warm-up
    config.optimizer.beta1 = 0.9  # of adam, adamw, lion; momentum of sgd, muon
    config.optimizer.beta2 = 0.98  # of adam, adamw, lion
    config.optimizer.epsilon = 1e-09  # of adam, adamw
    config.optimizer.weight_decay = 0.0  # decoupled; of adamw, lion and muon
    config.optimizer.clip_norm = 1.0  # global norm of the gradients; 0: no clipping

    # Sizes of the mesh axes; -1, once at most beside `replica`: all devices that are left.
    config.mesh.replica = -1  # replicas of a population side by side; -1: as many as fit
    config.mesh.data = -1  # data-parallel copies of the model
    config.mesh.fsdp = 1  # shards the batch, and every matrix along the model width
    config.mesh.tensor = 1  # shards heads, feed-forward and vocabulary
    config.mesh.context = 1  # shards the positions of a sequence; attention gathers keys and values

    return config
