"""The encoder-decoder Transformer of "Attention Is All You Need" in JAX and Flax NNX.

Axes, also used as the letters of einsums and of shape annotations:

    B  batch                    D  model width
    S  source length, or keys   N  attention heads
    T  target length, queries   K  heads of keys and values, where fewer
    V  vocabulary               H  width of a head's queries and keys (d_k)
    L  layers                   E  width of a head's values (d_v)
    R  replicas                 F  width of the feed-forward's hidden layer

Nouns, with their shapes and dtypes:

    source           [B, S] int32    tokens that the encoder reads, 0 = padding
    target_in        [B, T] int32    BOS and the target: what the decoder reads
    target_out       [B, T] int32    the target and EOS: what it should predict
    weights          [B, T] float32  a token's weight in the loss, 0 on padding
    source_segments  [B, S] int32    0 = padding; equal numbers may attend
    target_segments  [B, T] int32    likewise
    memory           [B, S, D]       the encoder's output
    mask             [B|1, N|1, T, S] bool   True = the query may attend to the key
    logits           [B, T, V] float32
"""

# ruff: noqa: F401
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from transformer.config import RunConfig, default_config
    from transformer.errors import UserError
    from transformer.inference.decoding import DecodingConfig
    from transformer.inference.generation import TrainedModel
    from transformer.modules.attention import MultiHeadAttention
    from transformer.modules.config import ModelConfig
    from transformer.modules.dropout import Dropout
    from transformer.modules.layers import DecoderLayer, EncoderLayer, FeedForward
    from transformer.modules.linear import Embed, Linear
    from transformer.modules.normalization import BatchNorm, LayerNorm, RMSNorm
    from transformer.modules.positions import (
        ALiBi,
        Learned,
        RelativeBias,
        Rotary,
        Sinusoidal,
        TransformerXL,
    )
    from transformer.modules.stacks import Decoder, Encoder
    from transformer.modules.transformer import Transformer
    from transformer.run import Run

__version__ = "0.2.0"

# Where the public names are; imported when asked for, since JAX takes seconds.
PUBLIC = {
    "run": ("Run",),
    "config": ("RunConfig", "default_config"),
    "errors": ("UserError",),
    "inference.decoding": ("DecodingConfig",),
    "inference.generation": ("TrainedModel",),
    "modules.attention": ("MultiHeadAttention",),
    "modules.config": ("ModelConfig",),
    "modules.dropout": ("Dropout",),
    "modules.layers": ("DecoderLayer", "EncoderLayer", "FeedForward"),
    "modules.linear": ("Embed", "Linear"),
    "modules.normalization": ("BatchNorm", "LayerNorm", "RMSNorm"),
    "modules.positions": (
        "ALiBi",
        "Learned",
        "RelativeBias",
        "Rotary",
        "Sinusoidal",
        "TransformerXL",
    ),
    "modules.stacks": ("Decoder", "Encoder"),
    "modules.transformer": ("Transformer",),
}


def __dir__() -> list[str]:
    return ["load", "config_of", *(name for names in PUBLIC.values() for name in names)]


def __getattr__(name: str) -> Any:
    for home, names in PUBLIC.items():
        if name in names:
            return getattr(import_module(f"transformer.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    workdir: str,
    *,
    checkpoint: str = "latest",
    replica: int = 0,
    mesh: "Mesh | None" = None,
    plugins: Sequence[str] = (),
    source_prefix: str | None = None,
    target_prefix: str | None = None,
) -> "TrainedModel":
    """A trained model for texts: `load("runs/x").generate(["hello"])`.

    Args:
      workdir: the run's folder.
      checkpoint: latest, best, or the number of a step.
      replica: which one of a population.
      mesh: the devices; None: batches are sharded over all.
      plugins: modules to import, which the run names as its plugins.
      source_prefix, target_prefix: of an imported model, instead of its own: tokens before each
        source (text, if it ends in a space), and the first token of outputs.

    Raises:
      UserError: the folder holds no run, or the checkpoint is missing or damaged.
    """
    from transformer.config import load_plugins
    from transformer.parallel.mesh import make_mesh
    from transformer.run import Run

    load_plugins(plugins)
    run = Run.saved(workdir, mesh=mesh or make_mesh())
    if (source_prefix, target_prefix) != (None, None):
        run.tokenizers = run.tokenizers.prefixed(source_prefix, target_prefix)
    return run.trained_model(checkpoint, replica)


def config_of(workdir: str | Path) -> Any:
    """The config of a run, as a ConfigDict that a config file may change and return.

        def get_config():
            config = transformer.config_of("runs/opus")
            config.init_from = "runs/opus"
            return config

    That of an imported run has the default optimizer and freezes nothing.

    Raises:
      UserError: the folder holds no run.
    """
    from transformer.config import default_config
    from transformer.workdir import Workdir

    folder = Workdir(str(workdir))
    config = folder.read_config()
    if "imported" in folder.read_record():
        config.freeze, config.optimizer = (), default_config().optimizer
    return config
