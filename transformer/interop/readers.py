"""Readers of what formats share: JSON, safetensors and PyTorch files, vocabularies."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy reads bfloat16 only when it is imported
import numpy as np

from transformer.data.corpus import Tokenizers
from transformer.data.imported import ImportedTokenizer, TokenIds
from transformer.errors import UserError, explained

INDEX = "model.safetensors.index.json"


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name as contiguous float32 arrays; each is read whenever it is asked for."""

    def __init__(self, reads: Mapping[str, Callable[[], np.ndarray]]):
        self._reads = reads

    def __getitem__(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self._reads[name](), np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in the JSON file `path`."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give the folder of a whole model")
    with explained(f"{path} is not JSON: download it again", ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object: download it again")
    return found


def open_tensors(folder: Path) -> LazyTensors:
    """Returns the tensors of `folder`: of safetensors, its shards, or pytorch_model.bin."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        files = {name: folder / shard for name, shard in weight_map.items()}
        held = {path: _names(path) for path in sorted({*files.values()})}
        for name, path in files.items():
            if name not in held[path]:
                raise UserError(f"{path} lacks {name}: download it again")
    elif (path := folder / "model.safetensors").is_file():
        files = dict.fromkeys(_names(path), path)
    elif (path := folder / "pytorch_model.bin").is_file():
        return torch_tensors(load_torch(path))
    else:
        lacking = "neither model.safetensors nor pytorch_model.bin"
        raise UserError(f"{folder} has {lacking}: download one")
    return LazyTensors({name: partial(_read, path, name) for name, path in files.items()})


@contextlib.contextmanager
def _safe_open(path: Path) -> Iterator[Any]:
    with explained(f"{path.name} needs a library: pip install safetensors", ImportError):
        from safetensors import SafetensorError, safe_open
    message = f"{path} is missing, cut short or damaged: download it again"
    with explained(message, SafetensorError, OSError), safe_open(path, "numpy") as file:
        yield file


def _names(path: Path) -> list[str]:
    with _safe_open(path) as file:
        return list(file.keys())


def _read(path: Path, name: str) -> np.ndarray:
    with _safe_open(path) as file:
        return file.get_tensor(name)


def load_torch(path: Path) -> dict[str, Any]:
    """Returns what a file of PyTorch holds, its tensors mapped from the file."""
    with explained(f"{path.name} needs a library: pip install torch", ImportError):
        import torch
    from argparse import Namespace  # OpenNMT-py's options

    kinds = Exception  # torch documents no class of its errors
    message = f"{path} is not a file of PyTorch that can be read safely: download it again"
    with explained(message, kinds), torch.serialization.safe_globals([Namespace]):
        found = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no tensors by name: give the file of a whole model")
    return found


def torch_tensors(state: Mapping[str, Any]) -> LazyTensors:
    """The tensors of PyTorch in `state` as float32 arrays."""
    return LazyTensors({name: partial(_array, tensor) for name, tensor in state.items()})


def _array(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def plain_tokenizers(
    pieces: Mapping[str, list[str]],
    ids: Mapping[str, TokenIds],
    model: Path | None,
    *,
    source_eos: bool,
) -> Tokenizers:
    """The tokenizers of vocabularies of source and target, which may be the same list.

    Text is split by a SentencePiece `model`; without one it is already split into pieces.
    """
    kind, data = "pieces", b""
    if model is not None:
        with explained(f"{model}: name a SentencePiece model that can be read", OSError):
            kind, data = "sentencepiece", model.read_bytes()
    make = partial(ImportedTokenizer.make, kind, data, source_eos=source_eos)
    sides = {side: make(pieces=own, ids=ids[side], size=len(own)) for side, own in pieces.items()}
    if pieces["source"] == pieces["target"]:
        return Tokenizers(*sides["target"].sides())
    return Tokenizers(sides["source"].sides()[0], sides["target"].sides()[1])


def token_ids(
    pieces: Sequence[str], pad: str, eos: str, start: str, bos: str, unk: str
) -> TokenIds:
    """The ids of tokens with a role in a vocabulary; `bos` and `unk` may be missing."""
    number = {piece: number for number, piece in enumerate(pieces)}
    for name in (pad, eos, start):
        if name not in number:
            raise UserError(f"the vocabulary lacks {name}: take the files of one whole model")
    banned = {number[each] for each in (pad, bos) if each in number}
    ids = number[pad], number[eos], number[start], number.get(bos), number.get(unk)
    return TokenIds(*ids, banned=(*sorted(banned),))
