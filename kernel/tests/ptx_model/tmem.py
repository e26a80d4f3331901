"""Tensor memory: 128 lanes of 512 columns of 32 bits, its allocation, and loads to registers."""

from __future__ import annotations

import numpy as np

from .errors import BarrierError, OutOfBounds, UnknownInstruction
from .isa import BLOCKED, expect_operands, instruction
from .memory import shared_offset
from .operands import TYPES, address_reader, reader, uniform, vector, writer
from .parser import Instruction, Program

LANES, COLUMNS = 128, 512
POISON = 0x7FC0DEAD


class TensorMemory:
    """One block's tensor memory; undefined contents are a NaN pattern."""

    def __init__(self) -> None:
        self.data = np.full((LANES, COLUMNS), POISON, np.uint32)
        self.allocations: dict[int, int] = {}
        self.may_allocate = True

    @property
    def allocated(self) -> int:
        return sum(self.allocations.values())

    def check(self, column: int, count: int) -> None:
        """Raise unless [column, column + count) lies in one allocation."""
        if not any(base <= column and column + count <= base + size for base, size in self.allocations.items()):
            raise OutOfBounds(f"TMEM columns {column}..{column + count - 1} are not allocated: {self.allocations}")


def split(address: int) -> tuple[int, int]:
    """(lane, column) of a TMEM address."""
    return address >> 16, address & 0xFFFF


def pair_of(cta, group: str) -> list:
    """The block, or the two blocks of its pair for cta_group::2, even rank first."""
    if group == "1":
        return [cta]
    return [cta.cluster.cta(cta.rank & ~1), cta.cluster.cta(cta.rank | 1)]


@instruction(r"tcgen05\.alloc\.cta_group::(?P<group>[12])\.sync\.aligned(\.shared::cta)?\.b32")
def _alloc(ins: Instruction, match, program: Program):
    """Allocate in the issuing block; with cta_group::2 one warp of each block of the pair does so."""
    expect_operands(ins, 2)
    address, columns = address_reader(program, ins, ins.operands[0]), reader(program, ins, ins.operands[1], "u32")

    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        count, memory = uniform(columns(warp), mask), warp.cta.tmem
        if count < 32 or count > COLUMNS or count & (count - 1):
            raise BarrierError(f"TMEM allocation of {count} columns")
        if not memory.may_allocate:
            raise BarrierError("TMEM allocation after the permit was given up")
        taken = {column for base, size in memory.allocations.items() for column in range(base, base + size)}
        base = next((b for b in range(0, COLUMNS, count) if taken.isdisjoint(range(b, b + count))), None)
        if base is None:
            raise BarrierError(f"no room for {count} TMEM columns: the allocation would wait for ever")
        memory.allocations[base] = count
        index = shared_offset(uniform(address(warp), mask)) + np.arange(4)
        warp.cta.shared.write(index, np.array([base], np.uint32).view(np.uint8), warp.index)
        warp.machine.events += 1
        return None

    return execute


@instruction(r"tcgen05\.relinquish_alloc_permit\.cta_group::(?P<group>[12])\.sync\.aligned")
def _relinquish(ins: Instruction, match, program: Program):
    def execute(warp, mask):
        warp.cta.tmem.may_allocate = False

    return execute


@instruction(r"tcgen05\.dealloc\.cta_group::(?P<group>[12])\.sync\.aligned\.b32")
def _dealloc(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    address, columns = (reader(program, ins, text, "u32") for text in ins.operands)

    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        _, base = split(uniform(address(warp), mask))
        if warp.cta.tmem.allocations.pop(base, None) != uniform(columns(warp), mask):
            raise BarrierError(f"TMEM deallocation at column {base} of what was not allocated so")
        for cta in pair_of(warp.cta, match["group"]):
            if any("tcgen05.mma" in what or "tcgen05.cp" in what for what, _ in cta.tensor_queue):
                raise BarrierError("TMEM is deallocated while the tensor core still works")
        warp.machine.events += 1
        return None

    return execute


@instruction(r"tcgen05\.ld\.sync\.aligned\.32x32b\.x(?P<count>1|2|4|8|16|32|64|128)\.b32")
def _ld(ins: Instruction, match, program: Program):
    """Lane i of the warp gets the columns of TMEM lane 32 * (warp % 4) + i; defined only after wait::ld.

    The columns are read when the warp waits, at the latest moment the instruction allows; unless ``strict``, at once,
    as compiled code does where no later write races, because its registers carry a scoreboard.
    """
    expect_operands(ins, 2)
    names, address = vector(ins.operands[0]), address_reader(program, ins, ins.operands[1])
    if len(names) != int(match["count"]):
        raise UnknownInstruction(f"Vector of the wrong length, {ins}")
    writes = [writer(program, ins, name, "u32") for name in names]
    poison = np.full(32, POISON, TYPES["u32"][1])

    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        lane, column = split(uniform(address(warp), mask))
        if lane != 32 * (warp.index % 4):
            raise OutOfBounds(f"warp {warp.index} reads TMEM lane {lane}, it may read {32 * (warp.index % 4)}")
        warp.cta.tmem.check(column, len(writes))
        for write in writes:
            write(warp, mask, poison)

        def load():
            part = warp.cta.tmem.data[lane : lane + 32, column : column + len(writes)]
            for i, write in enumerate(writes):
                write(warp, mask, part[:, i])

        if warp.machine.strict:
            warp.tmem_loads.append(load)
        else:
            load()
        return None

    return execute


@instruction(r"tcgen05\.wait::(?P<what>ld|st)\.sync\.aligned")
def _wait(ins: Instruction, match, program: Program):
    def execute(warp, mask):
        if match["what"] == "ld":
            for load in warp.tmem_loads:
                load()
            warp.tmem_loads.clear()

    return execute
