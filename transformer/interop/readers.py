"""`open_tensors`, the tensors of a Hugging Face folder, read one at a time."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  numpy reads bfloat16 only when it is imported
import numpy as np

from transformer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of some safetensors files as float32; one is read each time it is asked for."""

    def __init__(self, files: Mapping[str, Path]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        with _safe_open(self._files[name]) as file:
            return as_float32(file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class TorchTensors(Mapping[str, np.ndarray]):
    """The tensors of a torch file as float32; its memory map is read where a tensor is."""

    def __init__(self, state: "Mapping[str, Tensor]"):
        self._state = state

    def __getitem__(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self._state[name].float().numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """Returns `tensor` as a contiguous float32 array; float16 and bfloat16 lose nothing."""
    return np.ascontiguousarray(tensor, np.float32)


def read_json(path: Path) -> dict:
    """Returns the object in the JSON file `path`."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give the folder of a whole model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object: download it again")
    return found


def open_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """Returns the tensors of `folder`: of safetensors, its shards, or pytorch_model.bin."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        shards = {folder / shard for shard in weight_map.values()}
        held = {path: _names(path) for path in sorted(shards)}
        for name, shard in weight_map.items():
            if name not in held[folder / shard]:
                raise UserError(f"{folder / shard} lacks {name}: download it again")
        return Tensors({name: folder / shard for name, shard in weight_map.items()})
    if (path := folder / "model.safetensors").is_file():
        return Tensors(dict.fromkeys(_names(path), path))
    if (path := folder / "pytorch_model.bin").is_file():
        return _open_torch(path)
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: download one")


@contextlib.contextmanager
def _safe_open(path: Path) -> Iterator:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path.name} needs a library: pip install safetensors") from error
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, cut short or damaged: download it again") from error


def _names(path: Path) -> list[str]:
    with _safe_open(path) as file:
        return list(file.keys())


def _open_torch(path: Path) -> TorchTensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path.name} needs a library: pip install torch") from error
    try:
        return TorchTensors(torch.load(path, "cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch documents no class of its errors
        raise UserError(f"{path} is not a readable torch file: download it again") from error
