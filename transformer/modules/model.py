"""The model as pure functions of its variables, and the shapes and axes of these."""

import math
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from transformer.modules.config import ModelConfig
from transformer.modules.transformer import MODULES

# Name → array; or its ShapeDtypeStruct or sharding, where only those are known.
Params = dict[str, Any]


class Model:
    """The model as pure functions of its variables, a flat dict name → array.

    Holds the graph definition of the module, in evaluation mode, and the shapes and logical axes of
    the variables. Variables are the trained parameters and the batch statistics, which are the
    running averages of batch norm.

    Args:
      config: the architecture.
      vocab_size: V of the source and, if the vocabulary is shared, of the target.
      target_vocab_size: V of the target and the logits; None: the same.
      tokens: the number of target tokens without those that pad the vocabulary; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        target_vocab_size: int | None = None,
        tokens: int | None = None,
    ):
        self.config = config
        self.vocab_size = vocab_size
        self.target_vocab_size = target_vocab_size or vocab_size
        self.tokens = tokens or self.target_vocab_size
        module = self.build(None)
        module.eval()
        self.structure, state = nnx.split(module)
        self.shapes = flatten(state)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        self.axes = {  # a parameter without names is replicated
            name: leaf.get_metadata("out_sharding", None) or ("norm",) * len(leaf.shape)
            for name, leaf in leaves.items()
        }
        self.statistics = {name for name, leaf in leaves.items() if leaf.type is nnx.BatchStat}

    @classmethod
    def of(cls, config: ModelConfig, source: Any, target: Any) -> "Model":
        """The model for two tokenizers, which are the same object if the vocabulary is shared.

        Reads `vocab_size` and `pieces` of each.
        """
        sizes = source.vocab_size, target.vocab_size
        if not config.separate_vocabularies:
            sizes = (max(sizes),) * 2
        return cls(config, *sizes, tokens=len(target.pieces))

    def build(self, key: Array | None) -> Any:
        """Returns the module with variables initialised from `key`; None: with abstract variables.

        The module stores no RNG streams: training passes `rngs` to each call.
        """
        if key is not None:
            make = MODULES[self.config.architecture]
            sizes = self.vocab_size, self.target_vocab_size
            return make(self.config, *sizes, rngs=nnx.Rngs(params=key))

        def split() -> Any:  # `nnx.eval_shape` would shard the shapes where a mesh is set
            nonlocal structure
            structure, state = nnx.split(self.build(jax.random.key(0)))
            return state

        structure: Any = None
        state = jax.eval_shape(split)
        return nnx.merge(structure, state)

    def init(self, key: Array) -> Params:
        """Returns initial variables, float32, which depend only on the key, not on the mesh."""
        return flatten(nnx.state(self.build(key)))

    def split(self, variables: Params) -> tuple[Params, Params]:
        """Splits a dict with the variables' names into parameters and batch statistics."""
        parts: tuple[Params, Params] = {}, {}
        for name, leaf in variables.items():
            parts[name in self.statistics][name] = leaf
        return parts

    def bind(self, variables: Params) -> Any:
        """Returns the module with these variables, in evaluation mode, for use under tracing."""
        paths = {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf
            for name, leaf in variables.items()
        }
        return nnx.merge(self.structure, nnx.traversals.unflatten_mapping(paths))

    def count_parameters(self) -> int:
        """Returns the number of parameters, without allocating them."""
        parameters, _ = self.split(self.shapes)
        return sum(math.prod(shape.shape) for shape in parameters.values())


def flatten(state: nnx.State) -> Params:
    """Flattens a module's state: `encoder/layers/0/self_attention/query/kernel` → array."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
