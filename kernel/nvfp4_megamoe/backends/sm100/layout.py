"""How the kernels' operands lie in memory.

An operand is cut into images of 128 rows and 256 columns (K). An image is what a pipeline stage holds in shared
memory, byte for byte, so that one contiguous bulk copy of 16 KiB brings it and no tensor map is needed:

- codes, 16384 bytes: 128 rows of 128 bytes in the K-major 128-byte swizzle, in which the 16-byte chunk c of row r lies
  at chunk c xor r % 8;
- block scales, 2048 bytes: 128 x 16 scales in the 128x4 tiles of ``numerics.scale_layout``.

The kernels for few tokens multiply parts of 16, 32 or 64 rows of an image. A part's codes are contiguous as they are.
Its scales lie apart, because tensor memory takes row r of a part in lane r % 32: 16-byte lines, one for each of the
first 32 rows, with a word (four scales) for each 32 rows, and four such tiles, one for each 64 of K.

Images are ordered by rows first, then K. Rows of w13 are permuted so that 16 rows of gate are followed by the same 16
rows of up: with the weights on either side of the multiplication, the warp that has one half of a SwiGLU in its part
of the accumulator also has the other, and a whole block of 16 results.
"""

from __future__ import annotations

import torch

from nvfp4_megamoe.errors import UnsupportedError

IMAGE_ROWS = 128
IMAGE_K = 256
CODE_BYTES = IMAGE_ROWS * IMAGE_K // 2
SCALE_BYTES = IMAGE_ROWS * IMAGE_K // 16
GROUP = 16
# Slots that a tile of the kernels for few tokens may have.
FEW_SLOTS = (16, 32, 64)
_CHUNK = 16


def check_shape(rows: int, columns: int, what: str) -> None:
    """Raise UnsupportedError unless a [rows, columns] operand is a whole number of images."""
    if rows % IMAGE_ROWS or columns % IMAGE_K:
        raise UnsupportedError(
            f"The SM100 kernels need {what} in multiples of {IMAGE_ROWS} rows and {IMAGE_K} columns, "
            f"not {rows} x {columns}."
        )


def _swizzled_chunks(device: torch.device) -> torch.Tensor:
    """int64 [8, 8]: which chunk of a row lies at a position, by row % 8."""
    index = torch.arange(8, device=device)
    return index[:, None] ^ index[None, :]


def code_images(packed: torch.Tensor) -> torch.Tensor:
    """Cut packed codes into images.

    Args:
        packed: uint8 [M, K / 2], M a multiple of 128, K of 256.

    Returns:
        uint8 [M / 128, K / 256, 16384].
    """
    rows, half = packed.shape
    check_shape(rows, half * 2, "codes")
    # [image row, row / 8, row % 8, image column, chunk, byte]
    parts = packed.reshape(rows // IMAGE_ROWS, IMAGE_ROWS // 8, 8, half * 2 // IMAGE_K, 8, _CHUNK)
    index = _swizzled_chunks(packed.device)[None, None, :, None, :, None].expand(parts.shape)
    return parts.gather(4, index).permute(0, 3, 1, 2, 4, 5).reshape(rows // IMAGE_ROWS, -1, CODE_BYTES)


def codes_of(images: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`code_images`."""
    tiles, steps, _ = images.shape
    parts = images.reshape(tiles, steps, IMAGE_ROWS // 8, 8, 8, _CHUNK)
    index = _swizzled_chunks(images.device)[None, None, None, :, :, None].expand(parts.shape)
    return parts.gather(4, index).permute(0, 2, 3, 1, 4, 5).reshape(tiles * IMAGE_ROWS, steps * IMAGE_K // 2)


def scale_images(scale: torch.Tensor) -> torch.Tensor:
    """Cut block scales into images: any one-byte dtype [M, K / 16] to uint8 [M / 128, K / 256, 2048]."""
    rows, columns = scale.shape
    check_shape(rows, columns * 16, "block scales")
    parts = scale.view(torch.uint8).reshape(rows // IMAGE_ROWS, 4, 32, columns // 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows // IMAGE_ROWS, columns // 16, SCALE_BYTES)


def scales_of(images: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`scale_images`, uint8 [M, K / 16]."""
    tiles, steps, _ = images.shape
    parts = images.reshape(tiles, steps * 4, 32, 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(tiles * IMAGE_ROWS, steps * 16)


def part_scale_bytes(slots: int) -> int:
    """Bytes of the block scales of one part of ``slots`` rows and 256 columns."""
    return 4 * 16 * min(slots, 32)


# Bytes of an image's block scales in parts, at most.
PART_SCALE_BYTES = max(IMAGE_ROWS // slots * part_scale_bytes(slots) for slots in FEW_SLOTS)


def scale_parts(scale: torch.Tensor, slots: int) -> torch.Tensor:
    """Cut block scales into parts: any one-byte dtype [M, K / 16] to uint8 [M / 128, K / 256, 128 / slots, bytes]."""
    rows, columns = scale.shape
    check_shape(rows, columns * 16, "block scales")
    lines = min(slots, 32)
    # [image, part, word, line, image column, tile, scale]
    parts = scale.view(torch.uint8).reshape(rows // IMAGE_ROWS, IMAGE_ROWS // slots, -1, lines, columns // 16, 4, 4)
    out = parts.new_zeros(len(parts), columns // 16, IMAGE_ROWS // slots, 4, lines, 4, 4)
    out[..., : parts.shape[2], :] = parts.permute(0, 4, 1, 5, 3, 2, 6)
    return out.flatten(3)


def scales_of_parts(parts: torch.Tensor, slots: int) -> torch.Tensor:
    """Inverse of :func:`scale_parts`, uint8 [M, K / 16]."""
    images, steps = parts.shape[:2]
    words = parts.reshape(images, steps, IMAGE_ROWS // slots, 4, min(slots, 32), 4, 4)[..., : -(-slots // 32), :]
    return words.permute(0, 2, 5, 4, 1, 3, 6).reshape(images * IMAGE_ROWS, steps * 16)


def interleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """[2I, ...] with gate rows first to alternating groups of 16 gate and 16 up rows; I a multiple of 16."""
    gate, up = rows.chunk(2)
    both = torch.stack([gate.unflatten(0, (-1, GROUP)), up.unflatten(0, (-1, GROUP))], 1)
    return both.flatten(0, 2)


def arrange_(tensor: torch.Tensor, is_scale: bool, gate_up: bool) -> None:
    """Cut every expert's matrix [E, rows, bytes] into images, in place, with one expert's copy as scratch."""
    for expert in tensor.view(torch.uint8):
        rows = interleave_gate_up(expert) if gate_up else expert
        images = scale_images(rows) if is_scale else code_images(rows)
        expert.copy_(images.view(expert.shape))
