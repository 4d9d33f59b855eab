"""Generation: the outputs of a trained model for texts."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.ragged import RaggedArray
from transformer.data.text import cleaned, numbered
from transformer.data.tokenizer import EOS, before_end
from transformer.errors import UserError, within
from transformer.inference import evaluation
from transformer.inference.config import GREEDY, DecodingConfig
from transformer.inference.decoding import Hypotheses
from transformer.modules.model import Model, Params
from transformer.parallel.mesh import data_parallel_mesh


class Prepared(NamedTuple):
    """Tokenized texts.

    tokens: the tokens of each text, EOS included; only EOS for an empty or refused text.
    refused: index → why the text cannot be processed; its outputs are empty.
    unknown: index → the number of its symbols that are not in the tokenizer's vocabulary.
    """

    tokens: RaggedArray
    refused: dict[int, str]
    unknown: dict[int, int]

    def check(self) -> None:
        """Raises a UserError if a text is refused."""
        for index, reason in self.refused.items():
            raise UserError(f"texts[{index}]: {reason}")


class Output(NamedTuple):
    """An output of the model for a text.

    tokens: its tokens, without EOS.
    score: log p in nats, in beam search divided by the length penalty.
    truncated: whether it reached its length limit without EOS.
    """

    text: str
    tokens: list[int]
    score: float
    truncated: bool = False


class Alignment(NamedTuple):
    """The cross-attention of an output, averaged over heads.

    source, output: their tokens as text, EOS included.
    weights: [layers, output, source]; each row sums to 1.
    """

    source: list[str]
    output: list[str]
    weights: Float[np.ndarray, "L T S"]


class Generator:
    """A trained model with its tokenizers; `transformer.load(workdir)` returns one.

    It compiles a program for each new pair of batch size and padded length.

    Args:
      model, variables: the model, and its variables on the devices of `mesh`.
      tokenizers: the tokenizers of sources and targets.
      decode_margin: the default number of tokens by which an output may exceed its source.
      mesh: the devices, over which batches are sharded; None: all.
    """

    def __init__(
        self,
        model: Model,
        variables: Params,
        tokenizers: Tokenizers,
        *,
        decode_margin: int,
        mesh: Mesh | None = None,
    ):
        self.model, self.variables, self.tokenizers = model, variables, tokenizers
        self.decode_margin, self.mesh = decode_margin, mesh or data_parallel_mesh()
        self.programs: dict[DecodingConfig, Callable[..., Hypotheses]] = {}
        self.attention_maps = jax.jit(partial(evaluation.attention_maps, model))

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
                tokens = self.encode(text)
            except UnicodeEncodeError:
                refused[index] = "it has a lone surrogate, which is half a character; remove it"
            except UserError as error:
                refused[index] = str(error)
            if count := self.tokenizers.source.count_unknown(tokens):
                unknown[index] = count
            rows.append(tokens)
        return Prepared(RaggedArray.from_lists(rows), refused, unknown)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, cleaned like those of training.

        Raises:
          UserError: the tokenizer refuses a symbol, or the text exceeds the model's positions.
          UnicodeEncodeError: it has a lone surrogate.
        """
        tokens = self.tokenizers.source.encode(cleaned(text))
        if (reach := self.model.config.reach(len(tokens))) < len(tokens):
            raise UserError(
                f"{len(tokens):,} tokens, EOS included, exceed the model's {reach:,} positions; "
                "shorten or split the text"
            )
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
          texts: if `Prepared`, a text that does not fit in memory is added to `refused`; otherwise
            it raises an error, and unknown symbols issue a warning.
          decoding: the decoding method and its settings.
          n_best: outputs per text: the best of beam search, or independent samples.
          batch_size: the number of texts decoded at once; outputs do not depend on it.
          offset: the index of the first text; samples depend on a text's index.

        Raises:
          UserError: a text is refused (`prepare`) or does not fit in memory.
          TypeError: one of them is not a str.
        """
        within("batch_size", batch_size, 1, 2**20)
        within("n_best", n_best, 1, 2**20)
        samples = n_best if decoding.temperature else 1
        if n_best > max(decoding.beam_size, samples):
            raise UserError(
                f"n_best={n_best} exceeds beam_size={decoding.beam_size}; raise beam_size, or set "
                "a temperature to sample"
            )
        prepared = texts if isinstance(texts, Prepared) else self.prepare(texts)
        if prepared is not texts:
            prepared.check()
            if prepared.unknown:
                where = numbered("text", prepared.unknown, len(prepared.unknown))
                count = sum(prepared.unknown.values())
                warnings.warn(f"{count:,} unknown symbols (in {where})", stacklevel=2)
        outputs: list[list[Output]] = [[] for _ in prepared.tokens.lengths()]
        for rows, found in self.decode_rows(prepared.tokens, decoding, samples, batch_size, offset):
            if found is None:
                size = prepared.tokens.lengths()[rows[0]]
                prepared.refused[rows[0]] = f"{size:,} tokens need too much memory; split the text"
                if prepared is not texts:
                    prepared.check()
                continue
            for row, tokens, scores in zip(rows, *found, strict=True):
                outputs[row] += map(self.output, tokens[:n_best], scores[:n_best].tolist())
        for index in prepared.refused:  # some of its samples may have fitted
            outputs[index] = []
        if decoding.temperature:  # beam search has ranked its own, those without EOS last
            for own in outputs:
                own.sort(key=lambda output: -output.score)
        return [own or [Output("", [], 0.0)] * n_best for own in outputs]

    def decode_rows(
        self,
        sources: RaggedArray,
        decoding: DecodingConfig,
        samples: int,
        batch_size: int,
        offset: int,
    ) -> Iterator[tuple[list[int], Hypotheses | None]]:
        """Yields indices of sources of similar length, and their hypotheses.

        Halves batches that do not fit in memory; None: a single source does not fit.
        """
        lengths = sources.lengths()
        widths = self.padded_lengths(lengths)
        for width in np.unique(widths[lengths > 1])[::-1].tolist():
            rows = np.repeat(np.flatnonzero((lengths > 1) & (widths == width)), samples)
            streams = np.stack([offset + rows, np.arange(len(rows)) % samples], axis=1)
            first = range(batch_size, len(rows), batch_size)
            parts = np.split(np.arange(len(rows)), first)[::-1]
            while parts:
                part, found = parts.pop(), None
                try:
                    batch = sources.take(rows[part]).to_padded(width)
                    found = self.decode(batch, streams[part], decoding)
                except (MemoryError, jax.errors.JaxRuntimeError) as error:
                    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(
                        error
                    ):
                        raise
                    if len(part) > 1:
                        parts += np.array_split(part, 2)[::-1]
                        continue
                yield rows[part].tolist(), found

    def decode(
        self,
        sources: Int[np.ndarray, "rows S"],
        streams: Int[np.ndarray, "rows 2"],
        decoding: DecodingConfig,
    ) -> Hypotheses:
        """Decodes a batch; `streams` is that of `DecodingConfig.decode`."""

        def run(variables: Params, sources: Array, streams: Array) -> Hypotheses:
            data = Dataset(sources, sources, len(sources))
            return decoding.decode(self.model, variables, data, self.decode_margin, streams)

        if decoding not in self.programs:
            options = evaluation.compiler_options()
            self.programs[decoding] = jax.jit(run, compiler_options=options)
        rows = len(sources)  # padded to a power of two, which limits compilations
        pad = ((0, (1 << (rows - 1).bit_length()) - rows), (0, 0))
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            padded = np.pad(sources, pad), np.pad(streams, pad).astype(np.int32)
            found = self.programs[decoding](self.variables, *padded)
            return jax.tree.map(lambda x: np.asarray(x)[:rows], found)

    def padded_lengths(self, lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
        """The lengths that texts are padded to, within the model's positions."""
        widths = bucket(lengths)
        return np.minimum(widths, self.model.config.reach(int(widths.max(initial=0))))

    def output(self, tokens: Int[np.ndarray, "T"], score: float) -> Output:
        """Converts a hypothesis to an `Output`."""
        own = before_end(tokens.tolist())
        return Output(self.tokenizers.target.decode(own), own, score, EOS not in tokens)

    def align(self, texts: Sequence[str], outputs: Sequence[Output]) -> list[Alignment]:
        """The alignment of one output of each text."""
        tokenizers, alignments = self.tokenizers, []
        for text, output in zip(texts, outputs, strict=True):
            source, target = self.encode(text), [*output.tokens, EOS]
            (width,) = self.padded_lengths(np.array([max(len(source), len(target))])).tolist()
            target = target[:width]  # there may be no position left for EOS
            pair = [
                RaggedArray.from_lists([tokens]).to_padded(width) for tokens in (source, target)
            ]
            with jax.set_mesh(self.mesh), jax.enable_x64(False):
                maps = self.attention_maps(self.variables, Dataset(pair[0], pair[1], 1))["cross"]
            weights = np.stack([np.asarray(layer)[0].mean(0) for layer in maps])
            alignments.append(
                Alignment(
                    [*map(tokenizers.source.symbol, source)],
                    [*map(tokenizers.target.symbol, target)],
                    weights[:, : len(target), : len(source)],
                )
            )
        return alignments


def bucket(lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
    """Rounds lengths up to 8, 16, 24, 32, 48, 64, 96, 128, …, which limits compilations."""
    power = 1 << np.ceil(np.log2(np.maximum(lengths, 8))).astype(int)
    return np.where((power > 16) & (lengths <= power * 3 // 4), power * 3 // 4, power)
