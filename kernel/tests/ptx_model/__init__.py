"""A functional model of the PTX that the SM100 kernels compile to, in numpy.

It executes one kernel launch at the level of the PTX ISA (version 9.4): warps step cooperatively, asynchronous
operations complete in random order from a seed, shared memory and TMEM start poisoned, and faults are reported with
the warp and the instruction.

What it does not model:
- time, bandwidth, caches, occupancy, register limits and ``setmaxnreg``;
- memory order between threads: every thread sees every write at once, so a missing fence or a too weak ``.relaxed``
  passes. The one exception is the generic to asynchronous proxy fence of shared memory, which is checked;
- clusters at the same time: they run one after the other, so kernels whose clusters wait for each other hang;
- contention for TMEM between blocks on one SM, programmatic dependent launch (``griddepcontrol`` does nothing);
- the order and width of the tensor core's internal sums: a K = 64 step is summed in float32 by numpy;
- the last bits of ``.approx`` functions (correctly rounded, or moved at random by a given number of units) and of
  ``fma.f32`` (rounded twice);
- blocks of more than one dimension, generic addressing, local memory, textures, calls.

An instruction, modifier, operand form or descriptor field that is not listed in the modules is an error.
"""

from .errors import BarrierError, Deadlock, ModelError, OutOfBounds, ProxyError, UndefinedRead, UnknownInstruction
from .machine import Machine
from .memory import GlobalMemory
from .parser import parse

__all__ = [
    "BarrierError",
    "Deadlock",
    "GlobalMemory",
    "Machine",
    "ModelError",
    "OutOfBounds",
    "ProxyError",
    "UndefinedRead",
    "UnknownInstruction",
    "parse",
]
