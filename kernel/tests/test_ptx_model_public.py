"""The model executes FlashInfer's public SM100 kernels, known to be right on hardware, and gets the right numbers."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from ptx_model import GlobalMemory, ProxyError, formats, public_kernels
from ptx_model.launch import HostObject
from ptx_model.testing import fresh_seed, full

pytestmark = pytest.mark.skipif(public_kernels.missing() is not None, reason=str(public_kernels.missing()))
BASE = 0x1000_0000


def swizzled(scale: np.ndarray) -> np.ndarray:
    """[rows, K / 16] in the 128x4 layout; rows and columns are whole tiles."""
    rows, columns = scale.shape
    m, k = np.arange(rows)[:, None], np.arange(columns)[None]
    out = np.zeros(scale.size, np.uint8)
    out[swizzle_index(m, k, columns)] = scale
    return out


def swizzle_index(m, k, columns: int):
    return (m // 128 * (columns // 4) + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4


def values(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return formats.unpack_e2m1(packed) * np.repeat(formats.E4M3[scale], 16, -1)


def requantized(x: np.ndarray) -> np.ndarray:
    """x as NVFP4 with global scale 1 keeps it."""
    blocks = x.reshape(len(x), -1, 16)
    scale = formats.E4M3[formats.encode_e4m3((np.abs(blocks).max(-1) / 6).astype(np.float32))][..., None]
    codes = formats.encode_e2m1((blocks / np.where(scale == 0, 1, scale)).astype(np.float32))
    return (formats.E2M1[codes] * scale).reshape(x.shape)


def run(host: HostObject, buffers: list[np.ndarray], sizes: list[int], **options):
    memory = GlobalMemory()
    pointers = []
    for i, buffer in enumerate(buffers):
        pointers.append(ctypes.c_void_p(memory.add(BASE * (i + 1), buffer, f"argument {i}")))
    launch = host.capture([*pointers, *(ctypes.c_int64(size) for size in sizes)])
    machine = launch.machine(memory, **options)
    machine.run()
    return machine


def grouping(rng, counts: list[int], tile: int, choices: int):
    """Padded row of every slot, and expert and row limit of every tile."""
    tiles = [-(-count // tile) for count in counts]
    slots, experts, limits, start = np.full(tile * sum(tiles), -1, np.int32), [], [], 0
    for expert, (count, number) in enumerate(zip(counts, tiles, strict=True)):
        slots[start : start + count] = rng.choice(choices, count, replace=False)
        for i in range(number):
            experts.append(expert)
            limits.append(min(start + count, start + tile * (i + 1)))
        start += tile * number
    return slots, np.array(experts, np.int32), np.array(limits, np.int32), np.array([len(experts)], np.int32)


@pytest.mark.parametrize(
    ("tile", "cluster", "k"),
    [
        ((128, 128), (1, 1), 512),
        pytest.param((256, 256), (2, 1), 512, marks=full),
        pytest.param((256, 256), (2, 1), 7168, marks=full),
    ],
)
def test_gather_swiglu_requantize(tmp_path, tile, cluster, k):
    """Every NVFP4 output value equals the reference's."""
    seed = fresh_seed()
    rng, top_k, experts, inter, tokens = np.random.default_rng(seed), 8, 3, tile[1], 24
    n, counts = 2 * inter, [37, 130, 5]
    slots, tile_expert, tile_limit, tiles = grouping(rng, counts, tile[0], tokens * top_k)
    a, sa = rng.integers(0, 256, (tokens, k // 2), dtype=np.uint8), rng.integers(32, 64, (tokens, k // 16), np.uint8)
    b = rng.integers(0, 256, (experts, n, k // 2), dtype=np.uint8)
    sb = rng.integers(32, 64, (experts, n, k // 16), np.uint8)
    alpha = np.array([2.0**-9, 2.0**-9.5, 2.0**-8.5], np.float32)
    out, out_scale = np.zeros((len(slots), inter // 2), np.uint8), np.zeros(len(slots) * inter // 16, np.uint8)
    host = HostObject(public_kernels.compile_fc1(tile, cluster, top_k), tmp_path, "fc1")
    buffers = [
        a,
        b,
        sa,
        np.concatenate([swizzled(s) for s in sb]),
        out,
        out_scale,
        alpha,
        tile_expert,
        tile_limit,
        slots,
        tiles,
        np.ones(1, np.float32),
    ]
    # Not strict: the kernel uses what tcgen05.ld loads without tcgen05.wait::ld.
    run(host, buffers, [tokens, len(slots), n, k, experts], seed=seed, strict=False, proxies=False)
    rows, columns = np.arange(len(slots))[:, None], np.arange(inter // 16)[None]
    got = values(out, out_scale[swizzle_index(rows, columns, inter // 16)])
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        x = values(a, sa)[slots[part] // top_k] @ values(b[expert], sb[expert]).T * alpha[expert]
        up, gate = np.moveaxis(x.reshape(count, n // 128, 2, 64), 2, 0).reshape(2, count, inter)
        expected = requantized((up * (gate / (1 + np.exp(-gate)))).astype(np.float32))
        assert (got[part] == expected).mean() >= 0.9999
        start += -(-count // tile[0]) * tile[0]


@pytest.mark.parametrize(("tile", "cluster"), [((128, 128), (1, 1)), pytest.param((256, 256), (2, 1), marks=full)])
def test_finalize(tmp_path, tile, cluster):
    """alpha times routing weight, summed over slots in bfloat16 by bulk reductions."""
    seed = fresh_seed()
    rng, top_k, experts, n, k, tokens = np.random.default_rng(seed), 4, 3, 256, 512, 40
    slots, tile_expert, tile_limit, tiles = grouping(rng, [37, 90, 5], tile[0], tokens * top_k)
    a, sa = rng.integers(0, 256, (len(slots), k // 2), np.uint8), rng.integers(32, 64, (len(slots), k // 16), np.uint8)
    b = rng.integers(0, 256, (experts, n, k // 2), np.uint8)
    sb = rng.integers(32, 64, (experts, n, k // 16), np.uint8)
    alpha, weight = rng.random(experts, np.float32) + 0.5, rng.random((tokens, top_k), np.float32)
    out = np.zeros((tokens, n), np.uint16)
    host = HostObject(public_kernels.compile_fc2(tile, cluster), tmp_path, "fc2")
    buffers = [
        a,
        b,
        swizzled(sa),
        np.concatenate([swizzled(s) for s in sb]),
        out,
        alpha,
        tile_expert,
        tile_limit,
        slots,
        tiles,
        weight,
    ]
    run(host, buffers, [len(slots), n, k, experts, tokens, top_k], seed=seed, strict=False, proxies=False)
    expected = np.zeros((tokens, n))
    for row, slot in enumerate(slots):
        if slot >= 0:
            expert = tile_expert[row // tile[0]]
            product = values(a[row : row + 1], sa[row : row + 1]) @ values(b[expert], sb[expert]).T
            expected[slot // top_k] += product[0] * alpha[expert] * weight[slot // top_k, slot % top_k]
    error = np.linalg.norm(formats.decode_bf16(out) - expected) / np.linalg.norm(expected)
    assert error <= 6e-3


def test_proxy_check_sees_what_the_public_kernel_does(tmp_path):
    """It hands its cp.async data to the tensor core without a fence between the proxies."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    slots, tile_expert, tile_limit, tiles = grouping(rng, [3], 128, 8)
    n, k = 256, 256
    b, sb = rng.integers(0, 256, (1, n, k // 2), np.uint8), rng.integers(32, 64, (n, k // 16), np.uint8)
    a, sa = rng.integers(0, 256, (1, k // 2), np.uint8), rng.integers(32, 64, (1, k // 16), np.uint8)
    host = HostObject(public_kernels.compile_fc1((128, 128), (1, 1), 8), tmp_path, "fc1")
    buffers = [
        a,
        b,
        sa,
        swizzled(sb),
        np.zeros((128, n // 4), np.uint8),
        np.zeros(128 * n // 32, np.uint8),
        np.ones(1, np.float32),
        tile_expert,
        tile_limit,
        slots,
        tiles,
        np.ones(1, np.float32),
    ]
    with pytest.raises(ProxyError, match=r"without fence\.proxy\.async"):
        run(host, buffers, [1, 128, n, k, 1], seed=seed, strict=False)
