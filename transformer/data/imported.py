"""Tokenizers of imported models: the original vocabulary, with its tokens renumbered."""

import base64
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import BOS, EOS, PAD, Tokenizer, before_end
from transformer.errors import UserError, explained, nearest, needs

FIRST_BYTE = 3  # the id of byte 0 in ByT5
INVALID = "�"  # marks a number that is no token


class TokenIds(NamedTuple):
    """The ids of tokens with a role, as numbered where a vocabulary comes from."""

    pad: int
    eos: int
    start: int  # what the decoder reads first
    bos: int | None = None
    unk: int | None = None
    forced_first: int | None = None  # the first token of every output
    forced_last: int | None = None  # the last one of an output that reaches its length limit
    banned: tuple[int, ...] = ()  # tokens that no output has


class Codec:
    """How text becomes pieces and pieces text; this one splits text at white space."""

    special: frozenset[str] = frozenset()  # pieces that no text has; those of a role are others

    def __init__(self, model: bytes, pieces: Sequence[str]):
        self.model, self.pieces = model, list(pieces)  # by original id

    def encode(self, texts: list[str]) -> list[list[str]]:
        return [text.split() for text in texts]

    def decode(self, pieces: list[str]) -> str:
        return " ".join(pieces)


class SentencePieces(Codec):
    """A SentencePiece model; its pieces may have other ids in the vocabulary."""

    def __init__(self, model: bytes, pieces: Sequence[str]):
        with needs("text"):
            from sentencepiece import SentencePieceProcessor
        self.processor = given = SentencePieceProcessor()
        with explained("the SentencePiece model is damaged ({reason}); fetch it again"):
            given.LoadFromSerializedProto(model)
        ids = range(given.GetPieceSize())
        self.known = {given.IdToPiece(each) for each in ids if not given.IsControl(each)}
        super().__init__(model, pieces or [*map(given.IdToPiece, ids)])
        self.special = frozenset(self.pieces) - self.known

    def encode(self, texts: list[str]) -> list[list[str]]:
        return self.processor.Encode(texts, out_type=str)

    def decode(self, pieces: list[str]) -> str:
        # A piece that only the other side's model has stays as it is.
        return self.processor.DecodePieces(pieces).replace("▁", " ").strip()


class TokenizersLibrary(Codec):
    """A `tokenizer.json` of the library `tokenizers`."""

    def __init__(self, model: bytes, pieces: Sequence[str]):
        with needs("interop"):
            import tokenizers
        with explained("tokenizer.json is damaged ({reason}); fetch it again"):
            self.library = own = tokenizers.Tokenizer.from_buffer(model)
        own.no_truncation()
        own.no_padding()
        own.encode_special_tokens = True  # `<s>` in a text is ordinary text
        vocabulary = own.get_vocab(with_added_tokens=True)
        named = {number: piece for piece, number in vocabulary.items()}
        found = [named.get(each, f"<{each}>") for each in range(max(named) + 1)]
        super().__init__(model, pieces or found)
        added = own.get_added_tokens_decoder().values()
        self.special = frozenset(each.content for each in added if each.special)

    def encode(self, texts: list[str]) -> list[list[str]]:
        found = self.library.encode_batch(texts, add_special_tokens=False)
        return [each.tokens for each in found]

    def decode(self, pieces: list[str]) -> str:
        ids = [self.library.token_to_id(piece) for piece in pieces]
        return self.library.decode([each for each in ids if each is not None])


class Bytes(Codec):
    """The bytes of UTF-8, as ByT5 numbers them."""

    def __init__(self, model: bytes, pieces: Sequence[str]):
        names = ("<pad>", "</s>", "<unk>", *(f"<{value:02x}>" for value in range(256)))
        super().__init__(model, pieces or names)
        every = self.pieces[FIRST_BYTE : FIRST_BYTE + 256]
        self.special = frozenset(self.pieces) - {*every}
        self.bytes = {piece: value for value, piece in enumerate(every)}

    def encode(self, texts: list[str]) -> list[list[str]]:
        return [[self.pieces[FIRST_BYTE + value] for value in text.encode()] for text in texts]

    def decode(self, pieces: list[str]) -> str:
        return bytes(self.bytes.get(piece, 0xFF) for piece in pieces).decode(errors="replace")


