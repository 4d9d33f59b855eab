"""The encoder-decoder Transformer: the one place where the parts are put together."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.data.tokenizer import Tokenizer
from transformer.modules import masking
from transformer.modules.attention import KeyValue, Relations
from transformer.modules.config import DTYPES, ModelConfig
from transformer.modules.dot_product_attention import SHORT_MASK_BACKENDS
from transformer.modules.dropout import Training, drop
from transformer.modules.layers import (
    Embedding,
)
from transformer.modules.normalization import Statistic
from transformer.modules.positions import POSITIONS
from transformer.modules.recurrent import Recurrent
from transformer.modules.stacks import Decoder, Encoder, Maps

# Name → array; or its ShapeDtypeStruct or sharding, where only those are known.
Params = dict[str, Any]


class Cache(NamedTuple):
    """What decoding carries from token to token; passed in and handed back, never stored.

    The J hypotheses of a source share it: what hypothesis j computed at position t is the entry
    t · J + j of `decoded`, and stays there when another goes on from it. What changes hands is
    `own`, one bit an entry, and the keys and values are never moved.

    filled: int32 scalar, how many target positions have been decoded.
    decoded: each layer's self-attention keys and values, with room for the whole target.
    own: [B, J, entries], which of the entries are a hypothesis' past.
    memory: each layer's cross-attention keys and values, computed once.
    source_segments: [B, S] int32.
    """

    filled: Int[Array, ""]
    decoded: tuple[KeyValue, ...]
    own: Bool[Array, "B J entries"]
    memory: tuple[KeyValue, ...]
    source_segments: Int[Array, "B S"]

    def pick(self, parents: Int[Array, "B J"]) -> "Cache":
        """The cache whose hypotheses go on from these."""
        return self._replace(own=jnp.take_along_axis(self.own, parents[..., None], axis=1))


class Transformer(nnx.Module):
    """Vaswani et al. 2017, figure 1: tokens in, logits over the next target token out."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, target_vocab_size: int, *, rngs: nnx.Rngs
    ):
        def make_embedding(size: int):
            return Embedding(size, config.d_model, dtype=DTYPES[config.dtype], rngs=rngs)

        def make_position(causal: bool):
            return POSITIONS[config.position_encoding](
                config.d_model,
                config.num_heads,
                causal=causal,
                max_length=config.random_positions or config.max_length,
                rngs=rngs,
            )

        self.config = config
        self.embedding = make_embedding(vocab_size)
        # Tied, one table reads the source, reads the target and scores the output.
        tied = config.tie_embeddings
        self.target_embedding = None if tied else make_embedding(target_vocab_size)
        self.output_embedding = None if tied else make_embedding(target_vocab_size)
        self.source_position, self.target_position = make_position(False), make_position(True)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        target_in: Int[Array, "B T"],
        target_segments: Int[Array, "B T"],
        *,
        source_positions: Int[Array, "B S"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for each target position, given the source and the target before it.

        Args:
          source: tokens that the encoder reads.
          source_segments: 0 = padding; of packed rows, which of its examples a token is of.
          target_in: BOS and the target's tokens.
          target_segments: likewise; attention does not cross from a segment into another.
          source_positions: where a token stands in its segment; None: where it is in its row.
          target_positions: likewise.
          training: dropout and what else training brings; None in evaluation.
          maps: `{"encoder": [], "decoder": [], "cross": []}`, to be filled with the
            attention weights of each layer; None costs nothing.
        """
        memory = self.encode(
            source, source_segments, positions=source_positions, training=training, maps=maps
        )
        training = training and training.over(target_segments)
        length = target_in.shape[1]
        positions = self.positions(in_row(length, target_positions), training)
        mask = self.mask(target_segments, target_segments, causal=True, window=self.config.window)
        memory_mask = self.mask(target_segments, source_segments)
        x = self.decoder(
            self.embed_target(target_in, positions, training),
            relations(self.target_position, mask, positions, positions),
            memory,
            memory_mask,
            training=training,
            maps=maps,
        )
        return self.logits(x)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        training: Training | None = None,
        maps: Maps | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's memory of `source`."""
        training = training and training.over(source_segments)
        positions = self.positions(in_row(source.shape[1], positions), training)
        x = drop(self.source_position.embed(self.embedding(source), positions), training)
        mask = self.mask(source_segments, source_segments, window=self.config.window)
        related = relations(self.source_position, mask, positions, positions)
        return self.encoder(x, related, training, maps["encoder"] if maps else None)

    def positions(self, index: Int[Array, "#B T"], training: Training | None) -> Int[Array, "#B T"]:
        """Where the tokens `index` of their sequences stand.

        With `random_positions` L above 0, a batch's positions in training are a sorted
        draw from 0 … L - 1 without replacement; so the model meets positions that
        longer sequences have (Ruoss et al. 2023, section 3). In evaluation they are
        evenly spaced, L / `max_length` apart, where the paper draws again: a token's
        position then depends on no draw, and on no later token.
        """
        reach = self.config.random_positions
        if not reach:
            return index
        if training is None:
            return index * (reach // self.config.max_length)
        # As many as an example has tokens at most; a row of packed ones may be longer.
        length = self.config.max_length
        length = min(index.shape[1], length) if index.shape[0] == 1 else length
        drawn = jax.random.choice(training.rngs.positions(), reach, (length,), replace=False)
        return jnp.sort(drawn)[index]

    def mask(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"], **relations: Any
    ) -> masking.Mask | Bool[Array, "B 1 T S"]:
        """The mask between segments in the form that the attention backend takes."""
        mask = masking.Mask(queries, keys, **relations)
        short = self.config.attention_backend in SHORT_MASK_BACKENDS
        return mask if short else mask.array()

    def embed_target(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"], training: Training | None
    ) -> Float[Array, "B T D"]:
        embedding = self.target_embedding or self.embedding
        return drop(self.target_position.embed(embedding(tokens), positions), training)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return (self.output_embedding or self.embedding).logits(x)

    def start_cache(
        self,
        memory: Float[Array, "B S D"],
        source_segments: Int[Array, "B S"],
        length: int,
        hypotheses: int = 1,
    ) -> Cache:
        """An empty cache for decoding up to `length` target positions of each hypothesis."""
        heads, entries = self.config.num_kv_heads or self.config.num_heads, length * hypotheses
        shape, widths = (len(memory), heads, entries), self.config.attention_widths()
        empty = KeyValue(*(jnp.zeros((*shape, width), memory.dtype) for width in widths))
        return Cache(
            filled=jnp.zeros((), jnp.int32),
            decoded=(empty,) * self.config.num_layers,
            own=jnp.zeros((len(memory), hypotheses, entries), bool),
            memory=self.decoder.project_memory(memory),
            source_segments=source_segments,
        )

    def decode_step(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits after each of the next T target tokens, and the cache with them in it.

        The same as the positions `cache.filled … cache.filled + T - 1` of a call with
        the whole target. With a cache of J > 1 hypotheses the tokens are the next one of each, and
        T is J. Past the cache's length the logits are NaN.
        """
        filled, (hypotheses, entries) = cache.filled, cache.own.shape[1:]
        steps, room = tokens.shape[1] // hypotheses, entries // hypotheses
        index = filled + in_row(steps) if hypotheses == 1 else jnp.full(tokens.shape, filled)
        positions = self.positions(index, None)
        if hypotheses == 1:
            mask = masking.causal(steps, room, filled)
        else:
            new = jnp.eye(hypotheses, dtype=bool)[None].repeat(len(tokens), axis=0)
            own = jax.lax.dynamic_update_slice_in_dim(cache.own, new, filled * hypotheses, axis=2)
            cache, mask = cache._replace(own=own), own[:, None]
        if self.config.window is not None:
            near = masking.window(steps, room, self.config.window, filled)
            mask = mask & jnp.repeat(near, hypotheses, axis=3)
        keys = self.positions(in_row(entries) // hypotheses, None)
        x, decoded = self.decoder.step(
            self.embed_target(tokens, positions, None),
            relations(self.target_position, mask, positions, keys),
            cache.memory,
            masking.padding(cache.source_segments > 0),
            *(cache.decoded, filled * hypotheses),
        )
        logits = jnp.where(filled + steps <= room, self.logits(x), jnp.nan)
        return logits, cache._replace(filled=filled + steps, decoded=decoded)


def in_row(length: int, positions: Int[Array, "B T"] | None = None) -> Int[Array, "#B T"]:
    """The given positions, or where none are given those of a row's tokens themselves."""
    return jnp.arange(length)[None] if positions is None else positions


def relations(
    position: Any, mask: masking.Mask | Array, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
) -> Relations:
    """How queries that stand at `queries`, and so do the new keys, stand to the keys at `keys`."""
    rotate = partial(position.rotate, positions=queries)
    return Relations(mask, rotate, position.bias(queries, keys))


def recurrent(
    config: ModelConfig, vocab_size: int, target_vocab_size: int, *, rngs: nnx.Rngs
) -> Recurrent:
    """The recurrent baseline of the model's sizes; what it does not name, it does not have."""
    return Recurrent(
        vocab_size,
        target_vocab_size,
        width=config.d_model,
        layers=config.num_layers,
        heads=config.num_heads,
        cell=config.cell,
        tie_embeddings=config.tie_embeddings,
        backend=config.attention_backend,
        dtype=DTYPES[config.dtype],
        rngs=rngs,
    )


# What `model_config.ARCHITECTURES` names.
MODULES: dict[str, Callable[..., Any]] = {"transformer": Transformer, "recurrent": recurrent}


class Model:
    """The model as pure functions of its variables, a flat dict name → array.

    Holds the module's structure without its arrays, and what is known of the
    variables before there are any: their shapes and the logical axes of each. Variables
    are the parameters, which are trained, and the statistics that batch norm keeps.

    Args:
      config: the architecture.
      vocab_size: V of the source, and where the vocabulary is shared of the target too.
      target_vocab_size: V of the target and the logits; None: the same.
      tokens: of that, those that an output may have; the others fill it up. None: all.
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
        self.structure, state = nnx.split(self.build(None))
        self.shapes = flatten(state)
        leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        self.axes = {name: leaf.get_metadata("axes") for name, leaf in leaves.items()}
        self.statistics = {name for name, leaf in leaves.items() if leaf.type is Statistic}

    @classmethod
    def of(cls, config: ModelConfig, source: Tokenizer, target: Tokenizer) -> "Model":
        """The model of two tokenizers, which are the same one where the vocabulary is shared."""
        sizes = source.vocab_size, target.vocab_size
        if not config.separate_vocabularies:
            sizes = (max(sizes),) * 2
        return cls(config, *sizes, tokens=len(target.pieces))

    def build(self, key: Array | None) -> Any:
        """The module with variables from `key`; without one, with their shapes alone."""
        if key is None:
            return nnx.eval_shape(lambda: self.build(jax.random.key(0)))
        make = MODULES[self.config.architecture]
        sizes = self.vocab_size, self.target_vocab_size
        return make(self.config, *sizes, rngs=nnx.Rngs(key))

    def init(self, key: Array) -> Params:
        """Fresh variables, float32, the same for the same key on any mesh."""
        return flatten(nnx.state(self.build(key)))

    def split(self, variables: Params) -> tuple[Params, Params]:
        """The parameters and the statistics among what has a variable's name."""
        parts: tuple[Params, Params] = {}, {}
        for name, leaf in variables.items():
            parts[name in self.statistics][name] = leaf
        return parts

    def bind(self, variables: Params) -> Any:
        """The module with these variables, to be called inside a traced function."""
        paths = {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf
            for name, leaf in variables.items()
        }
        return nnx.merge(self.structure, nnx.traversals.unflatten_mapping(paths))

    def count_parameters(self) -> int:
        """The exact number of parameters, from shapes alone."""
        parameters, _ = self.split(self.shapes)
        return sum(math.prod(shape.shape) for shape in parameters.values())


def flatten(state: nnx.State) -> Params:
    """A module's state as one flat dict, `encoder/layers/0/self_attention/query/kernel` → array."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
