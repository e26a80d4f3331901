"""Headers of safetensors files, read without loading a tensor.

A file is 8 bytes of little-endian header size, that many bytes of JSON, then the tensors' bytes without gaps.
Source: the safetensors format description, huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nvfp4_megamoe.errors import CheckpointError

_SIZE_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library has
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_DAMAGED = "The file is damaged or incomplete: download it again, or write it again."


class TensorInfo(NamedTuple):
    """Where a tensor lies. ``start`` and ``end`` are byte offsets in the file; ``dtype`` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ShardHeader:
    """One file's tensors by name. ``data_start`` is the offset of the first tensor's first byte."""

    path: Path
    tensors: dict[str, TensorInfo]
    data_start: int
    file_bytes: int


def read_header(path: str | Path) -> ShardHeader:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: naming the file, where it is missing, is no safetensors file, is shorter or longer than its
            header says, or has a tensor whose bytes overlap another's, leave a gap or do not fit its type and shape.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(_SIZE_BYTES), "little")
            data_start = _SIZE_BYTES + header_bytes
            if file_bytes < _SIZE_BYTES or header_bytes > _MAX_HEADER_BYTES or data_start > file_bytes:
                raise CheckpointError(
                    f"{path}: expected a safetensors file with {header_bytes} bytes of header in {data_start} bytes "
                    f"or more, found {file_bytes} bytes. {_DAMAGED}"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable safetensors file, found: {error.strerror}. Download the missing file, or "
            "correct the path or its permissions."
        ) from error
    entries = _entries(path, text)
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, file_bytes)
    return ShardHeader(path, tensors, data_start, file_bytes)


def _entries(path: Path, text: bytes) -> dict[str, dict]:
    try:
        entries = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueError
        raise CheckpointError(f"{path}: expected a header of JSON, found: {error}. {_DAMAGED}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(entries).__name__}. {_DAMAGED}")
    entries.pop("__metadata__", None)
    return entries


def _tensor(path: Path, name: str, entry: dict, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError("sizes and offsets are whole numbers")
        bits = _BITS[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {name} has header entry {entry!r}; expected a known dtype, a shape and two data_offsets. "
            f"{_DAMAGED}"
        ) from error
    if (end - begin) * 8 != bits:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {list(shape)}, expected {bits / 8:g} bytes; its data_offsets {[begin, end]} "
            f"give {end - begin}. {_DAMAGED}"
        )
    return TensorInfo(dtype, shape, data_start + begin, data_start + end)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, file_bytes: int) -> None:
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {name} starts at byte {info.start} and {what}; expected byte {end}. {_DAMAGED}"
            )
        end = info.end
    if end != file_bytes:
        what = "truncated" if file_bytes < end else "too long"
        raise CheckpointError(
            f"{path} is {what}: expected {end} bytes from its header, found {file_bytes} bytes. {_DAMAGED}"
        )
