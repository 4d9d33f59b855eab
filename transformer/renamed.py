"""Names of earlier versions → those of today, applied where config.json or a checkpoint is read."""

from collections.abc import Container
from typing import Any

import jax

# Knobs, as `section.name` in config.json.
KNOBS = {
    "accumulate": "accumulation_steps",
    "data.longest": "data.max_length",
    "data.pack": "data.pack_length",
    "data.workers": "data.num_workers",
    "model.attention_dropout": "model.attention_dropout_rate",
    "model.dropout": "model.dropout_rate",
    "model.ff_width": "model.d_ff",
    "model.head_width": "model.d_k",
    "model.heads": "model.num_heads",
    "model.init": "model.kernel_init",
    "model.kv_heads": "model.num_kv_heads",
    "model.layers": "model.num_layers",
    "model.position": "model.position_encoding",
    "model.qk_norm": "model.normalize_qk",
    "model.value_width": "model.d_v",
    "model.width": "model.d_model",
    "per_replica.attention_dropout": "per_replica.attention_dropout_rate",
    "per_replica.dropout": "per_replica.dropout_rate",
}

# Values of knobs, by today's name of the knob.
VALUES: dict[str, dict[Any, Any]] = {"model.tie_embeddings": {True: "all", False: "none"}}

# Knobs that are no more.
REMOVED = {"steps_per_call", "model.fused_qkv"}

# What runs did before a knob existed, if that is not its default.
BEFORE: dict[str, Any] = {"model.separate_vocabularies": False, "model.qk_norm_epsilon": 1e-6}

# Components of the names of arrays: of parameters, such as `encoder/final_norm/gain`, and fields of
# the train state and its hyperparameters.
ARRAYS = {
    "attention_dropout": "attention_dropout_rate",
    "average": "ema_params",
    "dropout": "dropout_rate",
    "gain": "scale",
    "key_norm": "key_ln",
    "moments": "opt_state",
    "numbers": "hparams",
    "query_norm": "query_ln",
    "statistics": "batch_stats",
    "table": "embedding",
    "variance": "var",
}

# Arrays of the train state that earlier versions did not save → the value of all their elements.
ADDED = {"ended": 0}

# Sums of an interval, as an interrupted run saves them beside a checkpoint.
SUMS = {
    "correct": "train/accuracy",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "loss": "train/objective",
    "nll": "train/loss",
}


def array_name(path: tuple[Any, ...], known: Container[str] = ()) -> str:
    """Returns today's name of an array of a train state, by its key path, unless it is `known`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name if name in known else "/".join(ARRAYS.get(part, part) for part in name.split("/"))
