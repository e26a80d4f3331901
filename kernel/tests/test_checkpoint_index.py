from __future__ import annotations

import json

import pytest
from checkpoint_cases import Checkpoint, write_shard
from nvfp4_megamoe.checkpoint.index import INDEX_FILE, SINGLE_FILE, read_index
from nvfp4_megamoe.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path)


def refused(directory, *words):
    with pytest.raises(CheckpointError) as error:
        read_index(directory)
    for word in ("expected", "ownload", *words):
        assert word in str(error.value), str(error.value)


def test_every_tensor_is_found(checkpoint):
    index = read_index(checkpoint.write())
    assert index.files == checkpoint.map
    assert set(index.shards) == set(checkpoint.shards)
    for file, tensors in checkpoint.shards.items():
        for name, (dtype, shape) in tensors.items():
            assert (index.info(name).dtype, list(index.info(name).shape)) == (dtype, shape)
            assert index.info(name).end <= (checkpoint.directory / file).stat().st_size
    assert index.data_bytes == sum(info.end - info.start for s in index.shards.values() for info in s.tensors.values())


def test_one_file_needs_no_index(tmp_path):
    write_shard(tmp_path / SINGLE_FILE, {"a": ("F32", [2])})
    assert read_index(tmp_path).files == {"a": SINGLE_FILE}


def test_files_that_the_index_does_not_name_are_ignored(checkpoint):
    write_shard(checkpoint.write() / "consolidated.safetensors", {"a": ("F32", [2])})
    assert "a" not in read_index(checkpoint.directory).files


def test_neither_index_nor_file(tmp_path):
    refused(tmp_path, str(tmp_path), INDEX_FILE, SINGLE_FILE)


def test_missing_shard(checkpoint):
    file, tensors = checkpoint.first(1)
    (checkpoint.write() / file).unlink()
    refused(checkpoint.directory, file, INDEX_FILE, f"{len(tensors)} tensor(s)", "missing")


def test_damaged_shard(checkpoint):
    file, _ = checkpoint.first(2)
    with (checkpoint.write() / file).open("ab") as handle:
        handle.write(b"\0")
    refused(checkpoint.directory, file, "too long")


def test_tensor_that_its_shard_lacks(checkpoint):
    name = "layers.1.ffn.experts.2.w3.weight_scale"
    file, tensors = checkpoint.first(1)
    del tensors[name]
    refused(checkpoint.write(), name, file, "does not have it")


def test_tensor_in_no_map(checkpoint):
    name = "layers.1.ffn.experts.2.w3.weight_scale"
    file = checkpoint.map.pop(name)
    refused(checkpoint.write(), name, file, "does not map it")


def test_tensor_in_two_shards(checkpoint):
    name = "layers.1.ffn.experts.2.w3.weight_scale"
    other, tensors = checkpoint.first(0)
    tensors[name] = ("F8_E4M3", [32, 4])
    refused(checkpoint.write(), name, other, f"maps it to {checkpoint.map[name]}")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}']
)
def test_malformed_index(checkpoint, text):
    (checkpoint.write() / INDEX_FILE).write_text(text)
    refused(checkpoint.directory, INDEX_FILE)


def test_shard_names_are_read_from_the_map(checkpoint):
    text = json.dumps({"weight_map": {"a": "no-such.safetensors"}})
    (checkpoint.write() / INDEX_FILE).write_text(text)
    refused(checkpoint.directory, "no-such.safetensors", "such as a")
