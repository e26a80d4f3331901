"""Asynchronous copies without a tensor map: cp.async, cp.async.bulk and cp.reduce.async.bulk, and their groups.

A destination in shared memory is undefined from the issue of a copy to its completion. A bulk store reads shared memory
at one random time and writes global memory at a later one, so that ``.read`` waits differ from full ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import OutOfBounds, UnknownInstruction
from .formats import decode_bf16, encode_bf16
from .isa import BLOCKED, NOT_READY, expect_operands, instruction
from .mbarrier import arrive
from .memory import shared_offset, shared_rank
from .operands import LANES, address_reader, lanes, reader
from .parser import Instruction, Program

WINDOW_MASK = 0xFF_FFFF


@dataclass(eq=False)
class Copy:
    """One copy under way: whether its source was read and its destination written."""

    read: bool = False
    written: bool = False


@dataclass
class CopyState:
    """Copies of a warp. cp.async groups belong to the warp, bulk groups to each lane."""

    recent: list[Copy] = field(default_factory=list)
    outstanding: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)
    bulk_recent: list[list[Copy]] = field(default_factory=lambda: [[] for _ in range(LANES)])
    bulk_groups: list[list[list[Copy]]] = field(default_factory=lambda: [[] for _ in range(LANES)])


def finish(warp) -> None:
    """A warp exits. Its copies complete later; a bulk store still reading shared memory would lose its source."""
    for lane in range(LANES):
        groups = [*warp.copies.bulk_groups[lane], warp.copies.bulk_recent[lane]]
        if any(not copy.read for group in groups for copy in group):
            raise OutOfBounds(f"[{warp}] exits while its bulk store still reads shared memory")


def _aligned(address: int, size: int, what: str) -> None:
    if address % size:
        raise OutOfBounds(f"{what} {address:#x} is not aligned to {size} bytes")


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(::cta)?\.global(\.L2::(cache_hint|\d+B))*")
def _cp_async(ins: Instruction, match, program: Program):
    """Copy 4, 8 or 16 bytes a lane; bytes past the source size are zeros."""
    expect_operands(ins, 3, 4)
    target, source = (address_reader(program, ins, text) for text in ins.operands[:2])
    size = int(ins.operands[2])
    given = reader(program, ins, ins.operands[3] if len(ins.operands) > 3 else str(size), "u32")
    if size not in ((16,) if match["cache"] == "cg" else (4, 8, 16)) or "cache_hint" in ins.opcode:
        raise UnknownInstruction(f"Not modelled, {ins}")

    def execute(warp, mask):
        targets, sources, sizes = target(warp)[mask], source(warp)[mask], given(warp)[mask]
        if (targets % np.uint64(size)).any() or (sizes > size).any() or (sources[sizes > 0] % np.uint64(size)).any():
            raise OutOfBounds("cp.async is misaligned or its source is longer than its destination")
        index = shared_offset(targets).astype(np.int64)[:, None] + np.arange(size)
        shared = warp.cta.shared
        shared.begin_write(index)
        copy = Copy()

        def complete():
            data = np.zeros((len(sizes), size), np.uint8)
            for count in np.unique(sizes[sizes > 0]):
                mine = sizes == count
                data[mine, :count] = warp.machine.memory.gather(sources[mine], int(count))
            shared.write(index, data, warp.index)
            copy.read = copy.written = True

        warp.copies.recent.append(copy)
        warp.copies.outstanding.append(copy)
        warp.cta.cluster.submit(str(ins), complete)

    return execute


@instruction(r"cp\.async\.(?P<what>commit_group|wait_group|wait_all)")
def _cp_async_group(ins: Instruction, match, program: Program):
    keep = int(ins.operands[0]) if ins.operands else 0

    def execute(warp, mask):
        state = warp.copies
        if not warp.converged(mask):
            raise UnknownInstruction("cp.async groups of a diverged warp are not modelled")
        if match["what"] == "commit_group":
            state.groups.append(state.recent)
            state.recent = []
            return None
        older = state.groups[: len(state.groups) - keep]
        waited = [copy for group in older for copy in group]
        if match["what"] == "wait_all":
            waited = state.outstanding
        if not all(copy.written for copy in waited):
            return BLOCKED
        state.outstanding = [copy for copy in state.outstanding if not copy.written]
        state.groups = (
            [group for group in state.groups if not all(copy.written for copy in group)]
            if not keep
            else (state.groups[-keep:])
        )
        return None

    return execute


@instruction(r"cp\.async\.mbarrier\.arrive(?P<noinc>\.noinc)\.shared(::cta)?\.b64")
def _cp_async_arrive(ins: Instruction, match, program: Program):
    """Every active lane arrives once its earlier cp.async are complete."""
    expect_operands(ins, 1)
    address = address_reader(program, ins, ins.operands[0])

    def execute(warp, mask):
        state = warp.copies
        state.outstanding = [copy for copy in state.outstanding if not copy.written]
        before, targets = list(state.outstanding), [int(address(warp)[lane]) for lane in lanes(mask)]

        def complete():
            if not all(copy.written for copy in before):
                return NOT_READY
            for where in targets:
                arrive(warp.cta.cluster, where)
            return None

        warp.cta.cluster.submit(str(ins), complete)

    return execute


@instruction(
    r"cp\.async\.bulk\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes"
    r"(?P<multicast>\.multicast::cluster)?(?P<hint>\.L2::cache_hint)?"
)
def _bulk_load(ins: Instruction, match, program: Program):
    """Global to shared, every active lane its own; with a mask, to the same offset of several blocks."""
    multicast = bool(match["multicast"])
    expect_operands(ins, 4 + multicast + bool(match["hint"]))
    target, source, barrier = (address_reader(program, ins, ins.operands[i]) for i in (0, 1, 3))
    size = reader(program, ins, ins.operands[2], "u32")
    ranks = reader(program, ins, ins.operands[4], "u16") if multicast else None

    def execute(warp, mask):
        cluster = warp.cta.cluster
        for lane in lanes(mask):
            to, origin = int(target(warp)[lane]), int(source(warp)[lane])
            count, where = int(size(warp)[lane]), int(barrier(warp)[lane])
            for value in (to, origin, count):
                _aligned(value, 16, "bulk copy operand")
            blocks = [shared_rank(to)]
            if multicast:
                blocks = [rank for rank in range(16) if int(ranks(warp)[lane]) >> rank & 1]
            elif shared_rank(where) != shared_rank(to):
                raise OutOfBounds("a bulk copy signals an mbarrier of another block than its destination")
            begin_load(
                cluster,
                str(ins),
                blocks,
                shared_offset(to) + np.arange(count),
                lambda origin=origin, count=count: warp.machine.memory.gather(np.array([origin], np.uint64), count)[0],
                [(rank << 24) | (where & WINDOW_MASK) for rank in blocks],
            )

    return execute


def begin_load(cluster, what: str, blocks: list[int], index: np.ndarray, fetch, barriers: list[int]) -> None:
    """Copy ``fetch()``, one read, to ``index`` of every block, later, one at a time, each with its barrier's bytes."""
    fetched = []
    for rank, where in zip(blocks, barriers, strict=True):
        shared = cluster.shared(rank)
        shared.begin_write(index)

        def complete(shared=shared, where=where):
            if not fetched:
                fetched.append(fetch())
            shared.write(index, fetched[0], None)
            arrive(cluster, where, 0, -int(index.size))

        cluster.submit(f"{what} (block {rank})", complete)


