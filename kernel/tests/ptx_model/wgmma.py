"""Hopper's instructions: wgmma with operand A in registers, stmatrix, and generic loads and stores.

A wgmma multiplies at its issue: a warp's 16 rows need no other warp's. Until a wait says otherwise it is in flight all
the same. At some random time before that wait ends it looks at its operands again: activations that are being
overwritten, or a fragment that has been, are errors. What is not modelled: reading or writing accumulators in flight,
the four warps' having to issue together, and the order and width of the tensor core's sums.
"""

from __future__ import annotations

import numpy as np

from .errors import ModelError, OutOfBounds, UnknownInstruction
from .floats import E4M3, decode_bf16
from .isa import BLOCKED, expect_operands, instruction
from .loads import _load_bytes, _store_bytes
from .operands import LANES, TYPES, address_reader, reader, uniform, vector, writer
from .parser import Instruction, Program

GENERIC_SHARED_END = 1 << 28  # generic addresses below are shared memory; global buffers lie above
_SWIZZLE_128 = 1
_GROUP, _IN_GROUP = np.arange(LANES) >> 2, np.arange(LANES) & 3


class HazardError(ModelError):
    """An operand of a wgmma that may still read it was written."""


def activations_index(descriptor: int, columns: int) -> np.ndarray:
    """Offsets [columns, 32 bytes] of operand B, K-major with the 128-byte swizzle.

    Raises:
        UnknownInstruction: another layout.
    """
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 62 != _SWIZZLE_128 or descriptor >> 49 & 7 or descriptor >> 14 & 3 or descriptor >> 30 & 3:
        raise UnknownInstruction(f"wgmma descriptor {descriptor:#018x} is not K-major with the 128-byte swizzle")
    column = np.arange(columns)[:, None]
    index = start + column // 8 * stride + column % 8 * 128 + np.arange(32)
    return index ^ ((index >> 7 & 7) << 4)


def _rows(fragment: list[np.ndarray], e4m3: bool) -> np.ndarray:
    """float32 [16, K] of a warp's four registers of A, K = 16 (bf16) or 32 (e4m3)."""
    width = 4 if e4m3 else 2
    a = np.empty((16, 8 * width), np.float32)
    for i, register in enumerate(fragment):
        bits = np.ascontiguousarray(register).view(np.uint8 if e4m3 else np.uint16).reshape(LANES, width)
        values = E4M3[bits] if e4m3 else decode_bf16(bits)
        for j in range(width):
            a[_GROUP + 8 * (i & 1), (i >> 1) * 4 * width + _IN_GROUP * width + j] = values[:, j]
    return a


