"""What earlier versions called things, so that the runs that they saved still load."""

# Knobs, as `section.name`: the name in a saved config.json → the name today.
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
