"""From texts to the texts that a trained model makes of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from transformer.data.batches import Dataset
from transformer.data.ragged import RaggedArray
from transformer.data.text import cleaned, numbered
from transformer.data.tokenizer import EOS, before_end
from transformer.errors import UserError, within
from transformer.inference import evaluation
from transformer.inference.decoding import Beams, beam_search, greedy, sample
from transformer.modules.model import Model, Params
from transformer.parallel.mesh import data_parallel_mesh
from transformer.plugins import load as load_plugins
from transformer.training import trained
from transformer.training.metrics import by_replica
from transformer.workdir import Workdir


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How outputs are looked for.

    beam_size: hypotheses a source; 1 without a temperature is greedy decoding.
    length_penalty: α of beam search; 0 ranks by probability, more favours longer outputs.
    temperature: of sampling, from 1e-6; 0 is no sampling.
    top_k: of sampling, so many of the likeliest tokens; 0: all.
    top_p: of sampling, the likeliest that have this share together; 1: all.
    seed: of sampling.
    decode_margin: tokens that an output may have more than its source; None: as the run says.

    Raises:
      UserError: they are out of range, or at odds.
    """

    beam_size: int = 1
    length_penalty: float = 0.6
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    decode_margin: int | None = None

    def __post_init__(self):
        within("beam_size", self.beam_size, 1, 1_000)
        within("length_penalty", self.length_penalty, 0.0, 100.0)
        if self.temperature:  # logits over less are no float32
            within("temperature", self.temperature, 1e-6, 1e6)
        within("top_k", self.top_k, 0, 2**20)
        within("top_p", self.top_p, 0.0, 1.0)
        within("seed", self.seed, 0, 2**32 - 1)
        within("decode_margin", self.decode_margin or 0, 0, 2**16)
        if self.temperature and self.beam_size > 1:
            raise UserError(
                f"temperature={self.temperature}, beam_size={self.beam_size}: outputs are drawn, "
                "or searched for; set temperature to 0, or beam_size to 1"
            )
        if not self.temperature and (self.top_k, self.top_p) != (0, 1.0):
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p}: they say what may be drawn, and nothing "
                "is without a temperature; set temperature=1"
            )

    def describe(self) -> dict[str, int | float]:
        """Those of its settings that matter."""
        if self.temperature:
            names = ["temperature", "top_k", "top_p", "seed"]
        else:
            names = ["beam_size"] + ["length_penalty"] * (self.beam_size > 1)
        names += ["decode_margin"] * (self.decode_margin is not None)
        return {name: getattr(self, name) for name in names}

    def decode(
        self,
        model: Model,
        params: Params,
        data: Dataset,
        margin: int,
        draws: Int[Array, "examples 2"] | None = None,
    ) -> Beams:
        """`evaluation.decode` of all sources; without a search one hypothesis each, with its log p.

        Args:
          model: the model.
          params: its variables.
          data: the examples.
          margin: tokens that an output may have more than its source, unless `decode_margin` says.
          draws: of each, two numbers that, with the seed, decide what is drawn; None: its place.
        """
        margin = margin if self.decode_margin is None else self.decode_margin
        length = model.config.reach(data.source.shape[1] + margin)
        if self.beam_size > 1:
            settings = {"beam_size": self.beam_size, "length_penalty": self.length_penalty}
            search = partial(beam_search, margin=margin, **settings)
            return evaluation.decode(model, params, data, length, search)
        search, keys = partial(greedy, margin=margin), None
        if self.temperature:
            settings = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            search = partial(sample, margin=margin, **settings)
            place = jnp.arange(len(data))
            keys = self.keys(jnp.stack([place, 0 * place], 1) if draws is None else draws)
        found = evaluation.decode(model, params, data, length, search, keys)
        return Beams(found.tokens[:, None], found.log_p[:, None])

    def keys(self, draws: Int[Array, "examples 2"]) -> Array:
        """A key of each two numbers."""
        key = jax.random.key(self.seed)
        return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n[0]), n[1]))(draws)


class Prepared(NamedTuple):
    """Texts as a model reads them, and which of them it cannot.

    tokens: of each text, its end included; of one that is empty or refused, the end alone.
    refused: index → why the text cannot be processed; its outputs are empty.
    unknown: index → how many of its symbols the tokenizer never learned.
    """

    tokens: RaggedArray
    refused: dict[int, str]
    unknown: dict[int, int]

    def check(self) -> None:
        """Raises a UserError if a text is refused."""
        for index, reason in self.refused.items():
            raise UserError(f"texts[{index}]: {reason}")

    def warn(self) -> None:
        """Warns the caller of `generate` of unknown symbols."""
        if self.unknown:
            where = numbered("text", self.unknown, len(self.unknown))
            count = sum(self.unknown.values())
            warnings.warn(f"{count:,} symbols were never learned (in {where})", stacklevel=3)


