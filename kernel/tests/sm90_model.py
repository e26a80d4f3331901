"""The Hopper GEMM kernels on the PTX model: compiled to PTX, fed and read here.

Routing, permutation and quantization are done in torch as csrc/activations.cuh states them, so that one projection runs
at a time. Blocks run one after the other from the last to the first: a block waits only for later ones.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nvfp4_megamoe.backends.sm90 import build, layout
from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from ptx_model import GlobalMemory, Machine
from ptx_model.machine import Cluster

GATE_UP, DOWN = 0, 1
BF16, E4M3 = 0, 1
SHARED_BYTES = 227 * 1024


class Kernel(NamedTuple):
    """Template arguments of ``gemm_kernel``."""

    phase: int
    precision: int
    warpgroups: int
    tiles: int
    widest: int
    narrowest: int
    step: int

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 128

    @property
    def gathers(self) -> bool:
        return self.phase == GATE_UP and self.widest <= 32

    @property
    def reads_ahead(self) -> bool:
        """Whether it reads a stage that may not have arrived, and if so again later: csrc's kReadAhead."""
        return self.precision == E4M3 and self.tiles == 1


@functools.cache
def ptx(kernel: Kernel) -> str:
    """PTX of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        (Path(folder) / "wgmma.cuh").write_text(build.wgmma_header())
        arguments = ", ".join(map(str, kernel))
        source.write_text(
            f'#include "gemm.cuh"\ntemplate __global__ void sm90::gemm_kernel<{arguments}>'
            "(const __grid_constant__ sm90::GemmParams);\n"
        )
        command = [build.find_nvcc(), "-std=c++17", "-O3", "-ptx", "-gencode=arch=compute_90a,code=compute_90a"]
        command += ["-I", folder, "-I", str(build.SOURCES)]
        subprocess.run([*command, "-o", f"{folder}/kernel.ptx", str(source)], check=True, capture_output=True)
        return (Path(folder) / "kernel.ptx").read_text()


class Slots(NamedTuple):
    """Slots of one layer call: ``tokens[e]`` are those of expert e, whose slots begin at ``offsets[e]``."""

    tokens: list[torch.Tensor]
    offsets: list[int]
    capacity: int

    @classmethod
    def of(cls, counts: Sequence[int], tokens: int, rng: torch.Generator) -> Slots:
        chosen = [torch.randperm(tokens, generator=rng)[:count] for count in counts]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + -(-count // 8) * 8)
        return cls(chosen, offsets[:-1], offsets[-1] + 8)

    def rows(self, expert: int) -> slice:
        return slice(self.offsets[expert], self.offsets[expert] + len(self.tokens[expert]))


def permuted(x: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, K / 64, 8, 16]: bfloat16 chunks as wgmma meets them; pair i of block t is word t of chunk i."""
    words = x.contiguous().view(torch.uint8).view(len(x), -1, 4, 8, 4)
    return words.transpose(2, 3).flatten(-2).contiguous()


def permuted_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, K / 128, 8, 16]: element 8 * half + 2 * b + j of a k64's block t: word t of chunk 2 * half + j."""
    blocks = codes.view(torch.uint8).view(len(codes), -1, 2, 4, 2, 4, 2)  # k128, k64, block, half, b, j
    return blocks.permute(0, 1, 2, 4, 6, 3, 5).reshape(len(codes), -1, 8, 16).contiguous()


def tiled(chunks: torch.Tensor) -> torch.Tensor:
    """[slots, segments, 8, 16] to [segments, slots, 128], swizzled."""
    slots = torch.arange(len(chunks))
    place = torch.arange(8)[None, :] ^ (slots % 8)[:, None]
    out = torch.empty_like(chunks)
    out.scatter_(2, place[:, None, :, None].expand_as(chunks), chunks)
    return out.transpose(0, 1).reshape(chunks.shape[1], len(chunks), 128).contiguous()


def untiled(out: torch.Tensor) -> torch.Tensor:
    """bfloat16 [slots, K] of a first projection's output: the inverse of ``tiled(permuted(x))``."""
    chunks = out.view(out.shape[0], out.shape[1], 8, 16).transpose(0, 1)
    place = torch.arange(8)[None, :] ^ (torch.arange(len(chunks)) % 8)[:, None]
    straight = chunks.gather(2, place[:, None, :, None].expand_as(chunks))
    pairs = straight.reshape(*straight.shape[:2], 8, 4, 4).transpose(2, 3).contiguous()
    return pairs.view(len(chunks), -1).view(torch.bfloat16)


