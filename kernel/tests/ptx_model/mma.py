"""tcgen05.cp, tcgen05.mma of NVFP4 operands, and tcgen05.commit.

Operations of one block run in order, each at some time after its issue. Source: PTX ISA, "tcgen05": shared memory
descriptor, instruction descriptor of kind::mxf4nvf4, block scaling. Fields that must have a fixed value are checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import OutOfBounds, UnknownInstruction
from .formats import E4M3, unpack_e2m1
from .isa import expect_operands, instruction
from .mbarrier import arrive
from .memory import WINDOW_BITS
from .operands import address_reader, reader, uniform
from .parser import Instruction, Program
from .tmem import pair_of, split

_NO_SWIZZLE, _SWIZZLE_128 = 0, 2
BLOCK_K = 64


@dataclass(frozen=True)
class SharedDescriptor:
    """Matrix in shared memory: start and strides in bytes, swizzle mode."""

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def decode(cls, bits: int) -> SharedDescriptor:
        """Raise UnknownInstruction where a fixed field has another value."""
        if bits >> 46 & 7 != 1 or bits >> 49 & 0xFFF or bits >> 14 & 3 or bits >> 30 & 3:
            raise UnknownInstruction(f"shared memory descriptor {bits:#018x} has wrong fixed fields")
        fields = (bits & 0x3FFF, bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF)
        return cls(*(field << 4 for field in fields), bits >> 61)


@dataclass(frozen=True)
class InstructionDescriptor:
    """Shape and signs of a block-scaled multiplication with K = 64."""

    m: int
    n: int
    negate_a: bool
    negate_b: bool

    @classmethod
    def decode(cls, bits: int) -> InstructionDescriptor:
        """Raise UnknownInstruction unless it says E2M1 by E2M1, UE4M3 scales, K-major, scale ids 0, dense K 64."""
        wrong = bits & 0b1111 or bits >> 4 & 7 or bits >> 7 & 7 != 1 or bits >> 10 & 7 != 1
        if wrong or bits >> 15 & 3 or bits >> 23 & 15 or bits >> 29:
            raise UnknownInstruction(f"instruction descriptor {bits:#010x} is not NVFP4, dense, K-major")
        return cls((bits >> 27 & 3) * 128, (bits >> 17 & 63) * 8, bool(bits >> 13 & 1), bool(bits >> 14 & 1))


def _operand(cta, descriptor: SharedDescriptor, rows: int) -> np.ndarray:
    """float32 [rows, 64] of E2M1 in the K-major layout of 128-byte swizzle: 8 rows of 128 bytes form an atom."""
    if descriptor.swizzle != _SWIZZLE_128:
        raise UnknownInstruction(f"operand layout of swizzle mode {descriptor.swizzle}")
    row = np.arange(rows)[:, None]
    index = descriptor.start + row // 8 * descriptor.stride + row % 8 * 128 + np.arange(BLOCK_K // 2)
    return unpack_e2m1(cta.shared.read(index ^ ((index >> 7 & 7) << 4), asynchronous=True))


def _scales(cta, address: int, rows: int) -> np.ndarray:
    """float32 [rows, 4]: row r in lane r % 32 of column r / 32, one byte for each 16 of K."""
    lane, column = split(address)
    if lane or address >> 30:
        raise UnknownInstruction(f"scale factors at TMEM address {address:#x}")
    cta.tmem.check(column, -(-rows // 32))
    row = np.arange(rows)
    words = cta.tmem.data[row % 32, column + row // 32]
    return np.stack([E4M3[words >> np.uint32(8 * k) & 255] for k in range(4)], 1)


@instruction(
    r"tcgen05\.mma\.cta_group::(?P<group>[12])\.kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X)"
    r"(\.collector::a::(discard|lastuse|fill|use))?"
)
def _mma(ins: Instruction, match, program: Program):
    """D (+)= (A * scales) (B * scales)^T in float32; with cta_group::2 each block has half of A, of B and of D."""
    expect_operands(ins, 7)
    target, scale_a, scale_b = (address_reader(program, ins, ins.operands[i]) for i in (0, 4, 5))
    a, b = (reader(program, ins, ins.operands[i], "b64") for i in (1, 2))
    shape, accumulate = reader(program, ins, ins.operands[3], "b32"), reader(program, ins, ins.operands[6], "pred")

    def execute(warp, mask):
        if int(mask.sum()) != 1:
            raise UnknownInstruction("tcgen05.mma is issued by more than one thread")
        blocks = pair_of(warp.cta, match["group"])
        what = InstructionDescriptor.decode(uniform(shape(warp), mask))
        if what.m != 128 * len(blocks) or what.n % (8 * len(blocks)) or not 8 <= what.n <= 256:
            raise UnknownInstruction(f"shape {what.m} x {what.n} with cta_group::{match['group']}")
        desc_a, desc_b = (SharedDescriptor.decode(uniform(read(warp), mask)) for read in (a, b))
        lane, column = split(uniform(target(warp), mask))
        if lane:
            raise UnknownInstruction("the accumulator does not start at TMEM lane 0")
        at_a, at_b = uniform(scale_a(warp), mask), uniform(scale_b(warp), mask)
        adds = bool(uniform(accumulate(warp), mask))

        def multiply():
            other = np.concatenate([_operand(cta, desc_b, what.n // len(blocks)) for cta in blocks])
            for cta in blocks:
                cta.tmem.check(column, what.n)
                left = _operand(cta, desc_a, 128) * np.repeat(_scales(cta, at_a, 128), 16, 1)
                right = other * np.repeat(_scales(cta, at_b, what.n), 16, 1)
                # Not the matrix product: its library's threads wait for one another where other work has the cores.
                product = (-1 if what.negate_a != what.negate_b else 1) * np.einsum("ik,jk->ij", left, right)
                place = cta.tmem.data[:, column : column + what.n].view(np.float32)
                place[:] = place + product if adds else product

        warp.cta.tensor_queue.append((str(ins), multiply))

    return execute


@instruction(r"tcgen05\.cp\.cta_group::(?P<group>[12])\.32x128b\.warpx4")
def _cp(ins: Instruction, match, program: Program):
    """32 rows of 16 bytes to four columns, repeated in each quarter of the lanes, in every block of the group."""
    expect_operands(ins, 2)
    target, source = address_reader(program, ins, ins.operands[0]), reader(program, ins, ins.operands[1], "b64")

    def execute(warp, mask):
        if int(mask.sum()) != 1:
            raise UnknownInstruction("tcgen05.cp is issued by more than one thread")
        blocks = pair_of(warp.cta, match["group"])
        lane, column = split(uniform(target(warp), mask))
        descriptor = SharedDescriptor.decode(uniform(source(warp), mask))
        if descriptor.swizzle != _NO_SWIZZLE or lane:
            raise UnknownInstruction(f"tcgen05.cp of {descriptor} to lane {lane}")
        row = np.arange(32)[:, None]
        index = descriptor.start + row // 8 * descriptor.stride + row % 8 * 16 + np.arange(16)

        def copy():
            for cta in blocks:
                cta.tmem.check(column, 4)
                words = np.ascontiguousarray(cta.shared.read(index, asynchronous=True)).view(np.uint32)
                cta.tmem.data[:, column : column + 4] = np.tile(words, (4, 1))

        warp.cta.tensor_queue.append((str(ins), copy))

    return execute


@instruction(
    r"tcgen05\.commit\.cta_group::(?P<group>[12])\.mbarrier::arrive::one\.shared::cluster"
    r"(?P<multicast>\.multicast::cluster)?\.b64"
)
def _commit(ins: Instruction, match, program: Program):
    """Arrive once at the barrier, or at those of the masked blocks, when what was issued before is complete."""
    expect_operands(ins, 2 if match["multicast"] else 1)
    barrier = address_reader(program, ins, ins.operands[0])
    ranks = reader(program, ins, ins.operands[1], "u16") if match["multicast"] else None

    def execute(warp, mask):
        if int(mask.sum()) != 1:
            raise UnknownInstruction("tcgen05.commit is issued by more than one thread")
        where = uniform(barrier(warp), mask)
        targets = [where]
        if ranks is not None:
            chosen = uniform(ranks(warp), mask)
            offset = where & ((1 << WINDOW_BITS) - 1)
            targets = [rank << WINDOW_BITS | offset for rank in range(16) if chosen >> rank & 1]
        if any(target >> WINDOW_BITS >= len(warp.cta.cluster.ctas) for target in targets):
            raise OutOfBounds("tcgen05.commit names a block that the cluster does not have")

        def signal():
            for target in targets:
                arrive(warp.cta.cluster, target)

        warp.cta.tensor_queue.append((str(ins), signal))

    return execute