def begin_store(warp, what: str, lane: int, index: np.ndarray, store) -> None:
    """Read ``index`` of the block's shared memory at some time, call ``store(bytes)`` at a later one."""
    copy, taken, shared = Copy(), [], warp.cta.shared

    def complete():
        if not copy.read:
            taken.append(shared.read(index, asynchronous=True).copy())
            copy.read = True
            return NOT_READY
        store(taken[0])
        copy.written = True
        warp.machine.events += 1
        return None

    warp.copies.bulk_recent[lane].append(copy)
    warp.cta.cluster.submit(what, complete)


@instruction(
    r"cp\.(?P<reduce>reduce\.)?async\.bulk\.global\.shared::cta\.bulk_group(?P<hint>\.L2::cache_hint)?"
    r"(?P<op>\.add\.noftz\.bf16|\.add\.f32)?"
)
def _bulk_store(ins: Instruction, match, program: Program):
    """Shared to global, replacing or adding; an addition is atomic for each element, in no fixed order."""
    expect_operands(ins, 3 + bool(match["hint"]))
    if bool(match["reduce"]) != bool(match["op"]):
        raise UnknownInstruction(f"Not modelled, {ins}")
    target, source = (address_reader(program, ins, text) for text in ins.operands[:2])
    size = reader(program, ins, ins.operands[2], "u32")

    def execute(warp, mask):
        memory = warp.machine.memory
        for lane in lanes(mask):
            to, origin, count = int(target(warp)[lane]), int(source(warp)[lane]), int(size(warp)[lane])
            for value in (to, origin, count):
                _aligned(value, 16, "bulk copy operand")
            data, offset = memory.find(to, count)

            def store(taken, place=data[offset : offset + count]):
                place[:] = _combined(match["op"], place, taken)

            begin_store(warp, str(ins), lane, shared_offset(origin) + np.arange(count), store)

    return execute


def _combined(op: str | None, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """uint8 of old + new, or of new."""
    if op is None:
        return new
    if "bf16" in op:
        total = decode_bf16(old.copy().view(np.uint16)) + decode_bf16(new.view(np.uint16))
        return encode_bf16(total).view(np.uint8)
    return (old.copy().view(np.float32) + new.view(np.float32)).view(np.uint8)


@instruction(r"cp\.async\.bulk\.(?P<what>commit_group|wait_group(?P<read>\.read)?)")
def _bulk_group(ins: Instruction, match, program: Program):
    keep = int(ins.operands[0]) if ins.operands else 0

    def execute(warp, mask):
        state = warp.copies
        for lane in lanes(mask):
            groups = state.bulk_groups[lane]
            if match["what"] == "commit_group":
                groups.append(state.bulk_recent[lane])
                state.bulk_recent[lane] = []
                continue
            waited = [copy for group in groups[: len(groups) - keep] for copy in group]
            if not all(copy.read if match["read"] else copy.written for copy in waited):
                return BLOCKED
        return None

    return execute


@instruction(r"cp\.async\.bulk\.prefetch\.L2\.global(\.L2::cache_hint)?")
def _bulk_prefetch(ins: Instruction, match, program: Program):
    return lambda warp, mask: None
