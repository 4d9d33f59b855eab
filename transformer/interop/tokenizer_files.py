"""The tokenizer files of Hugging Face folders: `read` and `write`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer.data.corpus import Tokenizers
from transformer.data.imported import CODECS, ImportedTokenizer, TokenIds
from transformer.data.tokenizer import (
    EOS,
    PAD,
    SPECIALS,
    ByteTokenizer,
    PieceTokenizer,
    SymbolTokenizer,
    Tokenizer,
)
from transformer.errors import UserError, explained, needs
from transformer.files import write_atomically
from transformer.interop.layout import Values
from transformer.interop.readers import read_json
from transformer.workdir import write_json

UNKNOWNS = ("<unk>", "[UNK]")
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]  # before the other pieces
# The source's languages where tokenizer_config.json names none: of M2M100 and of NLLB, of mBART.
LANGUAGES = {"m2m_100": ("__en__", "eng_Latn"), "mbart": ("en_XX",)}


def read(
    folder: Path, config: Values, ids: TokenIds, sizes: tuple[int, int], file: Path | None
) -> Tokenizers:
    """Returns the tokenizers of `folder`.

    Args:
      config: the values of its config.json.
      ids: tokens with a role, without the unknown token, which is known by its name.
      sizes: the rows of the tables of source and target.
      file: a SentencePiece model to use instead of the folder's.
    """
    family, settings = config["model_type"], _optional(folder / "tokenizer_config.json")

    def make(kind: str, model: bytes, pieces: Sequence[str], size: int, **options: Any) -> Any:
        names = CODECS[kind](model, pieces).pieces
        numbers = {piece: number for number, piece in enumerate(names)}
        unknown = next((numbers[name] for name in UNKNOWNS if name in numbers), None)
        prefix, suffix = _frame(family, settings, numbers, ids)
        roles = ids._replace(unk=unknown)
        options |= {"ids": roles, "pieces": pieces, "prefix": prefix, "suffix": suffix}
        return ImportedTokenizer.make(kind, model, size=size, **options)

    if family != "marian":
        return Tokenizers(*make(*_find(folder, config, settings, file), sizes[0]).sides())
    paths = [file or folder / "source.spm", file or folder / "target.spm"]
    kind = "sentencepiece" if paths[0].is_file() else "pieces"
    models = [_read(path) for path in paths] if paths[0].is_file() else [b"", b""]
    vocabulary, other = folder / "vocab.json", folder / "target_vocab.json"
    if not other.is_file():
        given = kind, models[0], _vocabulary(vocabulary), sizes[0]
        return Tokenizers(*make(*given, target_model=models[1]).sides())
    given = zip(models, (vocabulary, other), sizes, strict=True)
    both = [make(kind, model, _vocabulary(path), size) for model, path, size in given]
    return Tokenizers(both[0].sides()[0], both[1].sides()[1])


def _frame(
    family: str, settings: Values, numbers: dict[str, int], ids: TokenIds
) -> tuple[list[int], list[int]]:
    """The ids before a source, and those after its EOS."""
    if family == "bart" and ids.bos is not None:
        return [ids.bos], []
    language = settings.get("src_lang")
    names = (language, f"__{language}__", *LANGUAGES.get(family, ()))
    known = [numbers[name] for name in names if name in numbers and family in LANGUAGES][:1]
    # mBART's decoder starts with a language, and its source ends with one.
    return ([], known) if family == "mbart" and ids.start != ids.eos else (known, [])


def _find(
    folder: Path, config: Values, settings: Values, file: Path | None
) -> tuple[str, bytes, Sequence[str]]:
    """The kind, the model and the pieces (none: the model's) of the tokenizer in `folder`."""
    names = [folder / name for name in ("spiece.model", "sentencepiece.bpe.model")]
    path = file or next((name for name in names if name.is_file()), None)
    fast, vocabulary = folder / "tokenizer.json", folder / "vocab.json"
    # Of T5 and PEGASUS, and where vocab.json numbers them, the SentencePiece model is enough.
    enough = file or path == names[0] or vocabulary.is_file() or not fast.is_file()
    if path and enough:
        return "sentencepiece", _read(path), _pieces(folder, path, config, settings)
    if fast.is_file():
        return "tokenizers", fast.read_bytes(), ()
    if "ByT5Tokenizer" in (settings.get("tokenizer_class"), config.get("tokenizer_class")):
        return "bytes", b"", ()
    if vocabulary.is_file() and not (folder / "merges.txt").is_file():
        return "pieces", b"", _vocabulary(vocabulary)
    wanted = ", ".join(each.name for each in (*names, fast))
    raise UserError(f"{folder} has no tokenizer ({wanted}): add it, or name one by --tokenizer")


def _pieces(folder: Path, path: Path, config: Values, settings: Values) -> list[str]:
    """The pieces of a SentencePiece model and of the files beside it, in the order of their ids."""
    with explained(f"{path} is no SentencePiece model: name another file"):
        own = CODECS["sentencepiece"](path.read_bytes(), ()).pieces
    family, size = config["model_type"], config["vocab_size"]
    if (folder / "vocab.json").is_file():
        own = _vocabulary(folder / "vocab.json")
    elif family == "pegasus":
        masks = ["<mask_1>", "<mask_2>", *(f"<unk_{n}>" for n in range(2, 103))]
        own = ["<pad>", "</s>", *masks[: settings.get("offset", 103)], *own[2:]]
    elif family in LANGUAGES:
        own = [*FAIRSEQ, *own[3:]]
    elif family == "t5" and "added_tokens_decoder" not in settings:
        extra = [f"<extra_id_{n}>" for n in reversed(range(settings.get("extra_ids", 100)))]
        own += extra if len(own) + len(extra) <= size else []
    tokens = settings.get("added_tokens_decoder", {})
    added = {int(number): each["content"] for number, each in tokens.items()}
    added |= {number: name for name, number in _optional(folder / "added_tokens.json").items()}
    if not added:  # languages, in the order of their ids
        listed = _optional(folder / "special_tokens_map.json").get("additional_special_tokens", ())
        names = [each["content"] if isinstance(each, dict) else each for each in listed]
        added = dict(enumerate((name for name in names if name not in own), len(own)))
    named = dict(enumerate(own)) | {n: name for n, name in added.items() if n < max(size, len(own))}
    return [named.get(number, f"<{number}>") for number in range(max(named) + 1)]


def _vocabulary(path: Path) -> list[str]:
    """The pieces of a vocab.json in the order of their ids."""
    named = {number: piece for piece, number in read_json(path).items()}
    return [named.get(number, f"<{number}>") for number in range(max(named, default=-1) + 1)]


def _optional(path: Path) -> Values:
    return read_json(path) if path.is_file() else {}


def _read(path: Path) -> bytes:
    with explained(f"{path} cannot be read: name a SentencePiece model", OSError):
        return path.read_bytes()


def write(tokenizers: Tokenizers, family: str, out: Path) -> None:
    """Writes the files that `AutoTokenizer` reads; of an imported model those it came with."""
    source, target = tokenizers
    if isinstance(source, PieceTokenizer) and isinstance(target, PieceTokenizer):
        _write_marian(tokenizers, (source.model, target.model), out)
    elif not (isinstance(source, ImportedTokenizer) and isinstance(target, ImportedTokenizer)):
        _write_symbols(source, out)
        if not tokenizers.shared():  # the class has one tokenizer; targets are decoded by hand
            _write_symbols(target, out / "target")
    elif family == "marian":
        _write_marian(tokenizers, (source.codec.model, target.codec.model), out)
    else:
        _write_imported(source, family, out)


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def _settings(name: str, tokenizer: Tokenizer) -> Values:
    """The values of tokenizer_config.json: the class and the tokens with a role."""
    unknown = PAD if tokenizer.unknown_id is None else tokenizer.unknown_id
    roles = {"pad_token": PAD, "eos_token": EOS, "unk_token": unknown}
    return {"tokenizer_class": name} | {role: tokenizer.pieces[n] for role, n in roles.items()}


def _write_imported(tokenizer: ImportedTokenizer, family: str, out: Path) -> None:
    kind, pieces, codec = tokenizer.record["kind"], tokenizer.record["pieces"], tokenizer.codec
    settings: Values = {}
    if kind == "tokenizers":
        write_atomically(out / "tokenizer.json", codec.model)
        settings = _settings("PreTrainedTokenizerFast", tokenizer)
    elif kind == "sentencepiece":
        name = "sentencepiece.bpe.model" if family in LANGUAGES else "spiece.model"
        write_atomically(out / name, codec.model)
    elif kind == "bytes":
        settings = {"tokenizer_class": "ByT5Tokenizer"}
    languages = [tokenizer.pieces[number] for number in (*tokenizer.prefix, *tokenizer.end[1:])]
    if languages and family in LANGUAGES:
        settings["src_lang"] = languages[0].strip("_")
    write_json(out / "tokenizer_config.json", settings)
    if pieces and (kind == "pieces" or family == "m2m_100"):
        write_json(out / "vocab.json", _numbered(pieces))
    elif pieces:  # sentinels and languages
        added = {piece: n for piece, n in _numbered(pieces).items() if piece in codec.special}
        write_json(out / "added_tokens.json", added)


def _write_marian(tokenizers: Tokenizers, models: Sequence[bytes], out: Path) -> None:
    """SentencePiece models, if there are any, and vocabularies, as MarianTokenizer reads them."""
    shared = tokenizers.shared()
    for name, model in zip(("source.spm", "target.spm"), models, strict=True):
        if model:
            write_atomically(out / name, model)
    for name, side in zip(("vocab.json", "target_vocab.json"), tokenizers, strict=True):
        if name == "vocab.json" or not shared:
            rows = dict(zip(side.theirs.tolist(), side.pieces, strict=False))
            write_json(out / name, _numbered([rows[number] for number in sorted(rows)]))
    settings = _settings("MarianTokenizer", tokenizers.source) | {"separate_vocabs": not shared}
    write_json(out / "tokenizer_config.json", settings)


def _write_symbols(tokenizer: Tokenizer, out: Path) -> None:
    """A tokenizer.json of characters, words or bytes, which adds EOS."""
    with needs("interop"):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors
    library: Any = tokenizers
    if isinstance(tokenizer, ByteTokenizer):
        names = [*SPECIALS, *(f"<0x{value:02X}>" for value in range(256))]
        made = library.Tokenizer(models.BPE(_numbered(names), [], byte_fallback=True))
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    elif isinstance(tokenizer, SymbolTokenizer):
        unknown = tokenizer.unknown_id
        options = {} if unknown is None else {"unk_token": tokenizer.pieces[unknown]}
        made = library.Tokenizer(models.WordLevel(_numbered(tokenizer.pieces), **options))
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
    made.add_special_tokens([*SPECIALS])
    out.mkdir(parents=True, exist_ok=True)
    made.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", _settings("PreTrainedTokenizerFast", tokenizer))
