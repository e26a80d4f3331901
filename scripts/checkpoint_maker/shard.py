"""A safetensors file written tensor by tensor, so that memory holds one tensor and not the file.

``safetensors.torch.save_file`` wants all tensors of a file at once; the file written here is the same, byte for byte.
Format: https://huggingface.co/docs/safetensors, an 8-byte length, a JSON header and the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

Description = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# Names in the format, in the library's order of tensors: wide elements first, so that all are aligned.
_DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ORDER = list(_DTYPES)


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def write(path: Path, described: Description, tensors: Iterable[dict[str, torch.Tensor]]) -> Iterator[int]:
    """Write a file; yields the bytes written after each item of ``tensors``.

    Args:
        path: file to write.
        described: dtype and shape of every tensor of the file.
        tensors: all of them, a few at a time, in any order.

    Raises:
        ValueError: the tensors are not those described.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in sorted(described.items(), key=lambda item: (_ORDER.index(item[1][0]), item[0])):
        end = start + size_of(dtype, shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(described)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in tensors:
            written = 0
            for name, tensor in group.items():
                if described.get(name) != (tensor.dtype, tuple(tensor.shape)):
                    raise ValueError(
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, described as {described.get(name)}"
                    )
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                written += file.write(tensor.reshape(-1).view(torch.uint8).numpy())
                missing.discard(name)
            yield written
    if missing:
        raise ValueError(f"{path.name} lacks {sorted(missing)}")