def _flight(warp):
    """Groups under way of a warp, each the list of its operations' states; the last one is not yet committed."""
    if not hasattr(warp, "wgmma"):
        warp.wgmma = [[]]
    return warp.wgmma


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)(?P<kind>k16\.f32\.bf16\.bf16|k32\.f32\.e4m3\.e4m3)")
def _wgmma(ins: Instruction, match, program: Program):
    columns, e4m3 = int(match["n"]), match["kind"].startswith("k32")
    sums, fragment, tail = vector(ins.operands[0]), vector(ins.operands[1]), ins.operands[3:]
    if len(sums) != columns // 2 or len(fragment) != 4 or columns % 8 or not 8 <= columns <= 256:
        raise UnknownInstruction(f"Operands of the wrong number, {ins}")
    if tuple(tail) != (("1",) * 3 if e4m3 else ("1", "1", "1", "0")):
        raise UnknownInstruction(f"Scales and transposition other than 1, 1, 1, 0, {ins}")
    reads = [reader(program, ins, name, "f32") for name in sums]
    writes = [writer(program, ins, name, "f32") for name in sums]
    parts = [reader(program, ins, name, "b32") for name in fragment]
    descriptor = reader(program, ins, ins.operands[2], "u64")

    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        cta = warp.cta
        index = activations_index(uniform(descriptor(warp), mask), columns)
        b = cta.shared.read(index, asynchronous=True, unwritten=True).copy()
        taken = [part(warp).copy() for part in parts]
        product = _rows(taken, e4m3) @ (E4M3[b] if e4m3 else decode_bf16(b.view(np.uint16))).T
        for i, (read, write) in enumerate(zip(reads, writes, strict=True)):
            at = product[_GROUP + 8 * (i >> 1 & 1), i // 4 * 8 + 2 * _IN_GROUP + (i & 1)]
            write(warp, mask, read(warp) + at)
        state = {"done": False}
        _flight(warp)[-1].append(state)

        def complete():
            if (cta.shared.read(index, asynchronous=True, unwritten=True) != b).any():
                raise HazardError("activations were overwritten while a wgmma may read them")
            if any((part(warp) != old).any() for part, old in zip(parts, taken, strict=True)):
                raise HazardError("a fragment was overwritten while a wgmma may read it")
            state["done"] = True

        cta.cluster.submit(f"[{warp}] {ins}", complete)
        return None

    return execute


@instruction(r"wgmma\.(?P<what>fence|commit_group|wait_group)\.sync\.aligned")
def _wgmma_group(ins: Instruction, match, program: Program):
    what = match["what"]
    keep = int(ins.operands[0]) if what == "wait_group" else 0

    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        flight = _flight(warp)
        if what == "commit_group":
            flight.append([])
        elif what == "wait_group":
            committed = len(flight) - 1
            if not all(state["done"] for group in flight[: max(committed - keep, 0)] for state in group):
                return BLOCKED
            warp.wgmma = flight[max(committed - keep, 0) :]
        return None

    return execute


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared(::cta)?\.b16")
def _stmatrix(ins: Instruction, match, program: Program):
    """Four 8 x 8 matrices, each transposed; lanes 8 * m to 8 * m + 7 give matrix m's row addresses."""
    expect_operands(ins, 2)
    address = address_reader(program, ins, ins.operands[0])
    parts = [reader(program, ins, name, "b32") for name in vector(ins.operands[1])]

    def execute(warp, mask):
        if not warp.converged(mask) or not mask.all():
            return BLOCKED
        where = address(warp)
        for m, part in enumerate(parts):
            pair = np.ascontiguousarray(part(warp)).view(np.uint16).reshape(LANES, 2)
            matrix = np.empty((8, 8), np.uint16)
            for j in range(2):  # a lane's pair: row lane / 4, columns 2 * (lane % 4) and the next
                matrix[_GROUP, 2 * _IN_GROUP + j] = pair[:, j]
            rows = np.ascontiguousarray(matrix.T).view(np.uint8)
            _store_bytes(warp, "shared", where[8 * m : 8 * m + 8], rows)
        return None

    return execute


@instruction(r"(?P<op>ld|st)(\.(?P<vector>v2|v4))?\.(?P<type>[busf]32|[busf]64)")
def _generic(ins: Instruction, match, program: Program):
    """Generic addressing of shared memory: cvta leaves addresses as they are."""
    loads, kind = match["op"] == "ld", match["type"]
    names = vector(ins.operands[0 if loads else 1])
    address = address_reader(program, ins, ins.operands[1 if loads else 0])
    reads = [] if loads else [reader(program, ins, name, kind) for name in names]
    writes = [writer(program, ins, name, kind) for name in names] if loads else []
    dtype = TYPES[kind][1]

    def execute(warp, mask):
        where = address(warp)[mask]
        if (where >= GENERIC_SHARED_END).any():
            raise OutOfBounds("a generic access of global memory is not modelled")
        if not loads:
            parts = [read(warp)[mask].reshape(-1, 1).view(np.uint8) for read in reads]
            _store_bytes(warp, "shared", where, np.concatenate(parts, 1))
            return
        data = _load_bytes(warp, "shared", where, dtype.itemsize * len(writes))
        for i, write in enumerate(writes):
            values = np.zeros(LANES, dtype)
            values[mask] = np.ascontiguousarray(data[:, i * dtype.itemsize : (i + 1) * dtype.itemsize]).view(dtype)[
                :, 0
            ]
            write(warp, mask, values)

    return execute


@instruction(r"createpolicy\.fractional\.L2::evict_(first|last|normal)\.b64")
def _policy(ins: Instruction, match, program: Program):
    """Cache policies have no functional effect."""
    write = writer(program, ins, ins.operands[0], "b64")
    return lambda warp, mask: write(warp, mask, np.zeros(LANES, np.uint64))


@instruction(r"div\.approx\.f32")
def _quotient(ins: Instruction, match, program: Program):
    """``__fdividef``: the correctly rounded quotient; of a divisor above 2^126 it is zero."""
    a, b = (reader(program, ins, name, "f32") for name in ins.operands[1:])
    write = writer(program, ins, ins.operands[0], "f32")

    def execute(warp, mask):
        x, y = a(warp), b(warp)
        write(warp, mask, np.where((np.abs(y) > 2.0**126) & np.isfinite(x), np.float32(0), x / y).astype(np.float32))

    return execute
