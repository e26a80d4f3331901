"""One warp: 32 lanes with their registers, stepped through the program, divergent or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import copies
from .errors import ModelError
from .isa import BLOCKED
from .operands import FULL, LANES

if TYPE_CHECKING:
    from .machine import Cta, Machine

_POISON = {"pred": False, "b8": 0xAD, "b16": 0xDEAD, "b32": 0x7FC0DEAD, "b64": 0x7FC0DEAD_7FC0DEAD}
_VIEWS = {"pred": "?", "b8": "B", "b16": "Hhe", "b32": "Iif", "b64": "Lld"}
_STORAGE = {"pred": "?", "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8"}


class Warp:
    """Registers, program counters and pending work of one warp.

    ``registers[char][index]`` is a row of 32 lanes seen as the numpy type of that character. ``groups`` holds
    (program counter, mask) for every set of lanes that runs together; a converged warp has one.
    """

    def __init__(self, machine: Machine, cta: Cta, index: int) -> None:
        self.machine, self.cta, self.index = machine, cta, index
        self.registers: dict[str, list[np.ndarray]] = {}
        for kind, count in machine.program.register_counts.items():
            storage = np.full((max(count, 1), LANES), _POISON[kind], _STORAGE[kind])
            for char in _VIEWS[kind]:
                self.registers[char] = list(storage.view(char))
        self.special = _special_registers(machine, cta, index)
        self.groups: list[tuple[int, np.ndarray]] = [(0, FULL)]
        self.alive = FULL
        self.waiting: object = None
        self.copies = copies.CopyState()
        self.tmem_loads: list = []
        self.cluster_arrivals = 0

    @property
    def done(self) -> bool:
        return not self.groups

    def run(self, quantum: int) -> bool:
        """Execute up to ``quantum`` instructions; say whether any was executed."""
        executed = False
        for _ in range(quantum):
            if not self.groups:
                return True
            for which in range(len(self.groups)):
                if self._step(which):
                    executed = True
                    break
            else:
                return executed
        return True

    def _step(self, which: int) -> bool:
        """Execute the next instruction of one group; False where it is blocked."""
        counter, mask = self.groups[which]
        machine = self.machine
        ins, execute, guard = machine.code[counter]
        machine.visited.add(counter)
        active = mask
        if guard is not None:
            taken = self.registers["?"][guard[0]]
            active = mask & (~taken if guard[1] else taken)
            if active.all():
                active = FULL
        if execute is None:
            machine.executed += 1
            self._control(which, ins, active)
            return True
        if active is FULL or active.any():
            try:
                result = execute(self, active)
            except ModelError as error:
                if not error.args[0].startswith("["):
                    error.args = (f"[{self}] {error.args[0]} | {ins}",)
                raise
            if result is BLOCKED:
                return False
        machine.executed += 1
        if len(self.groups) == 1:
            self.groups[0] = (counter + 1, mask)
        else:
            self._replace(which, [(counter + 1, mask)])
        return True

    def _control(self, which: int, ins, active: np.ndarray) -> None:
        counter, mask = self.groups[which]
        stay = mask & ~active
        following = [(counter + 1, stay)] if stay.any() else []
        if ins.opcode.startswith("bra"):
            if active.any():
                following.append((self.machine.program.labels[ins.operands[0]], active))
        else:
            self.alive = self.alive & ~active
        self._replace(which, following)
        if not self.groups:
            self.machine.on_exit(self)

    def _replace(self, which: int, following: list[tuple[int, np.ndarray]]) -> None:
        """Put groups in place of one; groups at the same instruction join, the lowest counter comes first."""
        joined: dict[int, np.ndarray] = {}
        for counter, mask in [*self.groups[:which], *self.groups[which + 1 :], *following]:
            joined[counter] = mask if counter not in joined else joined[counter] | mask
        self.groups = [(counter, FULL if mask.all() else mask) for counter, mask in sorted(joined.items())]

    def converged(self, mask: np.ndarray) -> bool:
        """Whether ``mask`` holds every lane that has not exited, as ``.aligned`` instructions need."""
        return bool((mask == self.alive).all())

    def __str__(self) -> str:
        return f"cta {self.cta.coordinates} warp {self.index}"

    def where(self) -> str:
        """Next instruction of every group, for deadlock reports."""
        code = self.machine.code
        return f"{self}: " + " / ".join(
            f"{code[counter][0]} ({int(mask.sum())} lanes)" for counter, mask in self.groups
        )


def _special_registers(machine: Machine, cta: Cta, index: int) -> dict[str, np.ndarray]:
    """Every special register as uint32 lanes; blocks are one-dimensional."""
    values: dict[str, int] = {"%warpid": index, "%cluster_ctarank": cta.rank}
    cluster = machine.cluster_shape
    values["%cluster_nctarank"] = int(np.prod(cluster))
    for axis, name in enumerate("xyz"):
        values[f"%tid.{name}"] = 0
        values[f"%ntid.{name}"] = machine.block[axis]
        values[f"%ctaid.{name}"] = cta.coordinates[axis]
        values[f"%nctaid.{name}"] = machine.grid[axis]
        values[f"%cluster_ctaid.{name}"] = cta.coordinates[axis] % cluster[axis]
        values[f"%cluster_nctaid.{name}"] = cluster[axis]
        values[f"%clusterid.{name}"] = cta.coordinates[axis] // cluster[axis]
        values[f"%nclusterid.{name}"] = machine.grid[axis] // cluster[axis]
    special = {name: np.full(LANES, value, np.uint32) for name, value in values.items()}
    special["%laneid"] = np.arange(LANES, dtype=np.uint32)
    special["%tid.x"] = special["%laneid"] + np.uint32(index * LANES)
    return special