class Output(NamedTuple):
    """What a model made of a text.

    text: of the tokens.
    tokens: without the end.
    score: log p, in nats; of beam search divided by the length penalty.
    cut: whether it reached the limit of tokens without an end.
    """

    text: str
    tokens: list[int]
    score: float
    cut: bool = False


class Alignment(NamedTuple):
    """Where an output looked: the cross-attention of each layer, the mean of its heads.

    source, output: their tokens as text, the end included.
    weights: [layers, output, source], each row of them sums to 1.
    """

    source: list[str]
    output: list[str]
    weights: Float[np.ndarray, "L T S"]


class Generator:
    """A trained model, ready for texts: compiled when first used, once for each size of a batch.

    Args:
      workdir: the run's folder.
      checkpoint: latest, best, or the number of a step.
      replica: of a population, which one.
      mesh: the devices; None: all of them, a part of a batch each.
      plugins: the modules that the run names as its plugins, which are imported.

    Raises:
      UserError: the folder holds no run, or the checkpoint is missing or damaged.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        checkpoint: str = "latest",
        replica: int = 0,
        mesh: Mesh | None = None,
        plugins: Sequence[str] = (),
    ):
        load_plugins(plugins)
        self.mesh = mesh or data_parallel_mesh()
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            loaded = trained.load(Workdir(str(workdir)), self.mesh, checkpoint)
        within("replica", replica, 0, loaded.cfg.replicas - 1)
        self.cfg, self.tokenizers, self.model, self.step = loaded[:4]
        self.params = by_replica(loaded.variables, self.cfg.replicas)[replica]
        self.programs: dict[Decoding, Callable[..., Beams]] = {}
        self.maps = jax.jit(partial(evaluation.attention_maps, self.model))

    def prepare(self, texts: Iterable[str]) -> Prepared:
        """Texts for `generate`; those that it cannot process are named and stop nothing.

        Raises:
          UserError: `texts` is one text instead of several.
          TypeError: one of them is no str.
        """
        if isinstance(texts, str | bytes):
            raise UserError("texts: one text is no list of texts; write generate([text])")
        tokens, refused, unknown = [], {}, {}
        for index, text in enumerate(texts):
            own = [EOS]
            try:
                own = self.encode(text)
            except UnicodeEncodeError:
                refused[index] = "a lone surrogate in it is half a character; take it out"
            except UserError as error:
                refused[index] = str(error)
            if count := self.tokenizers.source.count_unknown(own):
                unknown[index] = count
            tokens.append(own)
        return Prepared(RaggedArray.from_lists(tokens), refused, unknown)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, cleaned as those of training were.

        Raises:
          UserError: it has a symbol that the tokenizer refuses, or is longer than the positions.
          UnicodeEncodeError: it holds a lone surrogate.
        """
        tokens = self.tokenizers.source.encode(cleaned(text))
        if (reach := self.cfg.model.reach(len(tokens))) < len(tokens):
            raise UserError(
                f"{len(tokens):,} tokens, its end included, are more than the {reach:,} positions "
                "of the model; shorten or split it"
            )
        return tokens

    def generate(
        self,
        texts: Iterable[str] | Prepared,
        decoding: Decoding = Decoding(),
        *,
        n_best: int = 1,
        batch_size: int = 128,
        first: int = 0,
    ) -> list[list[Output]]:
        """The best outputs of each text, the best first; of an empty text an empty one.

        Warns of symbols that the tokenizer never learned: the model cannot tell them apart.

        Args:
          texts: in any order; those of like length are decoded together. Of `prepare`: what cannot
            be processed adds to `refused` and is no error, and nothing is warned of.
          decoding: how to look for outputs.
          n_best: how many of each: of beam search the best, of sampling so many draws.
          batch_size: texts that are decoded at once; what comes out does not depend on it.
          first: how many texts came before; what is drawn depends on a text's number.

        Raises:
          UserError: a text is longer than the model's positions or the memory, or has a character
            that the tokenizer refuses; or `texts` is one text.
          TypeError: one of them is no str.
        """
        within("batch_size", batch_size, 1, 2**20)
        within("n_best", n_best, 1, 2**20)
        draws = n_best if decoding.temperature else 1
        if n_best > max(decoding.beam_size, draws):
            raise UserError(
                f"n_best={n_best}: of beam_size={decoding.beam_size} no more come; raise that, or "
                "set a temperature, and they are drawn"
            )
        prepared = texts if isinstance(texts, Prepared) else self.prepare(texts)
        if prepared is not texts:
            prepared.check()
            prepared.warn()
        outputs: list[list[Output]] = [[] for _ in prepared.tokens.lengths()]
        for rows, found in self.found(prepared.tokens, draws, decoding, batch_size, first):
            if found is None:
                size = prepared.tokens.lengths()[rows[0]]
                prepared.refused[rows[0]] = f"{size:,} tokens need too much memory; split it"
                if prepared is not texts:
                    prepared.check()
                continue
            for row, tokens, scores in zip(rows, *found, strict=True):
                outputs[row] += map(self.output, tokens[:n_best], scores[:n_best].tolist())
        for index in prepared.refused:  # of several draws some may have had room
            outputs[index] = []
        if decoding.temperature:  # a search has put its own in order, those without an end last
            for own in outputs:
                own.sort(key=lambda output: -output.score)
        return [own or [Output("", [], 0.0)] * n_best for own in outputs]

    def found(
        self, sources: RaggedArray, draws: int, decoding: Decoding, batch_size: int, first: int
    ) -> Iterator[tuple[list[int], Beams | None]]:
        """Numbers of sources, those of like length together, and their scored hypotheses.

        None, where there is not enough memory for a source by itself. Arguments as of `generate`.
        """
        widths = self.widths(sources.lengths())
        real = np.flatnonzero(sources.lengths() > 1)
        for width in np.unique(widths[real])[::-1].tolist():
            rows = np.repeat(real[widths[real] == width], draws)
            places = np.stack([first + rows, np.arange(len(rows)) % draws], axis=1)

            def run(part: Int[np.ndarray, "part"], rows=rows, places=places, width=width) -> Beams:
                return self.decode(
                    sources.take(rows[part]).to_padded(width), places[part], decoding
                )

            for part, found in in_memory(run, len(rows), batch_size):
                yield rows[part].tolist(), found

    def decode(
        self,
        sources: Int[np.ndarray, "rows S"],
        draws: Int[np.ndarray, "rows 2"],
        decoding: Decoding,
    ) -> Beams:
        """The scored hypotheses of a batch; `draws` as of `Decoding.decode`."""
        rows = len(sources)
        more = ((0, (1 << (rows - 1).bit_length()) - rows), (0, 0))  # few programs are compiled
        run = self.program(decoding)
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            found = run(self.params, np.pad(sources, more), np.pad(draws, more).astype(np.int32))
            return jax.tree.map(lambda x: np.asarray(x)[:rows], found)

    def program(self, decoding: Decoding) -> Callable[..., Beams]:
        """(parameters, sources, draws) → scored hypotheses; jit-compiled."""

        def run(params: Params, sources: Array, draws: Array) -> Beams:
            data = Dataset(sources, sources, len(sources))
            return decoding.decode(self.model, params, data, self.cfg.decode_margin, draws)

        if decoding not in self.programs:
            options = evaluation.compiler_options()
            self.programs[decoding] = jax.jit(run, compiler_options=options)
        return self.programs[decoding]

    def widths(self, lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
        """What rows are padded to: `roomy`, as far as the model's positions reach."""
        widths = roomy(lengths)
        return np.minimum(widths, self.cfg.model.reach(int(widths.max(initial=0))))

    def output(self, tokens: Int[np.ndarray, "T"], score: float) -> Output:
        """A hypothesis as text."""
        own = before_end(tokens.tolist())
        return Output(self.tokenizers.target.decode(own), own, score, EOS not in tokens)

    def align(self, texts: Sequence[str], outputs: Sequence[Output]) -> list[Alignment]:
        """Where the decoder looked for each token of an output of each text."""
        tokenizers, found = self.tokenizers, []
        for text, output in zip(texts, outputs, strict=True):
            source = self.encode(text)
            target = [*output.tokens, EOS]
            (width,) = self.widths(np.array([max(len(source), len(target))])).tolist()
            target = target[:width]  # no room for an end, where positions reach no further
            pair = [
                RaggedArray.from_lists([tokens]).to_padded(width) for tokens in (source, target)
            ]
            with jax.set_mesh(self.mesh), jax.enable_x64(False):
                maps = self.maps(self.params, Dataset(pair[0], pair[1], 1))["cross"]
            weights = np.stack([np.asarray(layer)[0].mean(0) for layer in maps])
            found.append(
                Alignment(
                    [*map(tokenizers.source.symbol, source)],
                    [*map(tokenizers.target.symbol, target)],
                    weights[:, : len(target), : len(source)],
                )
            )
        return found


def in_memory(
    run: Callable[[Int[np.ndarray, "part"]], Beams], rows: int, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, "part"], Beams | None]]:
    """Numbers of rows, and `run` of them: a batch, or less where memory is short.

    None takes the place of the result of a row that does not fit by itself.
    """
    parts = [np.arange(at, min(at + batch_size, rows)) for at in range(0, rows, batch_size)][::-1]
    while parts:
        part, found = parts.pop(), None
        try:
            found = run(part)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if len(part) > 1:
                parts += np.array_split(part, 2)[::-1]
                continue
        yield part, found


def roomy(lengths: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts"]:
    """The next of 8, 16, 24, 32, 48, 64, 96, 128, …: few programs are compiled for many lengths."""
    power = 1 << np.ceil(np.log2(np.maximum(lengths, 8))).astype(int)
    return np.where((power > 16) & (lengths <= power * 3 // 4), power * 3 // 4, power)
