"""Operands: typed reads and masked writes of registers, immediates, special registers, symbols and addresses."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnknownInstruction

if TYPE_CHECKING:
    from .parser import Instruction, Program
    from .warp import Warp

LANES = 32
FULL = np.ones(LANES, bool)
FULL.flags.writeable = False
PARAM_BASE = 0x7000_0000_0000

# PTX type to (register class, numpy type of one lane); f32x2 lanes are pairs.
TYPES: dict[str, tuple[str, np.dtype]] = {
    "pred": ("pred", np.dtype(bool)),
    "b8": ("b8", np.dtype("u1")),
    **{t: ("b16", np.dtype(d)) for t, d in {"b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2"}.items()},
    **{t: ("b32", np.dtype(d)) for t, d in {"b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4"}.items()},
    **{t: ("b32", np.dtype("u4")) for t in ("f16x2", "bf16x2")},
    **{t: ("b64", np.dtype(d)) for t, d in {"b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8"}.items()},
    "f32x2": ("b64", np.dtype("u8")),
}

Read = Callable[["Warp"], np.ndarray]
Write = Callable[["Warp", np.ndarray, np.ndarray], None]
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_SPECIAL = re.compile(r"%(n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)\.[xyz]|%laneid|%cluster_n?ctarank|%warpid")


def reader(program: Program, ins: Instruction, text: str, kind: str) -> Read:
    """Read ``text`` as ``kind``: an array of 32 lanes, not to be written to.

    Raises:
        UnknownInstruction: the operand is not of the type's width, or of no known form.
    """
    register_class, dtype = TYPES[kind]
    key = dtype.char
    if text in program.registers:
        declared, index = program.registers[text]
        if declared != register_class:
            raise UnknownInstruction(f"Operand {text} is {declared}, the type is .{kind}, {ins}")
        return lambda warp: warp.registers[key][index]
    if _SPECIAL.fullmatch(text):
        if register_class != "b32":
            raise UnknownInstruction(f"Special register {text} as .{kind}, {ins}")
        return lambda warp: warp.special[text].view(dtype)
    constant = _constant(program, text, kind)
    if constant is not None:
        return lambda warp: constant
    if text in program.shared:
        offset = program.shared[text]
        return lambda warp: np.full(LANES, warp.cta.window + offset, dtype)
    raise UnknownInstruction(f"Unknown operand {text}, {ins}")


def _constant(program: Program, text: str, kind: str) -> np.ndarray | None:
    dtype = TYPES[kind][1]
    if text in program.params:
        return np.full(LANES, PARAM_BASE + program.params[text][0], dtype)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.full(LANES, int(text[2:], 16), np.uint32).view(dtype)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.full(LANES, struct.unpack(">d", bytes.fromhex(text[2:]))[0], np.float64).view(dtype)
    if _INTEGER.fullmatch(text):
        value = int(text.rstrip("U"), 0)
        if kind == "pred":
            return np.full(LANES, bool(value))
        bits = dtype.itemsize * 8
        return np.full(LANES, value & ((1 << bits) - 1), f"u{dtype.itemsize}").view(dtype)
    return None


def writer(program: Program, ins: Instruction, text: str, kind: str) -> Write:
    """Write ``kind`` to a register, or nowhere for ``_``, in the lanes of the mask."""
    if text == "_":
        return lambda warp, mask, value: None
    register_class, dtype = TYPES[kind]
    key = dtype.char
    if text not in program.registers or program.registers[text][0] != register_class:
        raise UnknownInstruction(f"Destination {text} is not a register of type .{kind}, {ins}")
    index = program.registers[text][1]

    def write(warp: Warp, mask: np.ndarray, value: np.ndarray) -> None:
        if mask is FULL:
            warp.registers[key][index][...] = value
        else:
            np.copyto(warp.registers[key][index], value, where=mask, casting="unsafe")

    return write


def reader_any(program: Program, ins: Instruction, text: str, kind: str) -> Read:
    """Like :func:`reader`, but a wider register is truncated, as ld, st and cvt allow."""
    declared = program.registers.get(text, (TYPES[kind][0],))[0]
    if declared == TYPES[kind][0]:
        return reader(program, ins, text, kind)
    wide = reader(program, ins, text, {"b8": "b8", "b16": "u16", "b32": "u32", "b64": "u64"}[declared])
    narrow = TYPES[kind][1]
    return lambda warp: wide(warp).astype(f"u{narrow.itemsize}").view(narrow)


def address_reader(program: Program, ins: Instruction, text: str) -> Read:
    """uint64 address of ``[base]``, ``[base+offset]`` or ``[base+-offset]``; a shared address is 32 or 64 bits wide."""
    match = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if match is None:
        raise UnknownInstruction(f"Unknown address {text}, {ins}")
    base, offset = match[1], int(match[2] or 0)
    kind = "u64"
    if program.registers.get(base, ("b64",))[0] == "b32":
        kind = "u32"
    read = reader(program, ins, base, kind)
    if kind == "u64":
        wrapped = np.uint64(offset & 0xFFFF_FFFF_FFFF_FFFF)
        return (lambda warp: read(warp)) if offset == 0 else (lambda warp: read(warp) + wrapped)
    wrapped32 = np.uint32(offset & 0xFFFF_FFFF)
    return lambda warp: (read(warp) + wrapped32).astype(np.uint64)


def vector(text: str) -> list[str]:
    """Elements of ``{a, b}``, or the one operand."""
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]


def uniform(values: np.ndarray, mask: np.ndarray) -> int:
    """Value of the first active lane, for operands that one thread supplies."""
    return int(values[int(np.argmax(mask))])


def lanes(mask: np.ndarray) -> list[int]:
    """Active lanes, in order."""
    return [int(lane) for lane in np.nonzero(mask)[0]]
