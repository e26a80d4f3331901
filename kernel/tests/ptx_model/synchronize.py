"""Barriers of threads, warp-wide exchanges, fences, and hints that have no functional effect here."""

from __future__ import annotations

import numpy as np

from .errors import BarrierError, UnknownInstruction
from .isa import BLOCKED, expect_operands, instruction
from .operands import LANES, lanes, reader, uniform, writer
from .parser import Instruction, Program


@instruction(r"(?P<name>bar|barrier(\.cta)?)\.(?P<how>sync|arrive)(?P<aligned>\.aligned)?")
def _bar(ins: Instruction, match, program: Program):
    """Named barrier. Threads count in whole warps; an arrival beyond the expected count is an error."""
    expect_operands(ins, 1, 2)
    number = reader(program, ins, ins.operands[0], "u32")
    threads = reader(program, ins, ins.operands[1], "u32") if len(ins.operands) > 1 else None
    waits = match["how"] == "sync"
    if threads is None and not waits:
        raise UnknownInstruction(f"Not modelled, {ins}")

    def execute(warp, mask):
        if warp.waiting is not None and warp.waiting[0] is ins:
            barrier, generation = warp.waiting[1:]
            if barrier["generation"] == generation:
                return BLOCKED
            warp.waiting = None
            return None
        if not warp.converged(mask):
            return BLOCKED
        which = uniform(number(warp), mask)
        expected = uniform(threads(warp), mask) if threads is not None else warp.machine.threads
        if not 0 <= which < 16 or expected % LANES or expected <= 0:
            raise BarrierError(f"barrier {which} with {expected} threads")
        barrier = warp.cta.named_barriers.setdefault(which, {"arrived": 0, "expected": expected, "generation": 0})
        if barrier["arrived"] and barrier["expected"] != expected:
            raise BarrierError(f"barrier {which} is used with {barrier['expected']} and with {expected} threads")
        barrier["expected"] = expected
        barrier["arrived"] += LANES
        generation = barrier["generation"]
        warp.machine.events += 1
        if barrier["arrived"] == expected:
            barrier["arrived"] = 0
            barrier["generation"] += 1
            return None
        if not waits:
            return None
        warp.waiting = (ins, barrier, generation)
        return BLOCKED

    return execute


@instruction(r"bar\.warp\.sync")
def _warp_sync(ins: Instruction, match, program: Program):
    expect_operands(ins, 1)
    members = reader(program, ins, ins.operands[0], "b32")
    return lambda warp, mask: None if _all_there(warp, mask, uniform(members(warp), mask)) else BLOCKED


def _all_there(warp, mask: np.ndarray, members: int) -> bool:
    """Whether every living lane of ``members`` has come; a lane outside ``members`` is an error."""
    wanted = np.array([members >> lane & 1 for lane in range(LANES)], bool)
    if (mask & ~wanted).any():
        raise UnknownInstruction("a lane executes a .sync instruction whose member mask leaves it out")
    return bool((mask == (wanted & warp.alive)).all())


@instruction(r"barrier\.cluster\.arrive(\.(release|relaxed))?(?P<aligned>\.aligned)?")
def _cluster_arrive(ins: Instruction, match, program: Program):
    def execute(warp, mask):
        if not warp.converged(mask):
            return BLOCKED
        cluster = warp.cta.cluster
        if warp.cluster_arrivals != cluster.generation:
            raise BarrierError("barrier.cluster.arrive twice without a wait between")
        warp.cluster_arrivals += 1
        cluster.arrive(warp)
        return None

    return execute


@instruction(r"barrier\.cluster\.wait(\.acquire)?(?P<aligned>\.aligned)?")
def _cluster_wait(ins: Instruction, match, program: Program):
    def execute(warp, mask):
        if warp.cluster_arrivals == 0:
            raise BarrierError("barrier.cluster.wait without an arrive")
        return BLOCKED if warp.cta.cluster.generation < warp.cluster_arrivals else None

    return execute


@instruction(r"fence\.proxy\.async(\.shared::(cta|cluster)|\.global)?")
def _fence_proxy(ins: Instruction, match, program: Program):
    def execute(warp, mask):
        if not ins.opcode.endswith("global"):
            warp.cta.shared.fence(warp.index)

    return execute


@instruction(
    r"fence\.mbarrier_init\.release\.cluster|fence(\.(acq_rel|sc))?\.(cta|cluster|gpu|sys)|membar\.(cta|gl|sys)"
    r"|griddepcontrol\.(wait|launch_dependents)|setmaxnreg\.(inc|dec)\.sync\.aligned\.u32|nanosleep\.u32"
    r"|tcgen05\.fence::(before|after)_thread_sync|fence\.proxy\.tensormap::generic\.\w+\.\w+"
)
def _no_effect(ins: Instruction, match, program: Program):
    """Ordering, overlap and register limits: not modelled, see the package's docstring."""
    return lambda warp, mask: None


