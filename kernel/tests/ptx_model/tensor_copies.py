"""cp.async.bulk.tensor with tiled tensor maps.

The 128 bytes of a tensor map are opaque in CUDA's documentation; the fields read here were found by encoding known
maps. Only what the public kernels in the tests use is accepted: tiled mode, no interleave, unit element strides.
"""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import dataclass

import numpy as np

from .copies import WINDOW_MASK, begin_load, begin_store
from .errors import UnknownInstruction
from .isa import expect_operands, instruction
from .memory import shared_offset, shared_rank
from .operands import PARAM_BASE, address_reader, reader, uniform
from .parser import Instruction, Program

_ELEMENT_BITS = {0: 16, 5: 4}


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; sizes in elements, strides in bytes."""

    base: int
    bits: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap:
        words = struct.unpack("<16Q", raw)
        flags = words[1] & 0xFFFF_FFFF
        rank, swizzle, kind = ((flags >> 4) & 7) + 1, flags >> 13 & 7, flags >> 8 & 15
        if kind not in _ELEMENT_BITS or swizzle > 3:
            raise UnknownInstruction(f"tensor map of element type {kind} and swizzle {swizzle}")
        sizes = tuple(int.from_bytes(raw[32 + 4 * i : 36 + 4 * i], "little") + 1 for i in range(rank))
        strides = tuple(int.from_bytes(raw[12 + 4 * i : 16 + 4 * i], "little") * 16 for i in range(rank - 1))
        return cls(words[0], _ELEMENT_BITS[kind], swizzle, sizes, strides, tuple(raw[55 + i] + 1 for i in range(rank)))

    @property
    def row_bytes(self) -> int:
        return self.box[0] * self.bits // 8

    def rows(self, start: list[int]):
        """(global address or None outside the tensor, bytes inside it) of every row of the box, in shared order."""
        inside = max(0, min(self.row_bytes, (self.sizes[0] - start[0]) * self.bits // 8))
        for step in itertools.product(*(range(size) for size in reversed(self.box[1:]))):
            at = [base + offset for base, offset in zip(start[1:], reversed(step), strict=True)]
            if all(0 <= place < size for place, size in zip(at, self.sizes[1:], strict=True)) and inside:
                offset = sum(place * stride for place, stride in zip(at, self.strides, strict=True))
                yield self.base + offset + start[0] * self.bits // 8, inside
            else:
                yield None, 0

    def shared_index(self, offset: int) -> np.ndarray:
        """Byte offsets of the box in shared memory, swizzled in chunks of 16 bytes."""
        index = offset + np.arange(self.row_bytes * int(np.prod(self.box[1:], dtype=np.int64)))
        return index ^ ((index >> 7 & {0: 0, 1: 1, 2: 3, 3: 7}[self.swizzle]) << 4)


def _tensor_operand(program: Program, ins: Instruction, text: str):
    match = re.fullmatch(r"\[([%\w$@]+),\s*\{(.*)\}\]", text)
    if match is None:
        raise UnknownInstruction(f"Unknown tensor operand, {ins}")
    address = reader(program, ins, match[1], "u64")
    coordinates = [reader(program, ins, part.strip(), "s32") for part in match[2].split(",")]

    def read(warp, mask):
        offset = uniform(address(warp), mask) - PARAM_BASE
        tensor = TensorMap.decode(warp.machine.params[offset : offset + 128].tobytes())
        start = [uniform(coordinate(warp), mask) for coordinate in coordinates]
        if len(start) != len(tensor.sizes):
            raise UnknownInstruction("coordinates do not fit the tensor map's rank")
        return tensor, start

    return read


@instruction(
    r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.shared::(cta|cluster)\.global\.tile"
    r"\.mbarrier::complete_tx::bytes(?P<multicast>\.multicast::cluster)?(?P<hint>\.L2::cache_hint)?"
    r"(?P<pair>\.cta_group::[12])?"
)
def _load(ins: Instruction, match, program: Program):
    """One lane's box to shared memory. With cta_group::2 the barrier may be the other block's of a pair."""
    multicast = bool(match["multicast"])
    expect_operands(ins, 3 + multicast + bool(match["hint"]))
    target, barrier = address_reader(program, ins, ins.operands[0]), address_reader(program, ins, ins.operands[2])
    operand = _tensor_operand(program, ins, ins.operands[1])
    ranks = reader(program, ins, ins.operands[3], "u16") if multicast else None
    pair = (match["pair"] or "").endswith("2")

    def execute(warp, mask):
        tensor, start = operand(warp, mask)
        to, where = uniform(target(warp), mask), uniform(barrier(warp), mask)
        blocks, barriers = [shared_rank(to)], [where]
        if multicast:
            mask_value = uniform(ranks(warp), mask)
            blocks = [rank for rank in range(16) if mask_value >> rank & 1]
            owners = [rank & ~1 | shared_rank(where) & 1 if pair else rank for rank in blocks]
            barriers = [(owner << 24) | (where & WINDOW_MASK) for owner in owners]
        elif not pair and shared_rank(where) != shared_rank(to):
            raise UnknownInstruction("a tensor copy signals an mbarrier of another block than its destination")
        memory = warp.machine.memory

        def fetch():
            out = np.zeros((int(np.prod(tensor.box[1:], dtype=np.int64)), tensor.row_bytes), np.uint8)
            for row, (address, size) in zip(out, tensor.rows(start), strict=True):
                if address is not None:
                    data, offset = memory.find(address, size)
                    row[:size] = data[offset : offset + size]
            return out.reshape(-1)

        begin_load(warp.cta.cluster, str(ins), blocks, tensor.shared_index(shared_offset(to)), fetch, barriers)

    return execute


@instruction(
    r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.global\.shared::cta\.tile\.bulk_group(?P<hint>\.L2::cache_hint)?"
)
def _store(ins: Instruction, match, program: Program):
    """One lane's box from shared memory; parts outside the tensor are not written."""
    expect_operands(ins, 2 + bool(match["hint"]))
    operand, source = _tensor_operand(program, ins, ins.operands[0]), address_reader(program, ins, ins.operands[1])

    def execute(warp, mask):
        tensor, start = operand(warp, mask)
        index = tensor.shared_index(shared_offset(uniform(source(warp), mask)))
        memory, lane = warp.machine.memory, int(np.argmax(mask))

        def store(taken):
            for row, (address, size) in zip(taken.reshape(-1, tensor.row_bytes), tensor.rows(start), strict=True):
                if address is not None:
                    data, offset = memory.find(address, size)
                    data[offset : offset + size] = row[:size]

        begin_store(warp, str(ins), lane, index, store)

    return execute
