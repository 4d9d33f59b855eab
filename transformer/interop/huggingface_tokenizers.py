"""`read_tokenizers`, the tokenizers of a Hugging Face folder with the ids of its files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer.data.corpus import Tokenizers
from transformer.data.imported import ImportedTokenizer, TokenIds
from transformer.errors import UserError, needs
from transformer.interop.huggingface import HuggingFaceModel
from transformer.interop.readers import read_json

UNKNOWNS = ("<unk>", "[UNK]")
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # of fairseq, before the other pieces
# The source's language where tokenizer_config.json names none.
LANGUAGES = {"m2m_100": "en", "nllb": "eng_Latn", "mbart": "en_XX"}


def read_tokenizers(folder: Path, model: HuggingFaceModel, file: Path | None) -> Tokenizers:
    """Returns the tokenizers of `folder`, or with `file`, a SentencePiece model, those of it."""
    settings = _optional(folder / "tokenizer_config.json")
    if model.family == "marian" and (folder / "vocab.json").is_file():
        return _marian(folder, model, file)
    kind, data, pieces = _find(folder, model, settings, file)
    made = _make(kind, data, pieces, model, model.vocab_size)
    prefix, suffix, target = _frame(made, model, settings)
    made = _make(
        kind,
        data,
        pieces,
        model,
        model.vocab_size,
        prefix=prefix,
        suffix=suffix,
        target_prefix=target,
    )
    return Tokenizers(*made.sides())


def _make(
    kind: str,
    data: bytes,
    pieces: Sequence[str] | None,
    model: HuggingFaceModel,
    size: int,
    **options: Any,
) -> ImportedTokenizer:
    """The tokenizer of some pieces, in which the unknown token is found by its name."""
    ids = TokenIds(**model.ids)
    made = ImportedTokenizer.make(kind, data, pieces=pieces, ids=ids, size=size)
    unknown = [made.theirs[made.numbers[name]] for name in UNKNOWNS if name in made.numbers]
    ids = ids._replace(unk=int(unknown[0]) if unknown else None)
    return ImportedTokenizer.make(kind, data, pieces=pieces, ids=ids, size=size, **options)


def _find(
    folder: Path, model: HuggingFaceModel, settings: dict[str, Any], file: Path | None
) -> tuple[str, bytes, list[str] | None]:
    """The kind, the file and the pieces (None: the file's) of the tokenizer in `folder`."""
    names = ("spiece.model", "sentencepiece.bpe.model")
    found = [folder / name for name in names if (folder / name).is_file()]
    path = file or (found[0] if found else None)
    fast = folder / "tokenizer.json"
    # Of T5 and PEGASUS, and where vocab.json numbers them, the SentencePiece model is enough.
    if path and (file or path.name == "spiece.model" or (folder / "vocab.json").is_file()):
        return "sentencepiece", _read(path), _pieces(folder, path, model, settings)
    if fast.is_file():
        return "tokenizers", fast.read_bytes(), None
    if path:
        return "sentencepiece", _read(path), _pieces(folder, path, model, settings)
    if "ByT5Tokenizer" in (settings.get("tokenizer_class"), model.tokenizer_class):
        return "bytes", b"", None
    if (folder / "vocab.json").is_file():
        return "pieces", b"", _vocabulary(folder / "vocab.json")
    wanted = ", ".join((*names, fast.name))
    raise UserError(f"{folder} has no tokenizer ({wanted}): add it, or name one by --tokenizer")


def _marian(folder: Path, model: HuggingFaceModel, file: Path | None) -> Tokenizers:
    """Two SentencePiece models, and one vocabulary or two."""
    vocabularies = [_vocabulary(folder / "vocab.json")]
    if (folder / "target_vocab.json").is_file():
        vocabularies.append(_vocabulary(folder / "target_vocab.json"))
    models: list[bytes] = []
    if file or (folder / "source.spm").is_file():
        paths = [file or folder / "source.spm", file or folder / "target.spm"]
        models = [_read(path) for path in paths]
    kind = "sentencepiece" if models else "pieces"
    one, other = models or (b"", b"")
    if len(vocabularies) == 1:
        options = {"target_model": other} if models and one != other else {}
        made = _make(kind, one, vocabularies[0], model, model.vocab_size, **options)
        return Tokenizers(*made.sides())
    sizes = model.vocab_size, model.target_vocab_size
    given = zip((one, other), vocabularies, sizes, strict=True)
    source, target = (_make(kind, data, names, model, size) for data, names, size in given)
    return Tokenizers(source.sides()[0], target.sides()[1])


def _frame(
    made: ImportedTokenizer, model: HuggingFaceModel, settings: dict[str, Any]
) -> tuple[list[int], list[int], list[int] | None]:
    """Their ids before a source, after its EOS, and before a target (None: the forced first)."""
    if model.family == "bart":
        bos = model.ids["bos"]
        return [] if bos is None else [bos], [], None
    if model.family not in ("mbart", "m2m_100"):
        return [], [], None
    names = [settings.get("src_lang"), LANGUAGES[model.family], LANGUAGES["nllb"]]
    numbers = [made.numbers.get(spelling) for name in names if name for spelling in _spelled(name)]
    known = [number for number in numbers if number is not None]
    source = [int(made.theirs[known[0]])] if known else []
    # mBART's decoder starts with a language, and its source ends with one.
    at_end = model.family == "mbart" and model.ids["start"] != model.ids["eos"]
    return ([], source, None) if at_end else (source, [], None)


def _spelled(language: str) -> tuple[str, str]:
    return language, f"__{language}__"  # M2M100's tokens


def _pieces(
    folder: Path, path: Path, model: HuggingFaceModel, settings: dict[str, Any]
) -> list[str] | None:
    """Their id → piece of a SentencePiece model."""
    with needs("text"):
        from sentencepiece import SentencePieceProcessor
    try:
        given = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is no SentencePiece model: name another file") from error
    own = [given.IdToPiece(number) for number in range(given.GetPieceSize())]
    if (folder / "vocab.json").is_file():
        pieces = _vocabulary(folder / "vocab.json")
    elif model.family == "pegasus":
        offset = settings.get("offset", 103)
        masks = ["<mask_1>", "<mask_2>", *(f"<unk_{n}>" for n in range(2, offset))]
        pieces = ["<pad>", "</s>", *masks[:offset], *own[2:]]
    elif model.family in ("mbart", "m2m_100"):
        pieces = [*SPECIALS, *own[3:]]
    else:
        pieces = own
        if model.family == "t5" and "added_tokens_decoder" not in settings:
            count = settings.get("extra_ids", 100)
            extra = [f"<extra_id_{n}>" for n in reversed(range(count))]
            pieces = [*own, *extra] if len(own) + count <= model.vocab_size else own
    return _with_added(folder, pieces, settings, model.vocab_size)


def _with_added(folder: Path, pieces: list[str], settings: dict[str, Any], size: int) -> list[str]:
    """The pieces with the tokens that other files of the folder add."""
    added = {
        int(n): each["content"] for n, each in settings.get("added_tokens_decoder", {}).items()
    }
    added |= {number: name for name, number in _optional(folder / "added_tokens.json").items()}
    if not added:  # languages, in the order of their ids
        listed = _optional(folder / "special_tokens_map.json").get("additional_special_tokens", ())
        names = [each["content"] if isinstance(each, dict) else each for each in listed]
        added = dict(enumerate((name for name in names if name not in pieces), len(pieces)))
    for number, name in sorted(added.items()):
        if number < len(pieces):
            pieces[number] = name
        elif number < size:
            pieces += [f"<{each}>" for each in range(len(pieces), number)]
            pieces.append(name)
    return pieces


def _vocabulary(path: Path) -> list[str]:
    """The pieces of a vocab.json in the order of their ids."""
    numbered = {number: piece for piece, number in read_json(path).items()}
    return [numbered.get(number, f"<{number}>") for number in range(max(numbered, default=-1) + 1)]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a SentencePiece model")
    return path.read_bytes()
