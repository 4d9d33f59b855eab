"""Generation: the outputs of a trained model for texts."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.packing import RaggedArray
from transformer.data.text import cleaned, numbered
from transformer.data.tokenizer import EOS, before_end
from transformer.errors import UserError, explained, out_of_memory
from transformer.inference import evaluation
from transformer.inference.decoding import GREEDY, DecodingConfig, Hypotheses
from transformer.knobs import Range
from transformer.modules.model import Model, Params


class Prepared(NamedTuple):
    """Tokenized texts."""

    tokens: RaggedArray  # of each text, EOS included; only EOS for an empty or refused text
    refused: dict[int, str]  # index → why the text cannot be processed; its outputs are empty
    unknown: dict[int, int]  # index → the number of symbols that the tokenizer does not know

    def check(self) -> None:
        """Raises a UserError if a text is refused."""
        for index, reason in self.refused.items():
            raise UserError(f"texts[{index}]: {reason}")


class Output(NamedTuple):
    """An output of the model for a text."""

    text: str
    tokens: list[int]  # without EOS
    score: float  # log p in nats, in beam search divided by the length penalty
    truncated: bool = False  # whether it reached its length limit without EOS


class Alignment(NamedTuple):
    """The cross-attention of an output, averaged over heads."""

    source: list[str]  # the source's tokens as text, EOS included
    output: list[str]
    weights: Float[np.ndarray, "L T S"]  # each row sums to 1


class Generator:
    """A trained model with its tokenizers; `transformer.load(workdir)` returns one.

    It compiles a program for each new pair of batch size and padded length. The variables are on
    the devices of the mesh, over which batches are sharded; `margin` is the run's `decode_margin`.
    """

    def __init__(
        self, model: Model, variables: Params, tokenizers: Tokenizers, margin: int, mesh: Mesh
    ):
        self.model, self.variables, self.tokenizers, self.mesh = model, variables, tokenizers, mesh
        self.positions = model.config.reach(2**30)  # the model's maximum length
        self.margin = margin
        decode = partial(evaluation.decode, model, margin=margin)
        options = evaluation.compiler_options()
        self._program = jax.jit(decode, static_argnames="decoding", compiler_options=options)
        self._attention_maps = jax.jit(partial(evaluation.attention_maps, model))

    def prepare(self, texts: Iterable[str]) -> Prepared:
        """Tokenizes texts for `generate`; records those that cannot be processed.

        Raises:
          UserError: `texts` is a single string.
          TypeError: one of them is not a str.
        """
        if isinstance(texts, str | bytes):
            raise UserError("texts is a single string; pass a list: generate([text])")
        rows, refused, unknown = [], {}, {}
        for index, text in enumerate(texts):
            tokens = [EOS]
            try:
                tokens = self._encode(text)
            except UserError as error:
                refused[index] = str(error)
            if count := self.tokenizers.source.count_unknown(tokens):
                unknown[index] = count
            rows.append(tokens)
        return Prepared(RaggedArray.from_lists(rows), refused, unknown)

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text, cleaned like those of training."""
        with explained("it has a lone surrogate (half a character); remove it", UnicodeEncodeError):
            tokens = self.tokenizers.source.encode(cleaned(text))
        if len(tokens) > self.positions:
            most = f"the model's {self.positions:,} positions; shorten or split the text"
            raise UserError(f"{len(tokens):,} tokens, EOS included, exceed {most}")
        return tokens

    def generate(
        self,
        texts: Iterable[str] | Prepared,
        decoding: DecodingConfig = GREEDY,
        *,
        n_best: int = 1,
        batch_size: int = 128,
        offset: int = 0,
    ) -> list[list[Output]]:
        """The outputs for each text, best first; an empty text has empty outputs.

        Args:
          texts: if not `Prepared`, a refused text is an error, and unknown symbols are a warning.
            A text that does not fit in memory is refused, too.
          n_best: outputs per text: the best of beam search, or independent samples; with
            `distinct` there may be fewer.
          batch_size: the most texts decoded at once; outputs do not depend on it.
          offset: the index of the first text; samples depend on a text's index.

        Raises:
          UserError: a text is refused.
          TypeError: one of them is not a str.
        """
        Range(1, 2**20).check("batch_size", batch_size)
        Range(1, 2**20).check("n_best", n_best)
        samples = n_best if decoding.temperature else 1
        if n_best > max(decoding.beam_size, samples):
            remedy = "raise beam_size, or set a temperature to sample"
            raise UserError(f"n_best={n_best} exceeds beam_size={decoding.beam_size}; {remedy}")
        prepared = texts if isinstance(texts, Prepared) else self.prepare(texts)
        if prepared is not texts:
            prepared.check()
            if unknown := prepared.unknown:
                where = f"(in {numbered('text', unknown, len(unknown))})"
                warnings.warn(f"{sum(unknown.values()):,} unknown symbols {where}", stacklevel=2)
        outputs: list[list[Output]] = [[] for _ in prepared.tokens.lengths()]
        for rows, found in self._batches(prepared, decoding, samples, batch_size, offset):
            best = (each[:, : None if decoding.distinct else n_best] for each in found)
            for row, tokens, scores in zip(rows, *best, strict=True):
                outputs[row] += map(self._output, tokens, scores.tolist())
        if prepared is not texts:
            prepared.check()
        for index in prepared.refused:  # some of its samples may have fitted
            outputs[index] = []
        if decoding.temperature:  # beam search has ranked its own, those without EOS last
            for own in outputs:
                own.sort(key=lambda output: -output.score)
        if decoding.distinct:
            for own in outputs:  # a missing hypothesis has a score of -inf
                best = {output.text: output for output in own[::-1] if output.score != -np.inf}
                own[:] = [output for output in own if best.get(output.text) is output][:n_best]
            n_best = 1
        return [own or [Output("", [], 0.0)] * n_best for own in outputs]

    def _batches(
        self, prepared: Prepared, decoding: DecodingConfig, samples: int, size: int, offset: int
    ) -> Iterator[tuple[np.ndarray, Hypotheses]]:
        """Yields the indices of texts of similar length, and their hypotheses.

        Halves a batch that does not fit in memory, and refuses a single text that does not.
        """
        with jax.set_mesh(self.mesh):
            size = evaluation.rows_at_once(self.model, size, decoding.beam_size)
        lengths = prepared.tokens.lengths()
        least = decoding.limits(lengths[lengths > 1], self.margin).min(initial=self.positions)
        decoding, prefix = decoding.split_prefix(self.tokenizers.target, int(least))
        widths = np.minimum(bucket(lengths), self.positions)
        for width in np.unique(widths[lengths > 1])[::-1].tolist():
            rows = np.flatnonzero((lengths > 1) & (widths == width))
            rows = np.repeat(rows[np.argsort(lengths[rows], kind="stable")], samples)
            streams = np.stack([offset + rows, np.arange(len(rows)) % samples], axis=1)
            parts = np.split(np.arange(len(rows)), range(size, len(rows), size))
            while parts:
                part = parts.pop(0)
                sources = prepared.tokens.take(rows[part]).to_padded(width)
                try:
                    yield rows[part], self._decode(sources, streams[part], prefix, decoding)
                except (MemoryError, jax.errors.JaxRuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    row, most = int(rows[part[0]]), "too much memory; split the text"
                    if len(part) > 1:
                        parts[:0] = np.array_split(part, 2)
                    else:
                        prepared.refused[row] = f"{lengths[row]:,} tokens need {most}"

    def _output(self, tokens: Int[np.ndarray, "T"], score: float) -> Output:
        own = before_end(tokens.tolist())
        return Output(self.tokenizers.target.decode(own), own, score, EOS not in tokens)

    def _decode(
        self, sources: Any, streams: Any, prefix: Any, decoding: DecodingConfig
    ) -> Hypotheses:
        rows = len(sources)  # padded to a power of two, which limits compilations
        pad = ((0, (1 << (rows - 1).bit_length()) - rows), (0, 0))
        sources, streams = np.pad(sources, pad), np.pad(streams, pad).astype(np.int32)
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            found = self._program(self.variables, sources, streams, prefix, decoding=decoding)
            return jax.tree.map(lambda x: np.asarray(x)[:rows], found)

    def align(self, texts: Sequence[str], outputs: Sequence[Output]) -> list[Alignment]:
        """The alignment of one output of each text."""
        alignments = []
        for text, output in zip(texts, outputs, strict=True):
            pair = self._encode(text), [*output.tokens, EOS]
            width = min(int(bucket(np.array([*map(len, pair)])).max()), self.positions)
            pair = [tokens[:width] for tokens in pair]  # EOS may have no position left
            sources, targets = RaggedArray.from_lists(pair).to_padded(width)[:, None]
            with jax.set_mesh(self.mesh), jax.enable_x64(False):
                maps = self._attention_maps(self.variables, Dataset(sources, targets, 1))["cross"]
            weights = np.stack([np.asarray(layer)[0].mean(0) for layer in maps])
            weights = weights[:, : len(pair[1]), : len(pair[0])]
            symbols = ([*map(of.symbol, x)] for of, x in zip(self.tokenizers, pair, strict=True))
            alignments.append(Alignment(*symbols, weights=weights))
        return alignments


def bucket(lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
    """Rounds lengths up to 8, 16, 24, 32, 48, 64, 96, 128, …, which limits compilations."""
    power = 1 << np.ceil(np.log2(np.maximum(lengths, 8))).astype(int)
    return np.where((power > 16) & (lengths <= power * 3 // 4), power * 3 // 4, power)
