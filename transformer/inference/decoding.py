"""The settings of decoding, and the method of `search` that they choose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import Tokenizer
from transformer.errors import UserError, check_choice, explained
from transformer.inference.search import (
    EARLY_STOPPING,
    PENALTIES,
    UNFINISHED,
    Hypotheses,
    beam_search,
    sample,
    scaled,
)
from transformer.knobs import Choice, Range, Size, SizeOrZero, validate

# Type of an option → the types of its values, and what a message calls them.
TYPES: dict[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    bool: (bool, "True or False"),
}


class DecodingOptions(TypedDict, total=False):
    """The fields of `DecodingConfig` as keywords."""

    beam_size: int
    length_penalty: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    decode_margin: int | None
    length_ratio: float
    max_length: int | None
    min_length: int
    prefix: str
    distinct: bool
    no_repeat_ngram_size: int
    repetition_penalty: float
    penalty: str
    early_stopping: str
    unfinished: str
    renormalize: bool


def check_types(options: Mapping[str, object]) -> None:
    """Raises a UserError for a name that is no option, or a value of another type."""
    hints = get_type_hints(DecodingOptions)
    for name, value in options.items():
        check_choice(hints, name, "option")
        kind, *none = get_args(hints[name]) or (hints[name],)
        kinds, takes = TYPES[kind]
        if not isinstance(value, (kinds, *none)) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{name}={value!r}: it takes {takes}")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Greedy decoding by default; sampling if temperature > 0; beam search if beam_size > 1.

    Raises:
      UserError: a setting is out of range, or belongs to another method.
    """

    beam_size: Annotated[int, Range(1, 1_000)] = 1  # hypotheses per source; above 1: beam search
    length_penalty: Annotated[float, Range(0, 100)] = 0.6  # α; larger ones favour longer outputs
    temperature: Annotated[float, Range(0, 1e6)] = 0.0  # divides the logits; 0: no sampling
    top_k: SizeOrZero = 0  # sample among the k most likely tokens; 0: all
    top_p: Annotated[float, Range(0, 1)] = 1.0  # sample among the likeliest, up to probability p
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # for sampling
    # Tokens by which an output may exceed its source; None: the run's.
    decode_margin: Annotated[int | None, Range(0, 2**16)] = None
    length_ratio: Annotated[float, Range(0.01, 100)] = 1.0  # times the source, before the margin
    max_length: Size | None = None  # of an output, EOS included; None: ratio and margin alone
    min_length: SizeOrZero = 0  # tokens before EOS at least
    prefix: str = ""  # the text that every hypothesis starts with
    distinct: bool = False  # among hypotheses of the same text only the best is an output
    no_repeat_ngram_size: SizeOrZero = 0  # n: no n tokens occur twice in an output; 0: any may
    # Divides the positive scores of tokens that the output has, multiplies the negative ones.
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    # Of beam search: what is raised to α, ((5 + length) / 6) or the length.
    penalty: Annotated[str, Choice(PENALTIES)] = "gnmt"
    # When a row is done: never before no hypothesis can improve; false: nor at its present length;
    # true: as soon as beam_size have finished.
    early_stopping: Annotated[str, Choice(EARLY_STOPPING)] = "never"
    # How hypotheses without EOS rank at the length limit: last, or equal to finished ones.
    unfinished: Annotated[str, Choice(UNFINISHED)] = "last"
    # Of beam search: the probabilities of the tokens that are not banned sum to 1.
    renormalize: bool = False

    def __post_init__(self):
        validate(self, "")
        if self.max_length is not None and self.min_length >= self.max_length:
            limit = f"leaves no room for EOS in max_length={self.max_length}"
            raise UserError(f"min_length={self.min_length} {limit}; lower it, or raise max_length")
        if self.temperature:  # smaller ones overflow float32
            Range(1e-6, 1e6).check("temperature", self.temperature)
        if self.temperature and self.beam_size > 1:
            raise UserError("sampling excludes beam search: set temperature=0 or beam_size=1")
        if not self.temperature and (self.top_k, self.top_p) != (0, 1.0):
            raise UserError("only sampling uses top_k and top_p: set temperature=1, for example")

    def margin(self, default: Any) -> Any:
        """The tokens by which an output may exceed its source; `default` is the run's."""
        return default if self.decode_margin is None else self.decode_margin

    def limits(self, lengths: Int[np.ndarray, "B"], margin: int) -> Int[np.ndarray, "B"]:
        """The most tokens in an output for sources of these lengths; `margin` is the run's."""
        limits = scaled(lengths, self.length_ratio) + self.margin(margin)
        return limits if self.max_length is None else np.minimum(limits, self.max_length)

    def split_prefix(
        self, tokenizer: Tokenizer, limit: int
    ) -> "tuple[DecodingConfig, Int[np.ndarray, 'P'] | None]":
        """The settings that a program is compiled for, and the tokens of the prefix, its input.

        Raises:
          UserError: the tokenizer does not know the text, or an output of `limit` tokens is too
            short for it.
        """
        if not self.prefix:
            return self, None
        given = f"prefix={self.prefix!r}"
        with explained(f"{given}: it is not text; remove half characters", UnicodeError):
            self.prefix.encode()
        try:
            tokens = tokenizer.encode(self.prefix)[:-1]
        except UserError as error:
            raise UserError(f"{given}: {error}; choose others") from error
        if tokenizer.count_unknown(tokens):
            raise UserError(f"{given} has unknown symbols; choose others")
        if (text := tokenizer.decode(tokens)) != self.prefix:
            raise UserError(f"{given}: the tokenizer changes it to {text!r}; give that")
        if len(tokens) >= limit:
            most = f"{len(tokens)} tokens, and outputs have at most {limit}, EOS included"
            raise UserError(f"{given} has {most}; shorten it, or raise decode_margin or max_length")
        return replace(self, prefix=""), np.array(tokens, np.int32)

    def describe(self) -> dict[str, int | float | str]:
        """The settings of the decoding method, and the others that are not the default."""
        names = ["temperature", "top_k", "top_p", "seed"]
        if not self.temperature:
            names = ["beam_size", "length_penalty"][: 1 + (self.beam_size > 1)]
        of_all = (each for each in fields(self)[6:] if getattr(self, each.name) != each.default)
        return {name: getattr(self, name) for name in (*names, *(each.name for each in of_all))}

    def method(self) -> Callable[..., Hypotheses]:
        """The decoding method with its settings."""
        names, method = ("temperature", "top_k", "top_p"), sample
        if self.beam_size > 1:
            names = ("beam_size", "length_penalty", "penalty", "early_stopping", "unfinished")
            names += ("renormalize",)
            method = beam_search
        return partial(method, **{name: getattr(self, name) for name in names})


GREEDY = DecodingConfig()
