"""The settings of the decoding methods in `transformer.inference.decoding`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from transformer.data.batches import Dataset
from transformer.errors import UserError, within
from transformer.inference import evaluation
from transformer.inference.decoding import Hypotheses, beam_search, greedy, sample
from transformer.knobs import Range, SizeOrZero, validate
from transformer.modules.model import Model, Params


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Greedy decoding by default; sampling if temperature > 0; beam search if beam_size > 1.

    Raises:
      UserError: a setting is out of range, or belongs to another method.
    """

    # Hypotheses per source; above 1: beam search.
    beam_size: Annotated[int, Range(1, 1_000)] = 1
    # α in beam search; 0 ranks by log p, larger values favour longer outputs.
    length_penalty: Annotated[float, Range(0, 100)] = 0.6
    temperature: Annotated[float, Range(0, 1e6)] = 0.0  # divides the logits; 0: no sampling
    top_k: SizeOrZero = 0  # sample among the k most likely tokens; 0: all
    top_p: Annotated[float, Range(0, 1)] = 1.0  # sample among the likeliest, up to probability p
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # for sampling
    # Number of tokens by which an output may exceed its source; None: the run's.
    decode_margin: Annotated[int | None, Range(0, 2**16)] = None

    def __post_init__(self):
        validate(self, "")
        if self.temperature:  # smaller ones overflow float32
            within("temperature", self.temperature, 1e-6, 1e6)
        if self.temperature and self.beam_size > 1:
            raise UserError(
                f"temperature={self.temperature}, beam_size={self.beam_size}: sampling and beam "
                "search exclude each other; set temperature=0 or beam_size=1"
            )
        if not self.temperature and (self.top_k, self.top_p) != (0, 1.0):
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p}: only sampling uses them; set "
                "temperature=1, for example"
            )

    def describe(self) -> dict[str, int | float]:
        """The settings that the decoding method uses."""
        if self.temperature:
            names = ["temperature", "top_k", "top_p", "seed"]
        else:
            names = ["beam_size"] + ["length_penalty"] * (self.beam_size > 1)
        names += ["decode_margin"] * (self.decode_margin is not None)
        return {name: getattr(self, name) for name in names}

    def margin(self, default: int) -> int:
        """The number of tokens by which an output may exceed its source."""
        return default if self.decode_margin is None else self.decode_margin

    def method(self) -> Callable[..., Hypotheses]:
        """The decoding method with its settings."""
        if self.beam_size > 1:
            settings = {"beam_size": self.beam_size, "length_penalty": self.length_penalty}
            return partial(beam_search, **settings)
        if self.temperature:
            settings = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            return partial(sample, **settings)
        return greedy

    def decode(
        self,
        model: Model,
        variables: Params,
        data: Dataset,
        margin: int,
        streams: Int[Array, "examples 2"] | None = None,
    ) -> Hypotheses:
        """Decodes every source in `data`.

        Args:
          model, variables, data: as in `evaluation.decode`.
          margin: the run's `decode_margin`, used if this config has none.
          streams: two integers for each example that, with the seed, determine what is sampled;
            None: its index, and 0.
        """
        margin = self.margin(margin)
        max_length = model.config.reach(data.source.shape[1] + margin)
        keys = None
        if self.temperature:
            index = jnp.arange(len(data))
            keys = self.keys(jnp.stack([index, 0 * index], 1) if streams is None else streams)
        method = partial(self.method(), margin=margin)
        return evaluation.decode(model, variables, data, max_length, method, keys)

    def keys(self, streams: Int[Array, "examples 2"]) -> Array:
        """A PRNG key for each pair of integers."""
        key = jax.random.key(self.seed)
        return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n[0]), n[1]))(streams)


GREEDY = DecodingConfig()
