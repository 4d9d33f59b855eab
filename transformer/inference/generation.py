"""A trained model for texts: it generates, scores and encodes them, and returns its attention."""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from transformer.data.batches import Dataset
from transformer.data.packing import RaggedArray
from transformer.data.text import cleaned, numbered
from transformer.data.tokenizer import EOS, PAD, Tokenizer, before_end
from transformer.errors import UserError, explained, out_of_memory
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig, DecodingOptions, Module, check_types
from transformer.knobs import Range
from transformer.modules.model import Params

if TYPE_CHECKING:
    from transformer.run import Run


class Prepared(NamedTuple):
    """Tokenized texts, and their targets if they have some."""

    tokens: RaggedArray  # of each text, EOS included; only EOS for an empty or refused text
    refused: dict[int, str]  # index → why the text cannot be processed; its outputs are empty
    unknown: dict[int, int]  # index → the number of symbols that the tokenizers do not know
    targets: RaggedArray | None = None  # of each text; empty for a refused one

    def sides(self) -> list[RaggedArray]:
        """The tokens of the texts, and those of the targets if there are any."""
        return [self.tokens] if self.targets is None else [self.tokens, self.targets]

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

    def ids(self) -> list[int]:
        """The tokens with EOS, which a truncated output does not have."""
        return self.tokens if self.truncated else [*self.tokens, EOS]


# Token ids are used as they are; a text is followed by EOS.
Target = str | Output | Sequence[int] | np.ndarray


class Score(NamedTuple):
    """The probability of a target, given its source."""

    log_p: float  # in nats, summed over the tokens; NaN for a refused text
    tokens: int  # EOS included
    perplexity: float  # exp(-log_p / tokens); NaN without tokens


class Encoded(NamedTuple):
    """The encoder's output for texts; S is the length of the longest, EOS included."""

    memory: Float[np.ndarray, "B S D"]  # 0 on padding
    mask: Bool[np.ndarray, "B S"]  # True for tokens


class Attention(NamedTuple):
    """The attention weights for a text and its output, without padding.

    Query t of `decoder` and `cross` predicts output[t]; key t of `decoder` is the token before it,
    BOS for t = 0. A recurrent model has one layer of `cross` and none of the others (L = 0).
    """

    source: list[str]  # the tokens as text, EOS included
    output: list[str]
    encoder: Float[np.ndarray, "L N S S"]
    decoder: Float[np.ndarray, "L N T T"]
    cross: Float[np.ndarray, "L N T S"]


