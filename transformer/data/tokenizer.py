"""Tokenizers: text to token ids and back, by character, word, byte or learned subword piece."""

import abc
import hashlib
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.errors import UserError, nearest, needs, reason

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
UNKNOWN = "<unk>"
# SentencePiece skips texts of more than 4,192 bytes, which may be 1,048 characters. A part has up
# to 1,000 characters and ends before a space if possible.
PART = re.compile(r"(.{1,1000})(?: |\Z)|.{1,1000}", re.DOTALL)
SKIPPED = "▅"  # SentencePiece skips a text with this character, too


class Tokenizer(abc.ABC):
    """Base class of tokenizers; ids 0, 1 and 2 are padding, BOS and EOS.

    Text is never encoded as these special tokens: `<eos>` in a text is ordinary text.
    """

    pieces: Sequence[str]  # the text of each id
    unknown_id: int | None = None  # None: all symbols are known, or unknown ones raise an error
    end: Sequence[int] = (EOS,)  # what ends each text; a source of an imported model may differ
    # Of a target:
    start: int = BOS  # what the decoder reads first
    banned: tuple[int, ...] = (PAD, BOS)  # tokens that no output has
    forced_first: int | None = None  # the first token of every output
    forced_last: int | None = None  # the token of an output's last step, at its length limit

    @property
    def vocab_size(self) -> int:
        """The number of ids, rounded up to a multiple of 8, so that a mesh can divide it."""
        return -(-len(self.pieces) // 8) * 8

    @property
    def theirs(self) -> Int[np.ndarray, "V"]:
        """The id that each of our ids had where an imported tokenizer comes from."""
        return np.arange(self.vocab_size)

    def sides(self) -> "tuple[Tokenizer, Tokenizer]":
        """The tokenizers of source and target, if this one serves both."""
        return self, self

    def prefixed(self, source: str | None = None, target: str | None = None) -> "Tokenizer":
        """This tokenizer with other prefixes, if it is imported; a UserError otherwise."""
        for knob, given in (("source_prefix", source), ("target_prefix", target)):
            if given is not None:
                raise UserError(f"{knob}={given!r}: only imported models have one; leave it out")
        return self

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, followed by EOS."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return list(map(self.encode, texts))

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS or the padding; an invalid id becomes a visible mark."""

    def symbol(self, token: int) -> str:
        """A short label for a plot's axis: the token's text, ⊢ for BOS, ⊣ for EOS."""
        return {BOS: "⊢", EOS: "⊣"}.get(token) or self.pieces[token]

    def count_unknown(self, tokens: Sequence[int] | np.ndarray) -> int:
        if self.unknown_id is None:
            return 0
        return int(np.count_nonzero(np.asarray(tokens) == self.unknown_id))

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """The serialized tokenizer, for `TokenizerKind.read`."""

    def digest(self) -> str:
        """The SHA-256 of the pieces in order."""
        return hashlib.sha256("\0".join(self.pieces).encode()).hexdigest()


class SymbolTokenizer(Tokenizer):
    """A tokenizer with a fixed list of symbols: characters, or words separated by white space."""

    def __init__(self, symbols: Sequence[str], separator: str = "", unknown: bool = False):
        self.symbols, self.separator = (*symbols,), separator  # of words; empty: characters
        self.pieces = (*SPECIALS, *symbols, *[UNKNOWN] * unknown)
        # Without the special tokens: a text may contain their names.
        self.ids = {symbol: number for number, symbol in enumerate(symbols, len(SPECIALS))}
        if unknown:
            self.unknown_id = self.ids[UNKNOWN] = len(self.pieces) - 1

    @classmethod
    def learn(cls, separator: str, texts: Iterable[str], vocab_size: int) -> "SymbolTokenizer":
        """Learns all characters of `texts`, or the most common words, `vocab_size` ids in all."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.split() if separator else text)
        counts.pop(UNKNOWN, None)  # <unk> in a text is the unknown word
        if not separator:
            return cls(sorted(counts), separator, unknown=True)
        common = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(common[: vocab_size - len(SPECIALS) - 1], separator, unknown=True)

    @classmethod
    def read(cls, saved: bytes) -> "SymbolTokenizer":
        return cls(**json.loads(saved))

    def encode(self, text: str) -> list[int]:
        symbols = text.split() if self.separator else text
        ids: list[Any] = [self.ids.get(symbol, self.unknown_id) for symbol in symbols]
        if None in ids:
            symbol = symbols[ids.index(None)]
            raise UserError(
                f"{symbol!r} in {reprlib.repr(text)} is not one of the tokenizer's symbols "
                f"{self.separator.join(self.symbols)}{nearest(symbol.lower(), self.ids)}"
            )
        return [*ids, EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.separator.join(
            self.pieces[token] if token < len(self.pieces) else "?" for token in before_end(tokens)
        )

    def to_bytes(self) -> bytes:
        record = {"symbols": self.symbols, "separator": self.separator}
        return json.dumps(record | {"unknown": self.unknown_id is not None}).encode()


def before_end(tokens: Iterable[int]) -> list[int]:
    """The tokens before the first EOS, without trailing padding."""
    own = list(itertools.takewhile(lambda token: token != EOS, map(int, tokens)))
    while own and own[-1] == PAD:
        own.pop()
    return own


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: encodes any text without learning, as long sequences."""

    pieces = (*SPECIALS, *(f"<{value:02x}>" for value in range(256)))

    def encode(self, text: str) -> list[int]:
        return [*(len(SPECIALS) + value for value in text.encode()), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        values = (token - len(SPECIALS) for token in before_end(tokens))
        shown = bytes(value if 0 <= value < 256 else 0xFF for value in values)
        return shown.decode(errors="replace")

    def symbol(self, token: int) -> str:
        value = token - len(SPECIALS)
        return chr(value) if 0x21 <= value < 0x7F else super().symbol(token)

    def to_bytes(self) -> bytes:
        return b""


class PieceTokenizer(Tokenizer):
    """Lossless subword pieces learned by SentencePiece (Kudo and Richardson 2018).

    Text is not normalised, spaces are part of pieces, and unknown characters fall back to bytes.
    (SentencePiece writes a space as ▁, so a ▁ in a text is decoded as a space.)
    """

    def __init__(self, model: bytes):
        with needs("text"):
            from sentencepiece import SentencePieceProcessor
        self.model = model  # as SentencePiece serialized it
        self.processor = SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(model)
        given, unknown = self.processor, self.processor.unk_id()
        special = given.pad_id(), given.bos_id(), given.eos_id()  # -1: the model has none
        others = [each for each in range(given.GetPieceSize()) if each not in special]
        # The model's id of each of ours, and the reverse; they are equal if we learned the model.
        self.model_ids = (*(each if each >= 0 else unknown for each in special), *others)
        self.ours = {each: number for number, each in enumerate(self.model_ids)}
        self.unknown_id = self.ours[unknown]
        self.pieces = (*SPECIALS, *map(given.IdToPiece, others))

    @classmethod
    def learn(cls, model_type: str, texts: Iterable[str], vocab_size: int) -> "PieceTokenizer":
        """Learns pieces by bpe (Sennrich et al. 2016) or unigram (Kudo 2018).

        The vocabulary has at most `vocab_size` pieces, including the special tokens and the 256
        bytes; a small corpus may give fewer.
        """
        with needs("text"):
            from sentencepiece import SentencePieceTrainer
        shown = (text.replace(SKIPPED, " ") for text in texts)
        parts = (part[1] or part[0] for text in shown for part in PART.finditer(text))
        model, special = io.BytesIO(), {}
        for number, name in enumerate(("pad", "bos", "eos", "unk")):
            special |= {f"{name}_id": number, f"{name}_piece": f"<{name}>"}
        try:
            SentencePieceTrainer.Train(
                sentence_iterator=parts,
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                **special,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                byte_fallback=True,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            if needed := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
                why = f"the characters, bytes and special tokens need {needed[1]}; raise it"
            elif "sentences_.empty" in str(error):
                why = "there is no text to learn from; name a split that has some"
            else:
                why = f"SentencePiece failed: {reason(error)}; choose another size"
            knobs = f"data.tokenizer={model_type}, data.vocab_size={vocab_size}"
            raise UserError(f"{knobs}: {why}, or choose bytes") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:  # on all cores
        encoded = self.processor.Encode(list(texts))
        return [[*map(self.ours.__getitem__, tokens), EOS] for tokens in encoded]

    def decode(self, tokens: Iterable[int]) -> str:
        size, unknown = len(self.pieces), self.processor.unk_id()
        own = [self.model_ids[each] if each < size else unknown for each in before_end(tokens)]
        return self.processor.Decode(own)

    def to_bytes(self) -> bytes:
        return self.model


class GivenTokenizer(PieceTokenizer):
    """A SentencePiece model from elsewhere, which may normalise text."""

    def digest(self) -> str:
        """The SHA-256 of the model: its scores and normalisation matter, too."""
        return hashlib.sha256(self.model).hexdigest()


def _learn_imported(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    remedy = "set init_from to the folder of such a run, or choose another tokenizer"
    raise UserError(f"data.tokenizer=imported: imported tokenizers come with a run; {remedy}")


def _read_imported(saved: bytes) -> Tokenizer:
    from transformer.data.imported import ImportedTokenizer  # which imports this file

    return ImportedTokenizer(saved)


class TokenizerKind(NamedTuple):
    """How to make a tokenizer: learn it from texts and a `vocab_size`, or read its `to_bytes`."""

    learn: Callable[[Iterable[str], int], Tokenizer]
    read: Callable[[bytes], Tokenizer]


TOKENIZERS = {
    "characters": TokenizerKind(partial(SymbolTokenizer.learn, ""), SymbolTokenizer.read),
    "words": TokenizerKind(partial(SymbolTokenizer.learn, " "), SymbolTokenizer.read),
    "bytes": TokenizerKind(lambda texts, vocab_size: ByteTokenizer(), lambda _: ByteTokenizer()),
    "bpe": TokenizerKind(partial(PieceTokenizer.learn, "bpe"), PieceTokenizer),
    "unigram": TokenizerKind(partial(PieceTokenizer.learn, "unigram"), PieceTokenizer),
    "imported": TokenizerKind(_learn_imported, _read_imported),
}