def packed(values: torch.Tensor, scales: torch.Tensor, gate_up: bool) -> tuple[torch.Tensor, ...]:
    """All experts' packed values and scales."""
    rows, k = values.shape[1], values.shape[2] * 2
    parts = [
        (
            layout.side_by_side(layout.pack_values(v, s, gate_up), rows, k),
            layout.side_by_side(layout.pack_scales(s, gate_up), rows, k),
        )
        for v, s in zip(values, scales, strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def execute(
    kernel: Kernel,
    weights: ExpertWeights,
    x: torch.Tensor,
    slots: Slots,
    grid: int,
    limit: float,
    seed: int,
    plant: Callable[[str], str] = lambda text: text,
) -> torch.Tensor:
    """Run one projection.

    Args:
        x: GATE_UP: bfloat16 [T, H]. DOWN: bfloat16 [capacity, I].
        limit: the activation's clamp.
        plant: changes the PTX, to plant a fault.

    Returns:
        bfloat16 [capacity, I] or [capacity, H]; rows that are no slot's are as they were, NaN.
    """
    first = kernel.phase == GATE_UP
    part = ("w13", "w13_scale", "w13_global") if first else ("w2", "w2_scale", "w2_global")
    values, scales, alpha = (getattr(weights, name) for name in part)
    k, outputs = values.shape[2] * 2, values.shape[1] // 2 if first else values.shape[1]
    order = torch.full((slots.capacity,), -(1 << 30), dtype=torch.int32)  # not to be used where no slot is
    by_slot = torch.full((slots.capacity, k), float("nan"), dtype=torch.bfloat16)
    for e, tokens in enumerate(slots.tokens):
        order[slots.rows(e)] = tokens.int()
        by_slot[slots.rows(e)] = x[tokens] if first else x[slots.rows(e)]
    scale = torch.full((slots.capacity,), float("nan"))
    if kernel.gathers:
        act = permuted(x)
    elif kernel.precision == BF16:
        act = tiled(permuted(by_slot))
    else:
        amax = by_slot.float().abs().amax(-1)
        scale = torch.where(amax == 0, 1.0, amax / 448)
        act = tiled(permuted_e4m3((by_slot.float() / scale[:, None]).to(torch.float8_e4m3fn)))
    shape = (outputs // 64, slots.capacity, 128) if first else (slots.capacity, outputs * 2)
    out = torch.full(shape, 0xFF, dtype=torch.uint8)
    partial = np.full(grid * 256 * 144 * 4, 0xFF, np.uint8)
    w, s = packed(values, scales, first)
    memory, pointers = GlobalMemory(), []
    buffers = [act, scale, order, torch.tensor([*slots.offsets, 0], dtype=torch.int32)]
    buffers += [torch.tensor([len(t) for t in slots.tokens], dtype=torch.int32), w, s, alpha.contiguous(), out, partial]
    buffers += [np.zeros(grid * 16, np.uint8)]
    for i, buffer in enumerate(buffers):
        raw = buffer if isinstance(buffer, np.ndarray) else buffer.view(torch.uint8).reshape(-1).numpy()
        pointers.append(memory.add((i + 1) << 32, raw, f"parameter {i}"))
    numbers = (len(values), k // 128, values.shape[1] // 128, 1, outputs, slots.capacity)
    params = struct.pack("<11Q6ifxxxx", *((i + 1) << 32 for i in range(len(buffers))), *numbers, limit)
    machine = Machine(
        plant(ptx(kernel)), params, memory, (grid, 1, 1), (kernel.threads, 1, 1), SHARED_BYTES,
        seed=seed, strict=not kernel.reads_ahead,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for block in reversed(range(grid)):
            machine._run_cluster(Cluster(machine, (block, 0, 0)))
    return untiled(out) if first else out.view(torch.bfloat16)


def expected(kernel: Kernel, weights: ExpertWeights, x: torch.Tensor, slots: Slots, limit: float) -> torch.Tensor:
    """float64 [capacity, columns] that :func:`execute` must come close to; NaN where no slot is."""
    precision = "w8a8" if kernel.precision == E4M3 else "w4a16"
    first = kernel.phase == GATE_UP
    columns = weights.w13.shape[1] // 2 if first else weights.w2.shape[1]
    out = torch.full((slots.capacity, columns), float("nan"), dtype=torch.float64)
    for e, tokens in enumerate(slots.tokens):
        if first:
            out[slots.rows(e)] = oracle.expert_stages(weights, e, x[tokens], limit, precision).activated
        else:
            rows = oracle.quantize_activations(x[slots.rows(e)], weights.w2_input_scale[e], precision)
            out[slots.rows(e)] = rows @ oracle.dequantized(weights, e, oracle.et.DOWN, precision).T
    return out
