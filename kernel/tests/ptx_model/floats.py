"""Floating-point arithmetic and conversions.

f32 results are those of IEEE single precision, with subnormals flushed where ``.ftz`` says so. fma is computed in
double precision and rounded once more, so that it may differ from a fused one in the last bit of rare ties. The
``.approx`` functions are the correctly rounded ones, moved by up to ``Machine.approximation_ulps`` units at random.
"""

from __future__ import annotations

import numpy as np

from .errors import UnknownInstruction
from .formats import E4M3, decode_bf16, encode_bf16, encode_e2m1, encode_e4m3
from .integers import elementwise
from .isa import expect_operands, instruction
from .operands import LANES, reader, writer
from .parser import Instruction, Program

_TINY = np.finfo(np.float32).tiny


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals to zero of the same sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def _fma(a, b, c):
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "div": np.divide}


@instruction(r"(?P<op>add|sub|mul|fma|div)(\.rn|\.full)?(?P<ftz>\.ftz)?\.f32")
def _arithmetic(ins: Instruction, match, program: Program):
    function, count = _ARITHMETIC[match["op"]], 3 if match["op"] == "fma" else 2
    if ".full" in ins.opcode and match["op"] != "div":
        raise UnknownInstruction(f"Not modelled, {ins}")
    if match["ftz"]:
        plain = function
        function = lambda *args: flush(plain(*(flush(arg) for arg in args)))  # noqa: E731
    return elementwise(ins, program, function, "f32", ["f32"] * count)


@instruction(r"(?P<op>add|sub|mul|fma)(\.rn)?(?P<ftz>\.ftz)?\.f32x2")
def _packed(ins: Instruction, match, program: Program):
    function, count = _ARITHMETIC[match["op"]], 3 if match["op"] == "fma" else 2

    def pairs(*args):
        values = [arg.view(np.float32) for arg in args]
        if match["ftz"]:
            return flush(function(*map(flush, values))).astype(np.float32).view(np.uint64)
        return function(*values).view(np.uint64)

    return elementwise(ins, program, pairs, "f32x2", ["f32x2"] * count)


@instruction(r"(?P<op>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?(?P<xorsign>\.xorsign)?(?P<abs>\.abs)?\.f32")
def _extremum(ins: Instruction, match, program: Program):
    """Two or three operands; without ``.NaN`` a number wins over NaN. -0 is less than +0."""
    if match["xorsign"]:
        raise UnknownInstruction(f"Not modelled, {ins}")
    expect_operands(ins, 3, 4)
    functions = {("min", True): np.minimum, ("min", False): np.fmin, ("max", True): np.maximum, ("max", False): np.fmax}
    pick = functions[match["op"], bool(match["nan"])]
    prefer = np.signbit if match["op"] == "min" else lambda x: ~np.signbit(x)

    def two(a, b):
        return np.where(a == b, np.where(prefer(a), a, b), pick(a, b))

    def extremum(*args):
        if match["ftz"]:
            args = [flush(arg) for arg in args]
        if match["abs"]:
            args = [np.abs(arg) for arg in args]
        out = two(args[0], args[1])
        return out if len(args) == 2 else two(out, args[2])

    return elementwise(ins, program, extremum, "f32")


@instruction(r"(?P<op>neg|abs)(?P<ftz>\.ftz)?\.f32")
def _sign(ins: Instruction, match, program: Program):
    function = np.negative if match["op"] == "neg" else np.abs
    return elementwise(ins, program, (lambda a: function(flush(a))) if match["ftz"] else function, "f32", ["f32"])


