"""How an instruction finds its implementation: by a regular expression over the whole opcode, modifiers included.

An opcode that no pattern matches as a whole is unknown, so no modifier is ever ignored by accident.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import UnknownInstruction

if TYPE_CHECKING:
    import numpy as np

    from .parser import Instruction, Program
    from .warp import Warp

    # Executes for the lanes of a mask; BLOCKED asks to be called again later, with nothing changed.
    Execute = Callable[[Warp, np.ndarray], Any]

BLOCKED = object()
# An asynchronous operation returns this where it waits for another one.
NOT_READY = object()
_PATTERNS: list[tuple[re.Pattern[str], Callable[[Instruction, re.Match[str], Program], Execute]]] = []


def instruction(pattern: str) -> Callable:
    """Register a function from (instruction, opcode match, program) to its execution."""

    def register(decode: Callable) -> Callable:
        _PATTERNS.append((re.compile(pattern), decode))
        return decode

    return register


def decode(ins: Instruction, program: Program) -> Execute:
    """The execution of one instruction.

    Raises:
        UnknownInstruction: no pattern matches the opcode.
    """
    for pattern, decoder in _PATTERNS:
        if match := pattern.fullmatch(ins.opcode):
            return decoder(ins, match, program)
    raise UnknownInstruction(f"Not modelled, {ins}")


def expect_operands(ins: Instruction, *counts: int) -> None:
    """Raise UnknownInstruction unless the number of operands is one of ``counts``."""
    if len(ins.operands) not in counts:
        raise UnknownInstruction(f"Expected {counts} operands, {ins}")
