"""What several test files share: small models, random parameters, strings, what is refused."""

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from jaxtyping import Array, Float

from transformer import cli
from transformer.config import RunConfig
from transformer.data.batches import Batch, make_batch
from transformer.data.datasets import DataConfig
from transformer.data.tokenizer import SymbolTokenizer
from transformer.data.toy import ALPHABET
from transformer.errors import UserError
from transformer.inference.evaluation import attention_maps
from transformer.modules.config import ModelConfig
from transformer.modules.dropout import training_rngs
from transformer.modules.model import Model, Params
from transformer.modules.transformer import Transformer
from transformer.run import Run
from transformer.training.step import TrainState

TOKENIZER = SymbolTokenizer(ALPHABET)
# Whose flags stay, whichever program is tried.
LIBRARIES = ("absl", "array_record", "grain", "orbax", "tensorflow_datasets")
# The environment of a program that compiles as a user's does (conftest.py).
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def data_config(**changes: Any) -> DataConfig:
    """The data section at its smallest size, but for `changes`."""
    return DataConfig(**{"size": "tiny"} | changes)


@cache
def small_model(**changes: Any) -> Model:
    """One layer of width 16, so that a test takes a second."""
    config = {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 32, "max_length": 32}
    return Model(ModelConfig(**config | changes), TOKENIZER.vocab_size)


def random_params(model: Model, seed: int) -> Params:
    """Variables that are all random, biases and scales too, and quicker to make than `init`'s."""
    rng, params = np.random.default_rng(seed), dict(model.shapes)
    # Drawn in the order of the former names: tolerances were measured with these values.
    for name in sorted(params, key=lambda name: name.replace("/scale", "/gain")):
        noise = rng.normal(size=params[name].shape)
        special = {"scale": 1.0 + 0.1 * noise, "bias": 0.1 * noise, "mean": 0.3 * noise}
        special["var"] = np.exp(0.3 * noise)
        values = special.get(name.split("/")[-1], noise * model.config.d_model**-0.5)
        params[name] = jnp.asarray(np.float32(values))  # without a program for each shape
    return params


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(np.float32(rng.normal(size=shape)))


def training(key: Array) -> dict[str, Any]:
    """The arguments of a call in training."""
    return {"deterministic": False, "rngs": training_rngs(key)}


@partial(jax.jit, static_argnums=0)
def logits_of(
    model: Model, params: Params, batch: Batch, dropout: Array | None = None
) -> Float[Array, "B T V"]:
    """The model's logits for a batch, those of training if a key is given."""
    mode = {} if dropout is None else training(dropout)
    return model.bind(params)(**batch.inputs(), **mode)


maps_of = jax.jit(attention_maps, static_argnums=0)


def strings(*pairs: tuple[str, str], source_length: int = 0, target_length: int = 0) -> Batch:
    """A batch of (source, target) strings, padded to the longest or further."""
    sides = []
    for texts, length in zip(zip(*pairs, strict=True), (source_length, target_length), strict=True):
        rows = [*map(TOKENIZER.encode, texts), [0] * length]
        sides.append(np.array([*itertools.zip_longest(*rows, fillvalue=0)], np.int32).T[:-1])
    return jax.jit(make_batch)(*map(jnp.asarray, sides))  # a program, not one for each operation


def refused(message: str, function: Callable, *args: Any, **options: Any) -> str:
    """What a call says with a `UserError`: one line, in which the pattern `message` is found."""
    with pytest.raises(UserError, match=message) as caught:
        function(*args, **options)
    said = str(caught.value)
    assert "\n" not in said
    return said


@contextlib.contextmanager
def program(path: str, *words: str) -> Iterator[Any]:
    """The module of a program in this process, its flags parsed from `words`.

    Programs define flags of the same names; those of other programs are set aside meanwhile.
    """
    known, mine = flags.FLAGS, importlib.util.spec_from_file_location(Path(path).stem, path)
    assert mine and mine.loader  # noqa: PT018

    def take() -> dict[str, flags.Flag]:
        # Overrides of a config, such as config.model.norm, count as defined by absl.
        definer = {x: known.find_module_defining_flag(x) or "" for x in known}
        mine = [x for x in known if x.startswith("config.") or not definer[x].startswith(LIBRARIES)]
        taken = {name: known[name] for name in mine}
        for name in taken:
            delattr(known, name)
        return taken

    module, others = importlib.util.module_from_spec(mine), take()
    try:
        mine.loader.exec_module(module)
        cli.explained(cli.parse, [path, *words])
        yield module
    finally:
        take()
        for name, flag in others.items():
            known[name] = flag


# Attributes of a run that do not depend on the knobs of the host's loop.
BUILT = ("model", "abstract_state", "init", "train_steps", "score", "step_flops")
HOST = ("log_every", "eval_every", "save_every", "keep_checkpoints", "patience", "best_metric")
COMPILED: dict[RunConfig, dict[str, Any]] = {}


def train(run: Run, **options: Any) -> TrainState | None:
    """Trains with the functions that a run of the same program has compiled; returns its state."""
    key = replace(run.config, **{knob: getattr(RunConfig, knob) for knob in HOST})
    vars(run).update(COMPILED.get(key, {}))
    with jax.numpy_dtype_promotion("standard"):  # what a user has
        try:
            run.train(**options)
        finally:
            COMPILED[key] = {name: vars(run)[name] for name in BUILT if name in vars(run)}
    return run.state


class MarkovCache(NamedTuple):
    """The state of decoding with a `Markov` module."""

    filled: Array
    row: Array  # which of the tables a source has

    def pick(self, parents: Array) -> "MarkovCache":
        return self

    def grow(self, length: int) -> "MarkovCache":
        return self


class Markov(Transformer):
    """A module whose next token depends on its position and the last token.

    The logits are `tables[row, position, last]`; the first token of a source names its row.
    """

    def __init__(self, tables: np.ndarray):
        self.tables = nnx.data(jnp.asarray(tables, jnp.float32))

    def encode(self, source: Any, *_: Any, **__: Any) -> Any:
        return source[:, 0]

    def start_cache(self, memory: Any, *_: Any) -> Any:
        return MarkovCache(jnp.int32(0), memory)

    def decode_step(self, tokens: Any, cache: Any) -> Any:
        logits = self.tables[cache.row[:, None], cache.filled, tokens]
        return logits, cache._replace(filled=cache.filled + 1)
