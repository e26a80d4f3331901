"""The shards of a checkpoint and which tensor is in which, checked against the shards' own headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_megamoe.checkpoint.headers import ShardHeader, TensorInfo, read_header
from nvfp4_megamoe.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint.

    Attributes:
        directory: of the checkpoint.
        shards: header of each file, by file name.
        files: file name of each tensor.
    """

    directory: Path
    shards: dict[str, ShardHeader]
    files: dict[str, str]

    def info(self, tensor: str) -> TensorInfo:
        """Type, shape and byte offsets of a tensor in its file."""
        return self.shards[self.files[tensor]].tensors[tensor]

    @property
    def data_bytes(self) -> int:
        return sum(shard.file_bytes - shard.data_start for shard in self.shards.values())


def read_index(directory: str | Path) -> CheckpointIndex:
    """Read the index and every shard's header; a checkpoint of one file needs no index.

    Files that the index does not name are not looked at: vLLM does not load them.

    Raises:
        CheckpointError: no index and no single file; a shard that the index names is missing or damaged; a tensor
            is not in the shard that it is mapped to; a shard has a tensor that is not mapped to it.
    """
    directory = Path(directory)
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"{directory}: expected {INDEX_FILE}, or the one file {SINGLE_FILE}; found neither. Give the directory "
                "of the checkpoint, or download the missing file."
            )
        shard = read_header(directory / SINGLE_FILE)
        return CheckpointIndex(directory, {SINGLE_FILE: shard}, dict.fromkeys(shard.tensors, SINGLE_FILE))
    files = read_json(index_path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()) or not files:
        raise CheckpointError(
            f"{index_path}: expected a weight_map from tensor names to file names. Download the index again."
        )
    shards = {}
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            mapped = [tensor for tensor, file in files.items() if file == name]
            raise CheckpointError(
                f"{index_path} names the shard {name} for {len(mapped)} tensor(s) such as {mapped[0]}; expected it in "
                f"{directory}, where it is missing. Download the shard, or the index that belongs to the files here."
            )
        shards[name] = read_header(directory / name)
    _check_agreement(index_path, shards, files)
    return CheckpointIndex(directory, shards, files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}. Download it.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found: {error}. Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}. Download the file again.")
    return value


def _check_agreement(index_path: Path, shards: dict[str, ShardHeader], files: dict[str, str]) -> None:
    remedy = "Download the index and the shards again, from one and the same checkpoint."
    for tensor, file in files.items():
        if tensor not in shards[file].tensors:
            raise CheckpointError(f"{index_path}: expected {tensor} in {file}, which does not have it. {remedy}")
    for name, shard in shards.items():
        for tensor in shard.tensors:
            if files.get(tensor) != name:
                mapped = f"maps it to {files[tensor]}" if tensor in files else "does not map it"
                raise CheckpointError(f"{name} has {tensor}; {index_path} {mapped}; expected {name}. {remedy}")
