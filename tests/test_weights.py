"""Weights read and written tensor by tensor: what is written is an ordinary sharded checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from compression.runtime import UserError
from compression.weights import INDEX, WEIGHTS, Shards, ShardWriter

TENSORS = {
    "a.weight": torch.randn(7, 9).bfloat16(),
    "b": torch.randn(3),
    "c": torch.tensor(4.0),
    "d": torch.randn(20, 5),
    "e": torch.zeros(0, 4),
}


@pytest.mark.parametrize(("limit", "files"), [(1, 5), (130, 4), (10**9, 2)])
def test_shards_hold_what_was_written_and_no_more_than_their_size(tmp_path, limit, files):
    writer = ShardWriter(tmp_path, limit, len(TENSORS))
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()
    held = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert sorted(held) == [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    for tensors in held.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    index = json.loads((tmp_path / INDEX).read_text())
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    shards = Shards(tmp_path)
    assert sorted(shards.files) == sorted([*held, INDEX])
    for name, tensor in shards.tensors(TENSORS).items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype


def test_one_shard_is_the_usual_single_file(tmp_path):
    writer = ShardWriter(tmp_path, 10**9, 9)
    writer.add("d", TENSORS["d"])
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == Shards(tmp_path).files == [WEIGHTS]


def test_what_is_written_to_a_tensor_stays_in_memory(tmp_path):
    writer = ShardWriter(tmp_path, 10**9, 1)
    writer.add("d", TENSORS["d"])
    writer.close()
    Shards(tmp_path).tensors(["d"])["d"].zero_()
    assert torch.equal(Shards(tmp_path).tensors(["d"])["d"], TENSORS["d"])


def test_a_missing_or_damaged_file_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(UserError, match="model-00001-of-00001.safetensors: cannot be read"):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="weight_map is no object"):
        Shards(tmp_path)
