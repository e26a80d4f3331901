"""Integer, logic, comparison, move and bit instructions. Source: PTX ISA, "Instruction Set", by mnemonic."""

from __future__ import annotations

import numpy as np

from .errors import UnknownInstruction
from .isa import expect_operands, instruction
from .operands import LANES, TYPES, reader, reader_any, vector, writer
from .parser import Instruction, Program

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def elementwise(
    ins: Instruction, program: Program, function, kind: str, sources: list[str] | None = None, result: str | None = None
):
    """d = function(a, b, ...), every source of type ``kind`` unless ``sources`` says otherwise."""
    kinds = sources or [kind] * (len(ins.operands) - 1)
    expect_operands(ins, len(kinds) + 1)
    reads = [reader(program, ins, text, k) for text, k in zip(ins.operands[1:], kinds, strict=True)]
    write = writer(program, ins, ins.operands[0], result or kind)
    if len(reads) == 1:
        (one,) = reads
        return lambda warp, mask: write(warp, mask, function(one(warp)))
    if len(reads) == 2:
        one, two = reads
        return lambda warp, mask: write(warp, mask, function(one(warp), two(warp)))
    return lambda warp, mask: write(warp, mask, function(*(read(warp) for read in reads)))


@instruction(r"(?P<op>add|sub|min|max)\.(?P<type>[us](16|32|64))")
def _binary(ins: Instruction, match, program: Program):
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[match["op"]]
    return elementwise(ins, program, function, match["type"], [match["type"]] * 2)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of the product of 32-bit integers, as int64 or uint64."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide)) >> wide(32)


def _wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = f"{a.dtype.kind}{a.dtype.itemsize * 2}"
    return a.astype(wide) * b.astype(wide)


@instruction(r"(?P<op>mul|mad)\.(?P<half>lo|hi|wide)\.(?P<type>[us](16|32|64))")
def _multiply(ins: Instruction, match, program: Program):
    kind, half = match["type"], match["half"]
    if (half == "hi" and kind not in ("u32", "s32")) or (half == "wide" and kind.endswith("64")):
        raise UnknownInstruction(f"Not modelled, {ins}")
    result = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[kind] if half == "wide" else kind
    dtype = TYPES[result][1]
    product = {"lo": np.multiply, "hi": lambda a, b: _high(a, b).astype(dtype), "wide": _wide}[half]
    if match["op"] == "mul":
        return elementwise(ins, program, product, kind, [kind] * 2, result)
    return elementwise(ins, program, lambda a, b, c: product(a, b) + c, kind, [kind, kind, result], result)


@instruction(r"(?P<op>div|rem)\.(?P<type>[us](16|32|64))")
def _divide(ins: Instruction, match, program: Program):
    """Truncating; by zero the result is unspecified (here all ones)."""
    dtype = TYPES[match["type"]][1]

    def divide(a, b):
        safe = np.where(b == 0, dtype.type(1), b)
        quotient = a // safe
        if dtype.kind == "i":
            quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
        out = quotient if match["op"] == "div" else a - quotient * safe
        return np.where(b == 0, np.array(-1).astype(dtype), out)

    return elementwise(ins, program, divide, match["type"], [match["type"]] * 2)


@instruction(r"(?P<op>neg|abs)\.(?P<type>s(16|32|64))")
def _sign(ins: Instruction, match, program: Program):
    return elementwise(ins, program, np.negative if match["op"] == "neg" else np.abs, match["type"], [match["type"]])


@instruction(r"(?P<op>and|or|xor)\.(?P<type>pred|b16|b32|b64)")
def _logic(ins: Instruction, match, program: Program):
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[match["op"]]
    return elementwise(ins, program, function, match["type"], [match["type"]] * 2)


@instruction(r"not\.(?P<type>pred|b16|b32|b64)")
def _not(ins: Instruction, match, program: Program):
    return elementwise(ins, program, np.invert, match["type"], [match["type"]])


@instruction(r"(?P<op>shl|shr)\.(?P<type>[bus](16|32|64))")
def _shift(ins: Instruction, match, program: Program):
    """Amounts above the width count as the width."""
    kind = match["type"]
    dtype = TYPES[kind][1]
    width = dtype.itemsize * 8

    def shift(value, amount):
        small = np.minimum(amount, width - 1).astype(dtype)
        if match["op"] == "shl":
            return np.where(amount >= width, dtype.type(0), value << small)
        shifted = value >> small
        return shifted if dtype.kind == "i" else np.where(amount >= width, dtype.type(0), shifted)

    if match["op"] == "shl" and kind[0] != "b":
        raise UnknownInstruction(f"Not modelled, {ins}")
    return elementwise(ins, program, shift, kind, [kind, "u32"])


@instruction(r"shf\.(?P<way>[lr])\.(?P<mode>wrap|clamp)\.b32")
def _funnel(ins: Instruction, match, program: Program):
    def funnel(low, high, amount):
        amount = amount & 31 if match["mode"] == "wrap" else np.minimum(amount, 32)
        value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = amount.astype(np.uint64)
        return (value >> by if match["way"] == "r" else value << by >> np.uint64(32)).astype(np.uint32)

    return elementwise(ins, program, funnel, "b32", ["b32", "b32", "u32"])


@instruction(r"lop3\.b32")
def _lop3(ins: Instruction, match, program: Program):
    expect_operands(ins, 5)
    table = int(ins.operands[4], 0)
    reads = [reader(program, ins, text, "b32") for text in ins.operands[1:4]]
    write = writer(program, ins, ins.operands[0], "b32")

    def execute(warp, mask):
        a, b, c = (read(warp) for read in reads)
        out = np.zeros(LANES, np.uint32)
        for entry in (i for i in range(8) if table >> i & 1):
            out |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
        write(warp, mask, out)

    return execute


