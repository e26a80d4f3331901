"""mbarrier objects and the instructions on them.

A phase completes when no arrival and no transaction byte is outstanding. Source: PTX ISA, "mbarrier".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import BarrierError, UnknownInstruction
from .isa import BLOCKED, expect_operands, instruction
from .memory import shared_offset, shared_rank
from .operands import LANES, address_reader, lanes, reader, uniform, writer
from .parser import Instruction, Program

if TYPE_CHECKING:
    from .machine import Cluster

_MAX_TRANSACTION = (1 << 20) - 1
_SPACE = r"\.shared(::cta|::cluster)?"
_ORDER = r"(\.(?P<sem>release|relaxed|acquire))?(\.(?P<scope>cta|cluster))?"


@dataclass
class Mbarrier:
    """One barrier: arrivals expected a phase, arrivals and transaction bytes outstanding, phase parity."""

    expected: int
    pending: int
    transactions: int = 0
    phase: int = 0


def barrier_at(cluster: Cluster, address: int) -> Mbarrier:
    """The barrier at a shared address of any block of the cluster.

    Raises:
        BarrierError: nothing was initialised there.
    """
    barrier = cluster.shared_barriers(shared_rank(address)).get(shared_offset(address))
    if barrier is None:
        raise BarrierError(f"no mbarrier was initialised at shared address {address:#x}")
    return barrier


def arrive(cluster: Cluster, address: int, count: int = 1, transactions: int = 0) -> None:
    """Take ``count`` arrivals and add ``transactions`` expected bytes (negative: bytes that came)."""
    barrier = barrier_at(cluster, address)
    barrier.transactions += transactions
    barrier.pending -= count
    if barrier.pending < 0:
        raise BarrierError(f"mbarrier at {address:#x} expects {barrier.expected} arrivals a phase and got more")
    if abs(barrier.transactions) > _MAX_TRANSACTION:
        raise BarrierError(f"transaction count of the mbarrier at {address:#x} is out of range")
    if barrier.pending == 0 and barrier.transactions == 0:
        barrier.phase ^= 1
        barrier.pending = barrier.expected
    cluster.machine.events += 1


@instruction(rf"mbarrier\.init{_SPACE}\.b64")
def _init(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    address, count = address_reader(program, ins, ins.operands[0]), reader(program, ins, ins.operands[1], "u32")

    def execute(warp, mask):
        for lane in lanes(mask):
            where, expected = int(address(warp)[lane]), int(count(warp)[lane])
            if where % 8 or not 0 < expected <= _MAX_TRANSACTION:
                raise BarrierError(f"mbarrier.init with count {expected} at {where:#x}")
            warp.cta.cluster.shared_barriers(shared_rank(where))[shared_offset(where)] = Mbarrier(expected, expected)
        warp.machine.events += 1

    return execute


@instruction(rf"mbarrier\.inval{_SPACE}\.b64")
def _inval(ins: Instruction, match, program: Program):
    address = address_reader(program, ins, ins.operands[0])

    def execute(warp, mask):
        for lane in lanes(mask):
            where = int(address(warp)[lane])
            warp.cta.cluster.shared_barriers(shared_rank(where)).pop(shared_offset(where), None)

    return execute


@instruction(rf"mbarrier\.(?P<how>arrive|arrive\.expect_tx|expect_tx){_ORDER}{_SPACE}\.b64")
def _arrive(ins: Instruction, match, program: Program):
    """The state that arrive returns is opaque; reading it is not modelled, so it stays poisoned."""
    operands = list(ins.operands)
    if operands and not operands[0].startswith("["):
        operands.pop(0)
    transacts = "expect_tx" in match["how"]
    if not 1 <= len(operands) <= 2 or (transacts and len(operands) != 2):
        raise UnknownInstruction(f"Not modelled, {ins}")
    address = address_reader(program, ins, operands[0])
    amount = reader(program, ins, operands[1] if len(operands) > 1 else "1", "u32")
    arrivals = {"arrive": None, "arrive.expect_tx": 1, "expect_tx": 0}[match["how"]]

    def execute(warp, mask):
        for lane in lanes(mask):
            value = int(amount(warp)[lane])
            count = value if arrivals is None else arrivals
            arrive(warp.cta.cluster, int(address(warp)[lane]), count, value if transacts else 0)

    return execute


@instruction(rf"mbarrier\.(?P<how>try_wait|test_wait)\.parity{_ORDER}{_SPACE}\.b64")
def _wait(ins: Instruction, match, program: Program):
    """try_wait suspends, and now and then gives up and returns false, as the hardware's time limit makes it do."""
    expect_operands(ins, 3, 4)
    write = writer(program, ins, ins.operands[0], "pred")
    address, parity = address_reader(program, ins, ins.operands[1]), reader(program, ins, ins.operands[2], "u32")
    suspends = match["how"] == "try_wait"
    false, true = np.zeros(LANES, bool), np.ones(LANES, bool)

    def execute(warp, mask):
        where = address(warp)[mask]
        if (where != where[0]).any():
            raise UnknownInstruction("lanes of a warp wait at different mbarriers")
        barrier = barrier_at(warp.cta.cluster, int(where[0]))
        if barrier.phase != (uniform(parity(warp), mask) & 1):
            write(warp, mask, true)
            return None
        if suspends and warp.machine.random.random() >= warp.machine.give_up:
            return BLOCKED
        write(warp, mask, false)
        warp.machine.polls += 1
        return None

    return execute
