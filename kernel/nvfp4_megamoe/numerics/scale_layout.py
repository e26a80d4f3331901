"""The 128x4 tiled layout in which ``tcgen05`` block-scaled instructions and cuBLASLt read block scales.

Scale (m, k) of a [M, KS] matrix lies at ``((m/128)*(KS/4) + k/4)*512 + (m%32)*16 + ((m%128)/32)*4 + k%4``, where M and
KS are first padded with zeros to multiples of 128 and 4.
Source: cuBLAS documentation, "1D Block Scaling Factors Layout"; PTX ISA, ``tcgen05.mma`` scale factor layout.
"""

from __future__ import annotations

import torch

TILE_M = 128
TILE_K = 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns rounded up to whole tiles."""
    return -(-rows // TILE_M) * TILE_M, -(-columns // TILE_K) * TILE_K


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Lay row-major scales out in tiles.

    Args:
        scale: one byte an element, [..., M, KS].

    Returns:
        Same dtype, [..., padded M * padded KS], contiguous; zero bits where there is no scale.
    """
    *leading, rows, columns = scale.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    padded = torch.zeros(*leading, padded_rows, padded_columns, dtype=torch.uint8, device=scale.device)
    padded[..., :rows, :columns] = scale.view(torch.uint8)
    tiles = padded.reshape(*leading, padded_rows // TILE_M, 4, 32, padded_columns // TILE_K, TILE_K)
    # [tile m, m%128/32, m%32, tile k, k%4] -> [tile m, tile k, m%32, m%128/32, k%4]
    return tiles.transpose(-4, -2).flatten(-5).view(scale.dtype)


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`swizzle`.

    Args:
        flat: one byte an element, [..., padded M * padded KS].
        rows: M, without padding.
        columns: KS, without padding.

    Returns:
        Same dtype, [..., M, KS], contiguous.

    Raises:
        ValueError: the size of ``flat`` is not that of the padded matrix.
    """
    padded_rows, padded_columns = padded_shape(rows, columns)
    if flat.shape[-1] != padded_rows * padded_columns:
        raise ValueError(
            f"A {rows} x {columns} scale matrix takes {padded_rows * padded_columns} bytes in 128x4 tiles, "
            f"not {flat.shape[-1]}."
        )
    tiles = flat.view(torch.uint8).unflatten(-1, (padded_rows // TILE_M, padded_columns // TILE_K, 32, 4, TILE_K))
    padded = tiles.transpose(-4, -2).reshape(*flat.shape[:-1], padded_rows, padded_columns)
    return padded[..., :rows, :columns].contiguous().view(flat.dtype)