CODECS: dict[str, Callable[[bytes, Sequence[str]], Codec]] = {
    "sentencepiece": SentencePieces,
    "tokenizers": TokenizersLibrary,
    "bytes": Bytes,
    "pieces": Codec,
}


class ImportedTokenizer(Tokenizer):
    """The source side of an imported tokenizer; `sides()` returns both.

    Every row of the imported table has an id. Ids are permuted: padding, BOS (without one the first
    other token) and EOS become 0, 1 and 2, and the others follow in their order. Sources are
    prefix, pieces, EOS, suffix, or have no EOS and suffix; targets are prefix, pieces, EOS. A text
    without pieces is EOS.
    """

    def __init__(self, saved: bytes):
        self.saved, self.record = saved, json.loads(saved)
        record, ids = self.record, TokenIds(*self.record["ids"])
        models = [base64.b64decode(each) for each in record["models"] if each is not None]
        codecs = [CODECS[record["kind"]](model, record["pieces"]) for model in models]
        self.codec, target_codec = codecs[0], codecs[-1]
        size, names = record["size"], list(self.codec.pieces)
        if len(names) > size:
            more = f"the tokenizer has {len(names):,} tokens and the model's table {size:,} rows"
            raise UserError(f"{more}; take the tokenizer that belongs to the model")
        rows = [f"<{number}>" for number in range(len(names), size)]  # that have no piece
        names += rows
        sides = record["prefix"], record["suffix"], record["target_prefix"]
        roles = {each for each in itertools.chain(ids[:-1], *sides) if each is not None}
        self.roles, self._original = ids, np.array(_order(ids, size, roles | {*ids.banned}))
        self._ours = np.argsort(self._original)
        self.pieces = [names[number] for number in self._original.tolist()]
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self.special = {names[number] for number in roles} | {*rows}
        self.special |= self.codec.special & target_codec.special
        self.special -= set() if ids.unk is None else {names[ids.unk]}
        (self.start,), self.banned = self._own(ids.start), (*self._own(*ids.banned),)
        given = ids.unk, ids.forced_first, ids.forced_last
        own = (None if number is None else self._own(number)[0] for number in given)
        self.unknown_id, self.forced_first, self.forced_last = own
        self.prefix, suffix, target_prefix = (self._own(*side) for side in sides)
        self.before, self.end = record["before"], [EOS, *suffix] if record["source_eos"] else []
        other = copy(self)
        other.codec, other.prefix, other.end, other.before = target_codec, target_prefix, [EOS], ""
        self._sides = other._sides = (self, other)

    @classmethod
    def make(
        cls,
        kind: str,
        model: bytes,
        *,
        ids: TokenIds,
        size: int,
        target_model: bytes | None = None,
        pieces: Sequence[str] | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        target_prefix: Sequence[int] | None = None,
        source_eos: bool = True,
    ) -> "ImportedTokenizer":
        """The tokenizer of a vocabulary with `size` rows; all ids are the original ones.

        Args:
          kind: a name in `CODECS`.
          model: a SentencePiece model, or a `tokenizer.json`; otherwise empty.
          target_model: that of the target, if it is another one.
          pieces: the vocabulary by id, language tokens included; None: the model's.
          prefix, suffix: tokens before a source, and after its EOS.
          target_prefix: tokens before a target; None: the forced first token.
          source_eos: whether a source ends with EOS and `suffix`.
        """
        if target_prefix is None:
            target_prefix = () if ids.forced_first is None else (ids.forced_first,)
        given = model, target_model
        models = [None if each is None else base64.b64encode(each).decode() for each in given]
        record = {"kind": kind, "models": models, "pieces": [*(pieces or ())], "ids": ids}
        record |= {"size": size, "prefix": [*prefix], "suffix": [*suffix], "before": ""}
        record |= {"target_prefix": [*target_prefix], "source_eos": source_eos}
        return cls(json.dumps(record).encode())

    def _own(self, *numbers: int) -> list[int]:
        """Our ids of original ones."""
        return self._ours[[*numbers]].tolist() if numbers else []

    @property
    def vocab_size(self) -> int:
        """The rows of the imported table."""
        return len(self.pieces)

    @property
    def theirs(self) -> Int[np.ndarray, "V"]:
        return self._original

    def sides(self) -> tuple[Tokenizer, Tokenizer]:
        return self._sides

    def original_ids(self, knob: str, names: str) -> list[int]:
        """The original ids of tokens named in `knob`, separated by spaces."""
        for name in names.split():
            if name not in self.numbers:
                raise UserError(f"{knob}={names!r}: no token is {name}{nearest(name, self.pieces)}")
        return [int(self._original[self.numbers[name]]) for name in names.split()]

    def prefixed(self, source: str | None = None, target: str | None = None) -> "ImportedTokenizer":
        """This tokenizer with other prefixes, names of tokens separated by spaces; None: the same.

        A source prefix that ends in a space is text: `"translate English to German: "`. Otherwise
        it replaces the suffix, if there is one and no prefix, as where a language follows EOS. The
        target prefix is one token, the first of all outputs; it replaces the start, if that is a
        language.
        """
        record, ids = dict(self.record), self.roles
        if source is not None and source != source.rstrip():
            record["before"] = source
        elif source is not None:
            where = "suffix" if record["suffix"] and not record["prefix"] else "prefix"
            record[where] = self.original_ids("source_prefix", source)
        if target is not None:
            tokens = self.original_ids("target_prefix", target)
            if len(tokens) != 1:
                raise UserError(f"target_prefix={target!r}: it is one token; name one")
            if self.start in (PAD, BOS, EOS):
                ids, record["target_prefix"] = ids._replace(forced_first=tokens[0]), tokens
            else:
                ids = ids._replace(start=tokens[0])
        return type(self)(json.dumps(record | {"ids": ids}).encode())

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.codec.encode([self.before + text for text in texts])
        return [
            [*self.prefix, *map(self._number, own), *self.end]
            if own and (text.strip() or not self.before)
            else [EOS]
            for own, text in zip(found, texts, strict=True)
        ]

    def _number(self, piece: str) -> int:
        """Our id of a piece of a text."""
        number = None if piece in self.special else self.numbers.get(piece)
        number = self.unknown_id if number is None else number
        if number is None:
            known = nearest(piece, self.numbers)
            raise UserError(f"{piece!r} is not in the imported vocabulary{known}")
        return number

    def decode(self, tokens: Iterable[int]) -> str:
        own = before_end(tokens)
        pieces = [self.pieces[number] for number in own if number < len(self.pieces)]
        text = self.codec.decode([piece for piece in pieces if piece not in self.special])
        return text + INVALID * (len(own) - len(pieces))

    def symbol(self, token: int) -> str:
        named = {EOS: "⊣"} | ({} if self.roles.bos is None else {BOS: "⊢"})
        return named.get(token) or self.pieces[token]

    def to_bytes(self) -> bytes:
        return self.saved

    def digest(self) -> str:
        """The SHA-256 of all that is saved: with other prefixes, texts have other tokens."""
        return hashlib.sha256(self.saved).hexdigest()


def _order(ids: TokenIds, size: int, named: set[int]) -> list[int]:
    """The original ids in the order of ours; `named` are those that have a role."""
    if wrong := [each for each in named if not 0 <= each < size]:
        raise UserError(f"token id {wrong[0]} is not in the model's table of {size:,} rows")
    if ids.pad == ids.eos or ids.bos in (ids.pad, ids.eos):
        found = f"pad, bos, eos = {ids.pad}, {ids.bos}, {ids.eos}"
        raise UserError(f"{found}: an imported vocabulary needs different tokens for these")
    others = [each for each in range(size) if each not in (ids.pad, ids.eos)]
    begin = others[0] if ids.bos is None else ids.bos
    return [ids.pad, begin, ids.eos, *(each for each in others if each != begin)]
