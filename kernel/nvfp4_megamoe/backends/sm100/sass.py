"""Loops of a kernel's machine code, from the listing of ``nvdisasm -c``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_x_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*`\((\.L_x_\w+)\)")
# Instructions of the tensor core and of bulk copies. One that may be issued by several threads is given a loop that
# elects them one by one, of few instructions.
_ELECTED = re.compile(r"\b(?:UTCOMMA|UTCCP|UBLKCP\.S\.G)\b")
_ELECTION = 10


@dataclass(frozen=True)
class Loop:
    """Instructions from a branch's target to the branch, in order of their addresses."""

    instructions: tuple[str, ...]

    def count(self, opcode: str) -> int:
        """Instructions of that opcode, with any modifiers."""
        return sum(bool(re.search(rf"\b{opcode}\b", text)) for text in self.instructions)


def loops(listing: str) -> list[Loop]:
    """Loops of a listing, by the address of their ends; an outer loop contains its inner ones."""
    code, labels, found = [], {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                found.append(Loop(tuple(code[labels[branch[1]] :])))
    return found


def elections(listing: str) -> int:
    """Loops that only elect the thread of one asynchronous instruction: each makes it several times as dear."""
    return sum(
        len(loop.instructions) < _ELECTION and any(map(_ELECTED.search, loop.instructions)) for loop in loops(listing)
    )


def instructions_a_stage(listing: str) -> dict[str, float]:
    """Instructions that a warp of each role issues for a pipeline stage, in its innermost loop."""
    result = {}
    # What marks a role, and what a stage has of which instruction: 4 multiplications, else a wait and an arrival.
    for role, opcode, counted, each in (
        ("load", r"UBLKCP\.S\.G", "SYNCS", 2),
        ("multiply", "UTCOMMA", "UTCOMMA", 4),
        ("gather", "LDGSTS", "SYNCS", 2),
    ):
        marked = [loop for loop in loops(listing) if loop.count(opcode) and loop.count(counted) >= each]
        if marked:
            inner = min(marked, key=lambda loop: len(loop.instructions))
            result[role] = len(inner.instructions) * each / inner.count(counted)
    return result
