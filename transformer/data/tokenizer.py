"""From text to token numbers and back: characters, words, bytes, or pieces that are learned."""

import abc
import hashlib
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from transformer.errors import UserError, nearest, needs

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
UNKNOWN = "<unk>"
# Up to 1,000 characters that end before a space if they can, and the space. SentencePiece skips a
# text of more than 4,192 bytes, which may be 1,048 characters.
PART = re.compile(r"(.{1,1000})(?: |\Z)|.{1,1000}", re.DOTALL)
SKIPPED = "▅"  # a text with this character SentencePiece skips too


class Tokenizer(abc.ABC):
    """Text as numbers, the first three of which are padding, beginning and end of sequence.

    No text becomes one of these three, also if it spells their names: `<eos>` in a text is a word,
    or pieces, like any other.

    pieces: the text of each number.
    unknown_id: the number of every symbol that was not learned; None: such a symbol is an error, or
      there is none.
    """

    pieces: Sequence[str]
    unknown_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Rounded up to a multiple of 8, so that a mesh can split it; the rest is never used."""
        return -(-len(self.pieces) // 8) * 8

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The numbers of `text`, and EOS."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS, or before the padding."""

    def symbol(self, token: int) -> str:
        """A few characters for a plot's axis: the token's own, or ⊢ for BOS and ⊣ for EOS."""
        return {BOS: "⊢", EOS: "⊣"}.get(token) or self.pieces[token]

    def count_unknown(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many of `tokens` stand for symbols that were not learned."""
        if self.unknown_id is None:
            return 0
        return int(np.count_nonzero(np.asarray(tokens) == self.unknown_id))

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """What `TOKENIZERS` makes the same tokenizer of again."""

    def digest(self) -> str:
        """A hash of the pieces in their order (SHA-256)."""
        return hashlib.sha256("\0".join(self.pieces).encode()).hexdigest()


class SymbolTokenizer(Tokenizer):
    """One token a symbol of a list: a character, or what stands between two spaces.

    Args:
      symbols: those that it knows, in the order of their numbers.
      separator: what stands between symbols; empty: they are characters.
      unknown: whether others are a token too, all of them the same one; else they are refused.
    """

    def __init__(self, symbols: Sequence[str], separator: str = "", unknown: bool = False):
        self.separator = separator
        self.pieces = (*SPECIALS, *symbols, *([UNKNOWN] if unknown else []))
        # Without the special tokens: a text may contain their names.
        self.ids = {symbol: number for number, symbol in enumerate(symbols, len(SPECIALS))}
        if unknown:
            self.unknown_id = self.ids[UNKNOWN] = len(self.pieces) - 1

    @classmethod
    def learn(cls, separator: str, texts: Iterable[str], vocab_size: int) -> "SymbolTokenizer":
        """Knows the symbols of `texts`: all characters, or the `vocab_size` most common words.

        Args:
          separator: as of the tokenizer.
          texts: what to learn from.
          vocab_size: the special tokens are counted too; of characters it is no limit.
        """
        counts = Counter(symbol for text in texts for symbol in split(text, separator))
        counts.pop(UNKNOWN, None)  # a text that spells it means the unknown word
        if not separator:
            return cls(sorted(counts), separator, unknown=True)
        common = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(common[: vocab_size - len(SPECIALS) - 1], separator, unknown=True)

    @classmethod
    def from_bytes(cls, saved: bytes) -> "SymbolTokenizer":
        """Of `to_bytes`."""
        return cls(**json.loads(saved))

    def encode(self, text: str) -> list[int]:
        """The numbers of `text`'s symbols, and EOS.

        Raises:
          UserError: a symbol is not in the list, and unknown ones are refused.
        """
        symbols, other = split(text, self.separator), self.unknown_id
        if other is not None:
            return [*(self.ids.get(symbol, other) for symbol in symbols), EOS]
        try:
            return [*(self.ids[symbol] for symbol in symbols), EOS]
        except KeyError as unknown:
            (symbol,) = unknown.args
            raise UserError(
                f"{symbol!r} in {reprlib.repr(text)} is not one of the tokenizer's symbols "
                f"{self.separator.join(self.pieces[len(SPECIALS) :])}"
                f"{nearest(symbol.lower(), self.ids)}"
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS, or before the padding.

        Tokens that are no symbol show as their name or `?`.
        """
        return self.separator.join(
            self.pieces[token] if token < len(self.pieces) else "?" for token in before_end(tokens)
        )

    def to_bytes(self) -> bytes:
        """JSON with the arguments."""
        unknown = self.unknown_id is not None
        symbols = self.pieces[len(SPECIALS) : len(self.pieces) - unknown]
        record = {"symbols": symbols, "separator": self.separator, "unknown": unknown}
        return json.dumps(record).encode()


def split(text: str, separator: str) -> list[str]:
    """The symbols of `text`."""
    return text.split() if separator else list(text)


def before_end(tokens: Iterable[int]) -> list[int]:
    """The tokens before the first EOS; of an output that was cut off, those before the padding."""
    own = list(itertools.takewhile(lambda token: token != EOS, map(int, tokens)))
    while own and own[-1] == PAD:
        own.pop()
    return own


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: any text in any language, nothing to learn, long sequences."""

    def __init__(self):
        self.pieces = (*SPECIALS, *(f"<{value:02x}>" for value in range(256)))

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> "ByteTokenizer":
        """The same whatever the texts are."""
        return cls()

    @classmethod
    def from_bytes(cls, saved: bytes) -> "ByteTokenizer":
        """Of `to_bytes`."""
        return cls()

    def encode(self, text: str) -> list[int]:
        """Its bytes, moved up by the three special tokens, and EOS."""
        return [*(len(SPECIALS) + value for value in text.encode()), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS, or before the padding.

        � stands for what is no UTF-8, or no byte at all.
        """
        values = bytearray()
        for token in before_end(tokens):
            known = len(SPECIALS) <= token < len(self.pieces)
            values += bytes([token - len(SPECIALS)]) if known else b"\xff"
        return values.decode(errors="replace")

    def symbol(self, token: int) -> str:
        """The character, if the byte is one by itself."""
        value = token - len(SPECIALS)
        return chr(value) if 0x21 <= value < 0x7F else super().symbol(token)

    def to_bytes(self) -> bytes:
        """Empty: there is nothing to know."""
        return b""


class PieceTokenizer(Tokenizer):
    """Pieces of words, learned by SentencePiece (Kudo and Richardson 2018).

    Nothing is lost: text is not normalised, spaces are pieces too, and a character that was
    not there to learn from is taken apart into its bytes. (But ▁, which stands for a space in
    SentencePiece's pieces, comes back as one.)

    Args:
      model: SentencePiece's own serialised model.
    """

    def __init__(self, model: bytes):
        with needs("text"):
            from sentencepiece import SentencePieceProcessor

        self.model = model
        self.processor = SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(model)
        self.unknown_id = self.processor.unk_id()
        size = self.processor.GetPieceSize()
        self.pieces = tuple(self.processor.IdToPiece(number) for number in range(size))

    @classmethod
    def learn(cls, kind: str, texts: Iterable[str], vocab_size: int) -> "PieceTokenizer":
        """Learns at most `vocab_size` pieces, fewer from little text.

        Args:
          kind: bpe (Sennrich et al. 2016) or unigram (Kudo 2018).
          texts: what to learn from.
          vocab_size: special tokens and the 256 bytes included.

        Raises:
          UserError: SentencePiece refuses.
        """
        with needs("text"):
            from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.Train(
                sentence_iterator=parts(texts),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                **dict(zip(("pad_id", "bos_id", "eos_id", "unk_id"), range(4), strict=True)),
                pad_piece=SPECIALS[PAD],
                bos_piece=SPECIALS[BOS],
                eos_piece=SPECIALS[EOS],
                unk_piece=UNKNOWN,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                byte_fallback=True,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.tokenizer={kind}, data.vocab_size={vocab_size}: {refusal(str(error))}"
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """The numbers of its pieces, and EOS."""
        return [*self.processor.Encode(text), EOS]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        return [[*tokens, EOS] for tokens in self.processor.Encode(list(texts))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text before the first EOS, or before the padding.

        A number that is no piece shows as SentencePiece's ⁇.
        """
        unknown = self.processor.unk_id()
        return self.processor.Decode(
            [token if token < len(self.pieces) else unknown for token in before_end(tokens)]
        )

    def to_bytes(self) -> bytes:
        """The model, which SentencePiece's own tools read."""
        return self.model


def parts(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, the long ones in parts, so that SentencePiece skips nothing of them."""
    for text in texts:
        for part in PART.finditer(text.replace(SKIPPED, " ")):
            yield part[1] or part[0]


def refusal(reason: str) -> str:
    """Why SentencePiece learns nothing, and what to do."""
    if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", reason):
        return (
            "the special tokens, the 256 bytes and the characters of the texts are "
            f"{int(needed[1]):,} pieces by themselves; raise data.vocab_size to that or more, or "
            "choose data.tokenizer=bytes"
        )
    if "sentences_.empty()" in reason:
        return "there is no text to learn from; name a split that has some"
    return f"SentencePiece says: {' '.join(reason.split())[-200:]}; choose another size, or bytes"


class Kind(NamedTuple):
    """How a tokenizer comes to be.

    learn: (texts, vocab_size) → tokenizer.
    read: `Tokenizer.to_bytes` → tokenizer.
    """

    learn: Callable[[Iterable[str], int], Tokenizer]
    read: Callable[[bytes], Tokenizer]


TOKENIZERS = {
    "characters": Kind(partial(SymbolTokenizer.learn, ""), SymbolTokenizer.from_bytes),
    "words": Kind(partial(SymbolTokenizer.learn, " "), SymbolTokenizer.from_bytes),
    "bytes": Kind(ByteTokenizer.learn, ByteTokenizer.from_bytes),
    "bpe": Kind(partial(PieceTokenizer.learn, "bpe"), PieceTokenizer),
    "unigram": Kind(partial(PieceTokenizer.learn, "unigram"), PieceTokenizer),
}
