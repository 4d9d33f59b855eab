"""`write_tokenizers`, the tokenizer files of an exported folder."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer.data.corpus import Tokenizers
from transformer.data.imported import ImportedTokenizer
from transformer.data.tokenizer import (
    EOS,
    ByteTokenizer,
    PieceTokenizer,
    SymbolTokenizer,
    Tokenizer,
)
from transformer.errors import UserError, needs
from transformer.files import write_atomically
from transformer.workdir import write_json

NAMES = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def write_tokenizers(tokenizers: Tokenizers, family: str, out: Path) -> None:
    """Writes the files that `AutoTokenizer` reads; of an imported model those it came with."""
    source, target = tokenizers
    if isinstance(source, ImportedTokenizer):
        _write_imported(tokenizers, family, out)
    elif isinstance(source, PieceTokenizer) and isinstance(target, PieceTokenizer):
        _write_pieces(source, target, out)
    else:
        _write_symbols(source, out)
        if not tokenizers.shared():  # the class has one tokenizer; targets are decoded by hand
            _write_symbols(target, out / "target")


def _write_imported(tokenizers: Tokenizers, family: str, out: Path) -> None:
    source, target = tokenizers
    if not (isinstance(source, ImportedTokenizer) and isinstance(target, ImportedTokenizer)):
        raise UserError("only one side has an imported tokenizer: export with --to=stablehlo")
    record = source.record
    models = [base64.b64decode(each) for each in record["models"] if each is not None]
    if family == "marian" and record["kind"] in ("sentencepiece", "pieces"):
        if not tokenizers.shared():
            models = [models[0], base64.b64decode(target.record["models"][0])]
        for name, model in zip(("source.spm", "target.spm"), (models[0], models[-1]), strict=True):
            if model:
                write_atomically(out / name, model)
        shared = tokenizers.shared()
        _write_marian(source, None if shared else target, out)
        return
    if record["kind"] == "tokenizers":
        write_atomically(out / "tokenizer.json", models[0])
        write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    elif record["kind"] == "sentencepiece":
        own = "spiece.model" if family in ("t5", "umt5", "pegasus") else "sentencepiece.bpe.model"
        write_atomically(out / own, models[0])
    elif record["kind"] == "bytes":
        write_json(out / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    if record["pieces"] and (record["kind"] == "pieces" or family == "m2m_100"):
        write_json(out / "vocab.json", _numbered(record["pieces"]))
    elif record["pieces"]:
        write_json(out / "added_tokens.json", _added(source, record["pieces"]))


def _added(tokenizer: ImportedTokenizer, pieces: Sequence[str]) -> dict[str, int]:
    """The tokens that no text has, apart from those with a role: sentinels and languages."""
    return {piece: n for n, piece in enumerate(pieces) if piece in tokenizer.codec.special}


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def _write_marian(source: Tokenizer, target: Tokenizer | None, out: Path) -> None:
    """Vocabularies and config of MarianTokenizer, beside the SentencePiece models."""
    numbered = {}
    for name, side in (("vocab.json", source), ("target_vocab.json", target)):
        if side is not None:
            rows = dict(zip(side.theirs.tolist(), side.pieces, strict=False))
            numbered[name] = _numbered([rows[number] for number in sorted(rows)])
            write_json(out / name, numbered[name])
    theirs = dict(zip(source.theirs.tolist(), source.pieces, strict=False))
    special = {key: theirs[int(source.theirs[k])] for k, key in enumerate(NAMES) if k != 1}
    unknown = source.unknown_id
    special["unk_token"] = special["pad_token"] if unknown is None else source.pieces[unknown]
    config = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": target is not None}
    write_json(out / "tokenizer_config.json", config | special)


def _write_pieces(source: PieceTokenizer, target: PieceTokenizer, out: Path) -> None:
    """Our SentencePiece models, as MarianTokenizer reads them."""
    for name, side in (("source.spm", source), ("target.spm", target)):
        write_atomically(out / name, side.to_bytes())
    _write_marian(source, None if source is target else target, out)


def _write_symbols(tokenizer: Tokenizer, out: Path) -> None:
    """A tokenizer.json of characters, words or bytes, which adds EOS."""
    with needs("interop"):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors
    library: Any = tokenizers
    vocabulary = _numbered(tokenizer.pieces)
    if isinstance(tokenizer, ByteTokenizer):
        # The library writes each byte as a printable character.
        alphabet = _byte_characters()
        vocabulary = {
            alphabet[number - 3] if number >= 3 else piece: number
            for number, piece in enumerate(tokenizer.pieces)
        }
        made = library.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, SymbolTokenizer):
        unknown = tokenizer.unknown_id
        options = {} if unknown is None else {"unk_token": tokenizer.pieces[unknown]}
        made = library.Tokenizer(models.WordLevel(vocab=vocabulary, **options))
        if tokenizer.separator:
            made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            made.pre_tokenizer = pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
            made.decoder = decoders.Fuse()
    else:
        raise UserError(f"{type(tokenizer).__name__} has no files there: use --to=stablehlo")
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    made.add_special_tokens([*NAMES.values()])
    out.mkdir(parents=True, exist_ok=True)
    made.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
    write_atomically(out / "tokenizer_config.json", json.dumps(config).encode())


def _byte_characters() -> list[str]:
    """The character that stands for each byte in the byte-level models of the library."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return [chr(v) if v in shown else chr(256 + hidden.index(v)) for v in range(256)]
