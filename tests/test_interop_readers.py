import json

import ml_dtypes
import numpy as np
import pytest

from transformer.errors import UserError
from transformer.interop.readers import INDEX, open_tensors, read_json

numpy_files = pytest.importorskip("safetensors.numpy")
VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_become_float32(tmp_path, dtype):
    stored = {name: value.astype(dtype) for name, value in VALUES.items()}
    numpy_files.save_file(stored, tmp_path / "model.safetensors")
    check_values(open_tensors(tmp_path))


def test_shards_are_read_by_their_index(tmp_path):
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, shard in shards.items():
        numpy_files.save_file({name: VALUES[name]}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    check_values(open_tensors(tmp_path))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**shards, "c": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"one\.safetensors lacks c"):
        open_tensors(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors is missing"):
        open_tensors(tmp_path)


@pytest.mark.oracle
def test_torch_files_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(value).bfloat16() for name, value in VALUES.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    check_values(open_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a torch file")
    with pytest.raises(UserError, match="not a file of PyTorch"):
        open_tensors(tmp_path)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="has neither model"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_json(tmp_path / "config.json")
    path = tmp_path / "model.safetensors"
    numpy_files.save_file(VALUES, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        open_tensors(tmp_path)


def check_values(found):
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value)