@instruction(r"prmt\.b32")
def _prmt(ins: Instruction, match, program: Program):
    def permute(a, b, selector):
        source = np.stack(
            [a >> np.uint32(8 * i) & 255 for i in range(4)] + [b >> np.uint32(8 * i) & 255 for i in range(4)]
        )
        out = np.zeros(LANES, np.uint32)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & 15
            byte = np.take_along_axis(source, (nibble & 7)[None].astype(np.int64), 0)[0]
            byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
            out |= byte << np.uint32(8 * i)
        return out

    return elementwise(ins, program, permute, "b32", ["b32"] * 3)


@instruction(r"(?P<op>popc|clz)\.b32|(?P<brev>brev)\.b32")
def _count(ins: Instruction, match, program: Program):
    def bits(value):
        return np.unpackbits(value.astype(">u4").view(np.uint8).reshape(LANES, 4), axis=1)

    if match["brev"]:
        return elementwise(
            ins, program, lambda v: np.packbits(bits(v)[:, ::-1], axis=1).copy().view(">u4")[:, 0], "b32", ["b32"]
        )
    if match["op"] == "popc":
        return elementwise(ins, program, lambda v: bits(v).sum(1), "b32", ["b32"], "u32")
    return elementwise(ins, program, lambda v: np.where(v == 0, 32, bits(v).argmax(1)), "b32", ["b32"], "u32")


@instruction(r"bfe\.(?P<type>u32)")
def _bfe(ins: Instruction, match, program: Program):
    def extract(value, position, length):
        position, length = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        keep = (np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)
        return (value.astype(np.uint64) >> np.minimum(position, 63) & keep).astype(np.uint32)

    return elementwise(ins, program, extract, "u32", ["u32"] * 3)


@instruction(r"bfi\.b32")
def _bfi(ins: Instruction, match, program: Program):
    def insert(part, base, position, length):
        position, length = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        keep = ((np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)) << np.minimum(position, 32)
        value = part.astype(np.uint64) << np.minimum(position, 32)
        return ((base & ~keep) | (value & keep)).astype(np.uint32)

    return elementwise(ins, program, insert, "b32", ["b32", "b32", "u32", "u32"])


@instruction(r"setp\.(?P<compare>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(\.(?P<join>and|or|xor))?\.(?P<type>[bus](16|32|64))")
def _setp(ins: Instruction, match, program: Program):
    compare, kind = _COMPARE[match["compare"]], match["type"]
    if kind[0] == "b" and match["compare"] not in ("eq", "ne"):
        raise UnknownInstruction(f"Not modelled, {ins}")
    if not match["join"]:
        return elementwise(ins, program, compare, kind, [kind] * 2, "pred")
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[match["join"]]
    return elementwise(ins, program, lambda a, b, c: join(compare(a, b), c), kind, [kind, kind, "pred"], "pred")


@instruction(r"selp\.(?P<type>[bus](16|32|64)|f32|f64)")
def _selp(ins: Instruction, match, program: Program):
    kind = match["type"]
    return elementwise(ins, program, lambda a, b, p: np.where(p, a, b), kind, [kind, kind, "pred"])


@instruction(r"mov\.(?P<type>pred|[bus](16|32|64)|f32|f64)")
def _mov(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    kind = match["type"]
    if not any(text.startswith("{") for text in ins.operands):
        return elementwise(ins, program, lambda a: a, kind)
    wide = TYPES[kind][1].itemsize
    pack = ins.operands[1].startswith("{")
    parts, whole = (vector(ins.operands[pack]), ins.operands[1 - pack])
    element = {8: "b8", 16: "b16", 32: "b32"}.get(wide * 8 // len(parts))
    if element not in TYPES:
        raise UnknownInstruction(f"Not modelled, {ins}")
    step = np.dtype(f"u{wide // len(parts)}")
    if pack:
        reads, write = [reader(program, ins, part, element) for part in parts], writer(program, ins, whole, kind)
        return lambda warp, mask: write(
            warp, mask, np.stack([read(warp) for read in reads], 1).view(TYPES[kind][1])[:, 0]
        )
    read, writes = reader(program, ins, whole, kind), [writer(program, ins, part, element) for part in parts]

    def unpack(warp, mask):
        pieces = np.ascontiguousarray(read(warp)).view(step).reshape(LANES, len(parts)).copy()
        for i, write in enumerate(writes):
            write(warp, mask, pieces[:, i])

    return unpack


@instruction(r"cvt\.(?P<to>[us](8|16|32|64))\.(?P<from>[us](8|16|32|64))")
def _cvt_integer(ins: Instruction, match, program: Program):
    """Integer conversions: extend by the source's sign, keep the low bits."""
    expect_operands(ins, 2)
    size_in, size_out = int(match["from"][1:]) // 8, int(match["to"][1:]) // 8
    register_in, register_out = max(size_in, 2), max(size_out, 2)
    read = reader_any(program, ins, ins.operands[1], f"u{register_in * 8}")
    write = writer(program, ins, ins.operands[0], f"{match['to'][0]}{register_out * 8}")
    signs = {"u": "u", "s": "i"}
    narrow, out = np.dtype(f"{signs[match['from'][0]]}{size_in}"), np.dtype(f"{signs[match['to'][0]]}{size_out}")
    return lambda warp, mask: write(
        warp,
        mask,
        read(warp)
        .astype(f"u{size_in}")
        .view(narrow)
        .astype(out)
        .astype(TYPES[f"{match['to'][0]}{register_out * 8}"][1]),
    )
