"""The model as pure functions of its variables, and the shapes and axes of these."""

import math
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from transformer.modules.config import ModelConfig
from transformer.modules.recurrent import Recurrent
from transformer.modules.transformer import Transformer

# The entries of `config.ARCHITECTURES`.
MODULES: dict[str, Callable[..., Any]] = {"transformer": Transformer, "recurrent": Recurrent}

# Name → array; or its ShapeDtypeStruct or sharding, where only those are known.
Params = dict[str, Any]


class OutputTokens(NamedTuple):
    """The tokens with a role in outputs; see `data.tokenizer.Tokenizer` for the names."""

    start: int = 1
    banned: tuple[int, ...] = (0, 1)
    forced_first: int | None = None
    forced_last: int | None = None


class Model:
    """The model as pure functions of its variables, a flat dict name → array.

    Variables are the trained parameters and the batch statistics, which are the running averages
    of batch norm; `shapes` and `axes` are their shapes and logical axes.
    """

    structure: nnx.GraphDef  # the module in evaluation mode without its variables

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,  # V of the source
        target_vocab_size: int | None = None,  # V of the target and the logits; None: the same
        tokens: int | None = None,  # of the target, without those that pad V; None: all
        outputs: OutputTokens | None = None,  # None: those of our own tokenizers
    ):
        self.config, self.vocab_size = config, vocab_size
        self.target_vocab_size = target_vocab_size or vocab_size
        self.tokens, self.outputs = tokens or self.target_vocab_size, outputs or OutputTokens()

        def split() -> nnx.State:  # `nnx.eval_shape` would shard the shapes where a mesh is set
            module = self.build(jax.random.key(0))
            module.eval()
            self.structure, state = nnx.split(module)
            return state

        state = jax.eval_shape(split)
        self.shapes = flatten(state)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        self.axes = {  # a parameter without names is replicated
            name: leaf.get_metadata("out_sharding", None) or ("norm",) * len(leaf.shape)
            for name, leaf in leaves.items()
        }
        self.statistics = {name for name, leaf in leaves.items() if leaf.type is nnx.BatchStat}

    @classmethod
    def of(cls, config: ModelConfig, source: Any, target: Any) -> "Model":
        """The model for two tokenizers, which are the same object if the vocabulary is shared."""
        sizes = source.vocab_size, target.vocab_size
        if not config.separate_vocabularies:
            sizes = (max(sizes),) * 2
        outputs = OutputTokens(*(getattr(target, name) for name in OutputTokens._fields))
        return cls(config, *sizes, tokens=len(target.pieces), outputs=outputs)

    def build(self, key: Array) -> Any:
        """The module with variables from `key`, without RNG streams: calls are passed `rngs`."""
        module, sizes = MODULES[self.config.architecture], (self.vocab_size, self.target_vocab_size)
        return module(self.config, *sizes, rngs=nnx.Rngs(params=key))

    def init(self, key: Array) -> Params:
        """Initial variables, float32, which depend only on the key, not on the mesh."""
        return flatten(nnx.state(self.build(key)))

    def split(self, variables: Params) -> tuple[Params, Params]:
        """Splits a dict with the variables' names into parameters and batch statistics."""
        parts: tuple[Params, Params] = {}, {}
        for name, leaf in variables.items():
            parts[name in self.statistics][name] = leaf
        return parts

    def bind(self, variables: Params) -> Any:
        """The module with these variables, in evaluation mode, for use under tracing."""
        paths = {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf
            for name, leaf in variables.items()
        }
        return nnx.merge(self.structure, nnx.traversals.unflatten_mapping(paths))

    def count_parameters(self, excluded: Container[str] = ()) -> int:
        """The number of parameters, without those of some names, and without allocating them."""
        params = self.split(self.shapes)[0].items()
        return sum(math.prod(leaf.shape) for name, leaf in params if name not in excluded)


def flatten(state: nnx.State) -> Params:
    """A module's state as `encoder/layers/0/self_attention/query/kernel` → array."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
