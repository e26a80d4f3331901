"""Seeded random numbers, and the pool of weight tiles that every quantized matrix is put together from.

A 16 GB layer must not take an hour. So the 128 x 128 tiles of a matrix are drawn, by a generator seeded with the
matrix's name, from a pool of tiles that is made once and quantized once per format. Every format here quantizes
within such a tile (NVFP4 along 16, MXFP4 along 32, FP8 over 128 x 128 elements) and a matrix is scaled by a power of
two only, so a matrix of quantized tiles is, bit for bit, the quantized matrix.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch

from checkpoint_maker.geometry import TILE

FAMILIES = 4
TILES = 128  # in a family
_PEAK = 6.0  # largest magnitude of a tile, in units of its family's width

# Widths are no powers of two apart, so that global scales differ by more than an exponent.
_FAMILY_WIDTHS = (1.0, 1.19, 1.41, 1.68)
_SPREAD = (0.6, 0.8, 1.0, 1.2, 1.4)


def generator(seed: int, name: str) -> np.random.Generator:
    """The random stream of one tensor: it depends on nothing but the seed and the name.

    numpy's, not torch's: torch's normal distribution differs between CPUs with and without AVX2.
    """
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest())))


def normal(seed: int, name: str, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> torch.Tensor:
    """Gaussian tensor; float32 scratch is bounded by about 16 MiB."""
    rng, out = generator(seed, name), torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    for start in range(0, flat.numel(), 1 << 22):
        part = flat[start : start + (1 << 22)]
        part.copy_(torch.from_numpy(rng.standard_normal(part.numel(), dtype=np.float32)).mul_(std))
    return out


@functools.cache
def pool(seed: int, family: int) -> torch.Tensor:
    """Tiles of a family: bfloat16 [TILES, 128, 128], of a standard deviation near 1.

    Rows and groups of 16 columns have different widths, as in trained models, so block scales cover a decade. Each
    tile holds the family's peak once: a matrix of any tiles has the amax of the pool, hence its global scale.
    """
    rng = generator(seed, f"tiles/{family}")
    tiles = torch.from_numpy(rng.standard_normal((TILES, TILE, TILE), dtype=np.float32))
    spread = torch.tensor(_SPREAD)
    tiles.mul_(spread[torch.from_numpy(rng.integers(len(_SPREAD), size=(TILES, TILE, 1)))])
    columns = spread[torch.from_numpy(rng.integers(len(_SPREAD), size=(TILES, 1, TILE // 16)))]
    tiles.mul_(columns.repeat_interleave(16, dim=-1)).clamp_(-_PEAK, _PEAK)
    flat = tiles.view(TILES, -1)
    flat[torch.arange(TILES), torch.from_numpy(rng.integers(TILE * TILE, size=TILES))] = _PEAK
    return tiles.mul_(_FAMILY_WIDTHS[family]).bfloat16()


def choose(seed: int, name: str, rows: int, columns: int) -> torch.Tensor:
    """Which tiles a matrix is made of: int64 [rows / 128, columns / 128]."""
    return torch.from_numpy(generator(seed, name).integers(TILES, size=(rows // TILE, columns // TILE)))


def assemble(parts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Lay chosen tiles out as a matrix.

    Args:
        parts: [TILES, m, n], what a format keeps of each tile.
        chosen: int64 [R, C].

    Returns:
        [R * m, C * n], contiguous.
    """
    (rows, columns), (m, n) = chosen.shape, parts.shape[1:]
    # Moved as the widest words that a row of a tile is made of: several times faster than byte by byte.
    size = n * parts.element_size()
    word = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % dtype.itemsize == 0)
    out = torch.empty(rows * m, columns * n, dtype=parts.dtype)
    out.view(word).view(rows, m, columns, -1).copy_(parts.view(word)[chosen].transpose(1, 2))
    return out
