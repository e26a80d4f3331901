"""How busy the machine was with other work than this process's children."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple


class ProcessorSeconds(NamedTuple):
    """Processor time so far: of the machine, what its host took included, and of this process and its children."""

    machine: float
    own: float
    clock: float

    @classmethod
    def now(cls) -> ProcessorSeconds:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = usage.ru_utime + usage.ru_stime + time.process_time()
        machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return cls(machine, own, time.perf_counter())

    def used_by_others(self) -> float:
        """Processors that others kept busy since, on average; the system's own work for our reads counts as theirs."""
        now = self.now()
        return (now.machine - self.machine - (now.own - self.own)) / (now.clock - self.clock)
