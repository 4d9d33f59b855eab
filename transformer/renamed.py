"""Names of earlier versions → the names of today, so that saved runs still load.

The tables are applied where config.json, a checkpoint or metrics.jsonl is read, and nowhere else.
"""

from collections.abc import Container, Mapping
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

# Knobs that are no more.
REMOVED = {"steps_per_call", "model.fused_qkv"}

# What runs did before a knob existed, if that is not its default.
BEFORE: dict[str, Any] = {
    "model.separate_vocabularies": False,
    "model.qk_norm_epsilon": 1e-6,
}

# Components of a parameter's name, such as `encoder/final_norm/gain`.
PARAMETERS = {
    "gain": "scale",
    "key_norm": "key_ln",
    "query_norm": "query_ln",
    "table": "embedding",
    "variance": "var",
}

# Fields of the train state, and of its hyperparameters.
STATE = {
    "attention_dropout": "attention_dropout_rate",
    "average": "ema_params",
    "dropout": "dropout_rate",
    "moments": "opt_state",
    "numbers": "hparams",
    "statistics": "batch_stats",
}

# Sums of an interval, as an interrupted run saves them beside a checkpoint.
SUMS = {
    "correct": "train/accuracy",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "loss": "train/objective",
    "nll": "train/loss",
}

# Metrics, as in metrics.jsonl.
METRICS: dict[str, str] = {}


def knobs(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a saved config, as `section.name`, with today's names."""
    return {KNOBS.get(name, name): value for name, value in saved.items() if name not in REMOVED}


def array_name(path: tuple[Any, ...], known: Container[str] = ()) -> str:
    """Returns today's name of an array of a train state, such as `params/encoder/…/scale`.

    Args:
      path: the key path of the array, as of `jax.tree_util.tree_flatten_with_path`.
      known: names that are not changed.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in known:
        return name
    renamed = PARAMETERS | STATE
    return "/".join(renamed.get(component, component) for component in name.split("/"))


def metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics.jsonl with today's names."""
    return {METRICS.get(name, name): value for name, value in row.items()}