class TrainedModel:
    """A trained model with its tokenizers; `transformer.load(workdir)` returns one.

    Its methods take any number of texts, and return results in their order. They compile a program
    for each new pair of batch size and padded length. The variables are on the devices of the run's
    mesh, over which batches are sharded.
    """

    def __init__(self, run: "Run", variables: Params):
        self.config, self.tokenizers, self.mesh = run.config, run.tokenizers, run.mesh
        self.model = model = run.model
        self.variables = variables
        self.positions = model.config.reach(2**30)  # the model's maximum length
        decode = partial(evaluation.decode, model, margin=run.config.decode_margin)
        options = evaluation.compiler_options()
        self._decode = jax.jit(decode, static_argnames="decoding", compiler_options=options)
        self._encode = jax.jit(lambda variables, tokens: model.bind(variables).encode(tokens))
        score, maps = evaluation.score, evaluation.attention_maps
        self._score = jax.jit(lambda variables, x, y: score(model, variables, Dataset(x, y, 1)))
        self._attention = jax.jit(lambda variables, x, y: maps(model, variables, Dataset(x, y, 1)))

    @property
    def module(self) -> Module:
        """The Flax module with the trained variables, in evaluation mode; a new one each time."""
        return self.model.bind(self.variables)

    def prepare(self, texts: Iterable[str], targets: Iterable[Target] | None = None) -> Prepared:
        """Tokenizes texts, and targets to score; records those that cannot be processed.

        Raises:
          UserError: an argument is a single string, or there is not one target for each text.
          TypeError: a text is not a str.
        """
        if isinstance(texts, str | bytes) or isinstance(targets, str | bytes):
            raise UserError("a single string was given; pass a list: [text]")
        texts, refused, unknown = list(texts), {}, {}
        outputs = [()] * len(texts) if targets is None else list(targets)
        if len(texts) != len(outputs):
            raise UserError(f"{len(texts)} texts, {len(outputs)} targets: pass one for each text")
        rows: list[tuple[list[int], list[int]]] = [([EOS], []) for _ in texts]
        for index, pair in enumerate(zip(texts, outputs, strict=True)):
            try:
                rows[index] = self._tokenize(*pair)
            except UserError as error:
                refused[index] = str(error)
            if count := sum(map(Tokenizer.count_unknown, self.tokenizers, rows[index])):
                unknown[index] = count
        sources, wanted = (RaggedArray.from_lists([row[k] for row in rows]) for k in (0, 1))
        return Prepared(sources, refused, unknown, None if targets is None else wanted)

    def _tokenize(self, text: str, target: Target) -> tuple[list[int], list[int]]:
        """The tokens of a text and of its target."""
        source, last = _encode(self.tokenizers.source, text), self.model.tokens - 1
        if isinstance(target, Output):  # that of an empty text has not even EOS
            target = target.ids() if len(source) > 1 else ()
        if isinstance(target, str | bytes):
            tokens = _encode(self.tokenizers.target, target)
        else:
            with explained("the target is neither a text, nor an Output, nor token ids", TypeError):
                tokens = [*map(operator.index, target)]
        banned = self.model.outputs.banned
        if wrong := [each for each in tokens if not PAD < each <= last or each in banned]:
            first = min({*range(1, len(banned) + 2)} - {*banned})
            message = f"the target has token {wrong[0]}; outputs have those from {first} to {last}"
            raise UserError(message)
        for name, own in (("", source), ("the target's ", tokens)):
            if len(own) > self.positions:
                most = f"the model's {self.positions:,} positions; shorten or split the text"
                raise UserError(f"{name}{len(own):,} tokens, EOS included, exceed {most}")
        return source, tokens

    def _prepared(self, *sides: Iterable[Any]) -> Prepared:
        """`prepare`, where a refused text is an error, and unknown symbols are a warning."""
        prepared = self.prepare(*sides)
        prepared.check()
        if unknown := prepared.unknown:
            where = f"(in {numbered('text', unknown, len(unknown))})"
            warnings.warn(f"{sum(unknown.values()):,} unknown symbols {where}", stacklevel=3)
        return prepared

    def generate(
        self,
        texts: Iterable[str] | Prepared,
        *,
        n_best: int = 1,
        batch_size: int = 128,
        offset: int = 0,
        **decoding: Unpack[DecodingOptions],
    ) -> list[list[Output]]:
        """The outputs for each text, best first; an empty text has empty outputs.

        Args:
          texts: if not `Prepared`, a refused text is an error, and unknown symbols are a warning.
            A text that does not fit in memory is refused, too.
          n_best: outputs per text: the best of beam search, or independent samples. There may be
            fewer, if the options leave fewer or they are to be distinct.
          batch_size: the most texts decoded at once; outputs do not depend on it.
          offset: the index of the first text; samples depend on a text's index.
          decoding: fields of `DecodingConfig`, `beam_size=4`; the others are those of the run.

        Raises:
          UserError: a text is refused, or an option is wrong.
          TypeError: a text is not a str.
        """
        check_types(decoding)
        settings = replace(self.config.decoding, **decoding)
        Range(1, 2**20).check("n_best", n_best)
        samples = n_best if settings.temperature else 1
        if n_best > max(settings.beam_size, samples):
            remedy = "raise beam_size, or set a temperature to sample"
            raise UserError(f"n_best={n_best} exceeds beam_size={settings.beam_size}; {remedy}")
        prepared = texts if isinstance(texts, Prepared) else self._prepared(texts)
        lengths = prepared.tokens.lengths()
        limits = np.minimum(settings.limits(lengths, self.config.decode_margin), self.positions)
        most = limits[lengths > 1].max(initial=0) if (lengths > 1).any() else self.positions
        static, prefix = settings.split_prefix(self.tokenizers.target, int(most))
        given = 0 if prefix is None else len(prefix)
        for index in np.flatnonzero((lengths > 1) & (limits <= given)).tolist():
            room = f"its output has at most {limits[index]} tokens and the prefix {given}"
            prepared.refused[index] = f"{room}; raise decode_margin"
        rows = np.repeat(np.flatnonzero((lengths > 1) & (limits > given)), samples)
        streams = np.stack([offset + rows, np.arange(len(rows)) % samples], axis=1)
        with jax.set_mesh(self.mesh):
            size = evaluation.rows_at_once(self.model, batch_size, settings.beam_size)
        decode = partial(self._decode, prefix=prefix, decoding=static)
        sources = prepared._replace(targets=None)
        outputs: list[list[Output]] = [[] for _ in lengths]
        for part, found in self._batches(decode, sources, rows, size, streams):
            best = (each[:, : None if settings.distinct else n_best] for each in found)
            for row, tokens, scores in zip(part, *best, strict=True):
                outputs[row] += map(self._output, tokens, scores.tolist())
        if prepared is not texts:
            prepared.check()
        for index in prepared.refused:  # some of its samples may have fitted
            outputs[index] = []
        missing = [Output("", [], 0.0)] * (1 if settings.distinct else n_best)
        return [_ranked(own, settings)[:n_best] or missing for own in outputs]

    def _output(self, tokens: Int[np.ndarray, "T"], score: float) -> Output:
        own = before_end(tokens.tolist())
        return Output(self.tokenizers.target.decode(own), own, score, EOS not in tokens)

    def score(
        self,
        sources: Iterable[str] | Prepared,
        targets: Iterable[Target] = (),
        *,
        batch_size: int = 128,
    ) -> list[Score]:
        """The log-probability of each target, given its source, under teacher forcing.

        Args:
          sources: texts, see `generate`; or `Prepared` with targets.
          targets: texts, to which EOS is added; or token ids or outputs, which are used as given.
          batch_size: the most targets scored at once.
        """
        prepared = sources if isinstance(sources, Prepared) else self._prepared(sources, targets)
        if prepared.targets is None:
            raise UserError("these texts have no targets: prepare(texts, targets)")
        counts = prepared.targets.lengths()
        log_p, rows = np.zeros(len(counts)), np.flatnonzero(counts)
        for part, totals in self._batches(self._score, prepared, rows, batch_size):
            log_p[part] -= totals["nll"]
        if prepared is not sources:
            prepared.check()
        log_p[[*prepared.refused]] = np.nan
        with np.errstate(invalid="ignore", over="ignore"):
            perplexity = np.exp(-log_p / counts)
        rows = zip(*(each.tolist() for each in (log_p, counts, perplexity)), strict=True)
        return [Score(*row) for row in rows]

    def encode(self, texts: Iterable[str], *, batch_size: int = 128) -> Encoded:
        """The encoder's output for each text; see `generate` for what is refused."""
        prepared = self._prepared(texts)
        lengths = prepared.tokens.lengths()
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        memory = np.zeros((*mask.shape, self.model.config.d_model), np.float32)
        every = np.arange(len(lengths))
        for part, found in self._batches(self._encode, prepared, every, batch_size):
            width = min(found.shape[1], mask.shape[1])
            memory[part, :width] = found[:, :width]
        prepared.check()
        memory[~mask] = 0.0
        return Encoded(memory, mask)

    def attention(
        self, texts: Iterable[str], outputs: Iterable[Target], *, batch_size: int = 16
    ) -> list[Attention]:
        """The attention weights for each text and its output; see `score` for the arguments."""
        prepared = self._prepared(texts, outputs)
        results: dict[int, Attention] = {}
        every, heads = np.arange(len(prepared.tokens)), self.model.config.num_heads
        for part, maps in self._batches(self._attention, prepared, every, batch_size):
            for k, row in enumerate(part.tolist()):
                own = (side.take(part[[k]]).values.tolist() for side in prepared.sides())
                symbols = ([*map(of.symbol, x)] for of, x in zip(self.tokenizers, own, strict=True))
                source, output = symbols
                s, t, found = len(source), len(output), []
                for kind, q, c in (("encoder", s, s), ("decoder", t, t), ("cross", t, s)):
                    layers = [layer[k, :, :q, :c] for layer in maps[kind]]
                    found += [np.array(layers, np.float32).reshape(len(layers), heads, q, c)]
                results[row] = Attention(source, output, *found)
        prepared.check()
        return [results[row] for row in every.tolist()]

    def _batches(
        self, call: Callable, prepared: Prepared, rows: np.ndarray, size: int, *arrays: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields some of `rows`, indices of texts of similar length, and the results of `call`.

        `call` takes the variables, the padded tokens of texts and targets, and rows of `arrays`. A
        batch that does not fit in memory is halved, a single text that does not is refused.
        """
        Range(1, 2**20).check("batch_size", size)
        sides = [side.take(rows) for side in prepared.sides()]
        lengths = np.max([side.lengths() for side in sides], axis=0)
        widths = np.minimum(bucket(lengths), self.positions)
        for width in np.unique(widths)[::-1].tolist():
            own = np.flatnonzero(widths == width)
            own = own[np.argsort(lengths[own], kind="stable")]
            parts = np.split(own, range(size, len(own), size))
            while parts:
                part = parts.pop(0)
                inputs = [side.take(part).to_padded(width) for side in sides]
                try:
                    yield rows[part], self._call(call, *inputs, *(each[part] for each in arrays))
                except (MemoryError, jax.errors.JaxRuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    row, most = part[0], "too much memory; split the text"
                    if len(part) > 1:
                        parts[:0] = np.array_split(part, 2)
                    else:
                        prepared.refused[int(rows[row])] = f"{lengths[row]:,} tokens need {most}"

    def _call(self, call: Callable, *inputs: np.ndarray) -> Any:
        rows = len(inputs[0])  # padded to a power of two, which limits compilations
        pad = ((0, (1 << (rows - 1).bit_length()) - rows), (0, 0))
        padded = (np.pad(each, pad).astype(np.int32) for each in inputs)
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            return jax.tree.map(lambda x: np.asarray(x)[:rows], call(self.variables, *padded))


def _ranked(outputs: list[Output], decoding: DecodingConfig) -> list[Output]:
    """The outputs of a text, best first; if they are to be distinct, the best of each text."""
    outputs = [output for output in outputs if output.score != -np.inf]  # missing hypotheses
    if decoding.temperature:  # beam search has ranked its own, those without EOS last
        outputs.sort(key=lambda output: -output.score)
    best: dict[str, Output] = {}
    for output in outputs:
        best.setdefault(output.text, output)
    return list(best.values()) if decoding.distinct else outputs


def _encode(tokenizer: Tokenizer, text: object) -> list[int]:
    """The tokens of a text, cleaned like those of training."""
    with explained("it has a lone surrogate (half a character); remove it", UnicodeEncodeError):
        return tokenizer.encode(cleaned(text))


def bucket(lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
    """Rounds lengths up to 8, 16, 24, 32, 48, 64, 96, 128, …, which limits compilations."""
    power = 1 << np.ceil(np.log2(np.maximum(lengths, 8))).astype(int)
    return np.where((power > 16) & (lengths <= power * 3 // 4), power * 3 // 4, power)
