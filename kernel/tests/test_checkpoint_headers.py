from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import write_raw, write_shard
from nvfp4_megamoe.checkpoint.headers import read_header
from nvfp4_megamoe.errors import CheckpointError

TENSORS = {"a": ("F32", [2, 3]), "b": ("BF16", [5]), "empty": ("U8", [0, 4]), "scalar": ("F32", [])}


@pytest.fixture
def shard(tmp_path):
    return tmp_path / "model-00001-of-00001.safetensors"


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    for word in (str(path), "expected", "ownload", *words):
        assert word in str(error.value), str(error.value)


def test_offsets_are_those_of_the_file(shard):
    header = json.dumps(write_shard(shard, TENSORS)).encode()
    got = read_header(shard)
    assert got.data_start == 8 + len(header) and got.file_bytes == shard.stat().st_size
    assert list(got.tensors) == list(TENSORS)
    for name, (dtype, shape) in TENSORS.items():
        assert (got.tensors[name].dtype, list(got.tensors[name].shape)) == (dtype, shape)
    starts = [info.start - got.data_start for info in got.tensors.values()]
    assert starts == [0, 24, 34, 34] and got.tensors["scalar"].end == got.file_bytes


def test_files_of_the_safetensors_library(shard, rng):
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "codes": torch.randint(256, (7, 8), generator=rng, dtype=torch.int32).to(torch.uint8),
        "scale": torch.rand((3, 2), generator=rng).to(torch.float8_e4m3fn),
        "global": torch.rand((), generator=rng),
        "bf16": torch.randn((4, 3), generator=rng).bfloat16(),
    }
    library.save_file(tensors, shard, metadata={"format": "pt"})
    header, data = read_header(shard), shard.read_bytes()
    assert set(header.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert data[info.start : info.end] == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("missing", [1, 4, 30])
def test_truncated(shard, missing):
    write_shard(shard, TENSORS)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - missing)
    refused(shard, "truncated", f"expected {size} bytes", f"found {size - missing} bytes")


@pytest.mark.parametrize("size", [0, 7, 8, 40])
def test_truncated_inside_the_header(shard, size):
    write_shard(shard, TENSORS)
    with shard.open("r+b") as file:
        file.truncate(size)
    refused(shard, f"found {size} bytes")


def test_too_long(shard):
    write_shard(shard, TENSORS)
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"\0")
    refused(shard, "too long", f"expected {size} bytes", f"found {size + 1} bytes")


def test_another_kind_of_file(shard):
    shard.write_text("version https://git-lfs.github.com/spec/v1\n" * 10)
    refused(shard, "bytes of header")
    write_raw(shard, b"{not json", 10)
    refused(shard, "header of JSON")
    write_raw(shard, b"\xff\xfe{}", 0)
    refused(shard, "header of JSON")
    write_raw(shard, b"[1]", 0)
    refused(shard, "JSON object", "list")


def test_missing_file(shard):
    refused(shard, "No such file")
    shard.mkdir()
    refused(shard, "Is a directory")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F33", "shape": [2], "data_offsets": [24, 34]},
        {"dtype": "BF16", "shape": [5]},
        {"shape": [5], "data_offsets": [24, 34]},
        {"dtype": "BF16", "shape": [5], "data_offsets": [24]},
        {"dtype": "BF16", "shape": ["5"], "data_offsets": [24, 34]},
        {"dtype": "BF16", "shape": [-5], "data_offsets": [34, 24]},
        {"dtype": "BF16", "shape": [5.0], "data_offsets": [24, 34]},
        {"dtype": "BF16", "shape": None, "data_offsets": [24, 34]},
        [],
        "BF16",
        None,
    ],
)
def test_malformed_entries(shard, entry):
    header = write_shard(shard, TENSORS)
    header["b"] = entry
    write_raw(shard, json.dumps(header).encode(), 38)
    refused(shard, "b has header entry", "known dtype")


def test_size_must_fit_type_and_shape(shard):
    write_shard(shard, TENSORS, b={"dtype": "BF16", "shape": [4], "data_offsets": [24, 34]})
    refused(shard, "b is BF16 [4], expected 8 bytes", "give 10")


def test_gap_and_overlap(shard):
    write_shard(shard, TENSORS, b=None)
    refused(shard, "empty starts at byte", "leaves a gap")
    write_shard(shard, TENSORS, b={"dtype": "BF16", "shape": [5], "data_offsets": [22, 32]})
    refused(shard, "b starts at byte", "overlaps")