@instruction(r"elect\.sync")
def _elect(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    lane_name, predicate_name = ins.operands[0].split("|")
    leader = writer(program, ins, lane_name, "b32")
    elected = writer(program, ins, predicate_name, "pred")
    members = reader(program, ins, ins.operands[1], "b32")

    def execute(warp, mask):
        if not _all_there(warp, mask, uniform(members(warp), mask)):
            return BLOCKED
        first = lanes(mask)[0]
        leader(warp, mask, np.full(LANES, first, np.uint32))
        elected(warp, mask, np.arange(LANES) == first)
        return None

    return execute


@instruction(r"shfl\.sync\.(?P<mode>idx|up|down|bfly)\.b32")
def _shfl(ins: Instruction, match, program: Program):
    expect_operands(ins, 5)
    names = ins.operands[0].split("|")
    write = writer(program, ins, names[0], "b32")
    valid = writer(program, ins, names[1], "pred") if len(names) > 1 else None
    value, by, clamp, members = (reader(program, ins, text, "b32") for text in ins.operands[1:])
    mode, lane = match["mode"], np.arange(LANES)

    def execute(warp, mask):
        if not _all_there(warp, mask, uniform(members(warp), mask)):
            return BLOCKED
        amount, control = by(warp).astype(np.int64) & 31, clamp(warp).astype(np.int64)
        segment, limit = control >> 8 & 31, control & 31
        low = lane & segment
        high = low | (limit & ~segment)
        source = {"idx": low | (amount & ~segment), "up": lane - amount, "down": lane + amount, "bfly": lane ^ amount}[
            mode
        ]
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, lane)
        if not mask[source[mask]].all():
            raise UnknownInstruction("shfl reads a lane that does not take part")
        write(warp, mask, value(warp)[source])
        if valid is not None:
            valid(warp, mask, inside)
        return None

    return execute


@instruction(r"vote\.sync\.(?P<mode>ballot\.b32|any\.pred|all\.pred|uni\.pred)")
def _vote(ins: Instruction, match, program: Program):
    expect_operands(ins, 3)
    mode = match["mode"].split(".")[0]
    negated = ins.operands[1].startswith("!")
    value = reader(program, ins, ins.operands[1].lstrip("!"), "pred")
    members = reader(program, ins, ins.operands[2], "b32")
    write = writer(program, ins, ins.operands[0], "b32" if mode == "ballot" else "pred")

    def execute(warp, mask):
        if not _all_there(warp, mask, uniform(members(warp), mask)):
            return BLOCKED
        votes = (value(warp) ^ negated)[mask]
        if mode == "ballot":
            bits = sum(1 << lane for lane, vote in zip(lanes(mask), votes, strict=True) if vote)
            write(warp, mask, np.full(LANES, bits, np.uint32))
        else:
            result = {"any": votes.any(), "all": votes.all(), "uni": votes.all() or not votes.any()}[mode]
            write(warp, mask, np.full(LANES, bool(result)))
        return None

    return execute


@instruction(r"match\.any\.sync\.b32")
def _match(ins: Instruction, match, program: Program):
    """Mask of the lanes that take part with the same value."""
    expect_operands(ins, 3)
    value, members = (reader(program, ins, text, "b32") for text in ins.operands[1:])
    write = writer(program, ins, ins.operands[0], "b32")

    def execute(warp, mask):
        if not _all_there(warp, mask, uniform(members(warp), mask)):
            return BLOCKED
        values = value(warp)
        same = (values[:, None] == values[None, :]) & mask[None, :]
        write(warp, mask, (same.astype(np.uint32) << np.arange(LANES, dtype=np.uint32)).sum(1, dtype=np.uint32))
        return None

    return execute


@instruction(r"redux\.sync\.(?P<op>add|min|max|or|and|xor)\.(?P<type>[us]32|b32)")
def _redux(ins: Instruction, match, program: Program):
    expect_operands(ins, 3)
    kind = match["type"]
    value, members = reader(program, ins, ins.operands[1], kind), reader(program, ins, ins.operands[2], "b32")
    write = writer(program, ins, ins.operands[0], kind)
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "or": np.bitwise_or,
        "and": np.bitwise_and,
        "xor": np.bitwise_xor,
    }[match["op"]]

    def execute(warp, mask):
        if not _all_there(warp, mask, uniform(members(warp), mask)):
            return BLOCKED
        taken = value(warp)[mask]
        write(warp, mask, np.full(LANES, function.reduce(taken, dtype=taken.dtype), taken.dtype))
        return None

    return execute
