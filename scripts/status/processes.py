"""What the kernel knows of the ranks' processes: CPU time with children, I/O, and whether one is stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_IO_FIELDS = ("rchar", "read_bytes", "write_bytes")


@dataclass(frozen=True)
class Sample:
    """CPU time of a process and all its descendants (s), its I/O and major page faults (bytes), its state letter."""

    cpu_s: float
    io_bytes: int
    state: str


def sample(pids: Iterable[int]) -> dict[int, Sample]:
    """Return a sample of each of ``pids`` that exists; one pass over /proc for all of them."""
    wanted = set(pids)
    if not wanted:
        return {}
    states: dict[int, str] = {}
    cpu: dict[int, float] = {}
    faults: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                # The command's name is in parentheses and may itself hold any character.
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(name)
        states[pid] = fields[0]
        children.setdefault(int(fields[1]), []).append(pid)
        faults[pid] = int(fields[9]) + int(fields[10])
        # Children that have ended count through their parent, so that the sum does not fall when one does.
        cpu[pid] = sum(map(int, fields[11:15])) / _TICKS_PER_S
    return {
        pid: Sample(
            cpu_s=sum(cpu.get(member, 0.0) for member in _tree(pid, children)),
            io_bytes=_io_bytes(pid) + faults[pid] * _PAGE_BYTES,
            state=states[pid],
        )
        for pid in wanted & states.keys()
    }


def _tree(root: int, children: dict[int, list[int]]) -> list[int]:
    members = [root]
    for member in members:
        members.extend(children.get(member, ()))
    return members


def _io_bytes(pid: int) -> int:
    """Bytes read and written, 0 where the kernel does not tell (another user's process)."""
    total = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/io") as file:
        for line in file:
            name, _, amount = line.partition(":")
            if name in _IO_FIELDS:
                total += int(amount)
    return total