_APPROXIMATE = {
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


@instruction(r"(?P<op>rcp|ex2|lg2|rsqrt|sqrt|tanh)\.(?P<mode>approx|rn)(?P<ftz>\.ftz)?\.f32")
def _function(ins: Instruction, match, program: Program):
    """rcp and sqrt also in the correctly rounded form ``.rn``."""
    expect_operands(ins, 2)
    if match["mode"] == "rn" and match["op"] not in ("rcp", "sqrt"):
        raise UnknownInstruction(f"Not modelled, {ins}")
    function = _APPROXIMATE[match["op"]]
    read, write = reader(program, ins, ins.operands[1], "f32"), writer(program, ins, ins.operands[0], "f32")

    def execute(warp, mask):
        x = flush(read(warp)) if match["ftz"] else read(warp)
        out = function(x.astype(np.float64)).astype(np.float32)
        ulps = warp.machine.approximation_ulps
        if ulps and match["mode"] == "approx":
            step = warp.machine.noise.integers(-ulps, ulps + 1, LANES)
            moved = (out.view(np.int32) + step.astype(np.int32)).view(np.float32)
            usual = np.isfinite(out) & (np.abs(out) > 2 * _TINY) & np.isfinite(moved)
            out = np.where(usual, moved, out)
        write(warp, mask, flush(out) if match["ftz"] else out)

    return execute


@instruction(r"setp\.(?P<compare>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(\.(?P<join>and|or))?(\.ftz)?\.f32")
def _setp(ins: Instruction, match, program: Program):
    """Ordered comparisons are false for NaN, unordered (``u``) ones true."""
    name = match["compare"]
    base = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }.get(name[:2])

    def compare(a, b):
        if ".ftz" in ins.opcode:
            a, b = flush(a), flush(b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        return base(a, b) | unordered if name.endswith("u") else base(a, b) & ~unordered

    if not match["join"]:
        return elementwise(ins, program, compare, "f32", ["f32"] * 2, "pred")
    join = np.logical_and if match["join"] == "and" else np.logical_or
    return elementwise(ins, program, lambda a, b, c: join(compare(a, b), c), "f32", ["f32", "f32", "pred"], "pred")


@instruction(r"(?P<op>mul|add|sub|fma|max|min|abs)(\.rn)?(?P<nan>\.NaN)?\.bf16x2")
def _packed_bf16(ins: Instruction, match, program: Program):
    """One rounding to bfloat16 of the result in single precision (exact for one product or sum of bfloat16)."""
    op = match["op"]
    functions = _ARITHMETIC | {
        "abs": np.abs,
        "max": np.maximum if match["nan"] else np.fmax,
        "min": np.minimum if match["nan"] else np.fmin,
    }
    count = {"fma": 3, "abs": 1}.get(op, 2)

    def pairs(*args):
        values = [decode_bf16(np.ascontiguousarray(arg).view(np.uint16)) for arg in args]
        return encode_bf16(functions[op](*values)).view(np.uint32)

    return elementwise(ins, program, pairs, "bf16x2", ["bf16x2"] * count)


def _from_pair(ins: Instruction, program: Program, result: str, join):
    """cvt of two f32, the first to the upper half."""
    return elementwise(ins, program, join, result, ["f32", "f32"], result)


@instruction(r"cvt\.rn\.f16x2\.f32")
def _to_f16x2(ins: Instruction, match, program: Program):
    bits = lambda x: x.astype(np.float16).view(np.uint16).astype(np.uint32)  # noqa: E731
    return _from_pair(ins, program, "b32", lambda a, b: bits(a) << np.uint32(16) | bits(b))


@instruction(r"cvt\.rn\.bf16x2\.f32")
def _to_bf16x2(ins: Instruction, match, program: Program):
    bits = lambda x: encode_bf16(x).astype(np.uint32)  # noqa: E731
    return _from_pair(ins, program, "b32", lambda a, b: bits(a) << np.uint32(16) | bits(b))


@instruction(r"cvt\.rn\.bf16\.f32")
def _to_bf16(ins: Instruction, match, program: Program):
    return elementwise(ins, program, encode_bf16, "b16", ["f32"], "b16")


@instruction(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
def _to_e4m3x2(ins: Instruction, match, program: Program):
    bits = lambda x: encode_e4m3(x).astype(np.uint16)  # noqa: E731
    return _from_pair(ins, program, "b16", lambda a, b: bits(a) << np.uint16(8) | bits(b))


@instruction(r"cvt\.rn\.satfinite\.e2m1x2\.f32")
def _to_e2m1x2(ins: Instruction, match, program: Program):
    return _from_pair(ins, program, "b8", lambda a, b: encode_e2m1(a) << np.uint8(4) | encode_e2m1(b))


@instruction(r"cvt\.rn\.f16x2\.e4m3x2")
def _from_e4m3x2(ins: Instruction, match, program: Program):
    half = lambda bits: E4M3[bits & 255].astype(np.float16).view(np.uint16).astype(np.uint32)  # noqa: E731
    return elementwise(ins, program, lambda v: half(v >> 8) << np.uint32(16) | half(v), "b16", ["b16"], "b32")


@instruction(r"cvt\.f32\.(?P<from>f16|bf16)")
def _widen(ins: Instruction, match, program: Program):
    function = (lambda v: v.astype(np.float32)) if match["from"] == "f16" else decode_bf16
    return elementwise(ins, program, function, match["from"], [match["from"]], "f32")


@instruction(r"cvt\.rn\.f32\.(?P<from>[us](32|64))")
def _from_integer(ins: Instruction, match, program: Program):
    return elementwise(ins, program, lambda v: v.astype(np.float32), match["from"], [match["from"]], "f32")


@instruction(r"cvt\.(?P<round>rzi|rni|rmi|rpi)(\.ftz)?\.(?P<to>[us](32|64))\.f32")
def _to_integer(ins: Instruction, match, program: Program):
    """Saturating; NaN becomes zero."""
    function = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[match["round"]]
    limits = np.iinfo(np.dtype({"u": "u", "s": "i"}[match["to"][0]] + str(int(match["to"][1:]) // 8)))

    def convert(x):
        whole = function(np.nan_to_num(x.astype(np.float64), nan=0.0))
        clipped = [int(min(max(value, limits.min), limits.max)) for value in whole]
        return np.array(clipped, limits.dtype)

    return elementwise(ins, program, convert, match["to"], ["f32"], match["to"])
