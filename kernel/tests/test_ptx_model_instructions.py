"""Every arithmetic instruction of the model against its definition in the PTX ISA, computed apart."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from ptx_model import ModelError, UnknownInstruction, formats, parse
from ptx_model.programs import evaluate, program, run
from ptx_model.testing import fresh_seed

EDGES32 = [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xDEADBEEF]


def words(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    out = []
    for _ in range(count):
        values = rng.integers(0, 2**32, 32, dtype=np.uint32)
        values[:12] = rng.permutation(EDGES32)
        out.append(values)
    return out


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def trunc_div(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add.s32 {d}, {0}, {1}": lambda a, b: a + b,
    "sub.u32 {d}, {0}, {1}": lambda a, b: a - b,
    "mul.lo.s32 {d}, {0}, {1}": lambda a, b: a * b,
    "mul.hi.u32 {d}, {0}, {1}": lambda a, b: a * b >> 32,
    "mul.hi.s32 {d}, {0}, {1}": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 {d}, {0}, {1}, {2}": lambda a, b, c: a * b + c,
    "min.s32 {d}, {0}, {1}": lambda a, b: min(signed(a), signed(b)),
    "max.u32 {d}, {0}, {1}": lambda a, b: max(a, b),
    "div.s32 {d}, {0}, {1}": lambda a, b: trunc_div(signed(a), signed(b)) if b else 0xFFFFFFFF,
    "rem.s32 {d}, {0}, {1}": lambda a, b: signed(a) - trunc_div(signed(a), signed(b)) * signed(b) if b else 0xFFFFFFFF,
    "rem.u32 {d}, {0}, {1}": lambda a, b: a % b if b else 0xFFFFFFFF,
    "neg.s32 {d}, {0}": lambda a: -a,
    "and.b32 {d}, {0}, {1}": lambda a, b: a & b,
    "or.b32 {d}, {0}, {1}": lambda a, b: a | b,
    "xor.b32 {d}, {0}, {1}": lambda a, b: a ^ b,
    "not.b32 {d}, {0}": lambda a: ~a,
    "shl.b32 {d}, {0}, {1}": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 {d}, {0}, {1}": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 {d}, {0}, {1}": lambda a, b: signed(a) >> min(b, 31),
    "shf.r.wrap.b32 {d}, {0}, {1}, {2}": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32 {d}, {0}, {1}, {2}": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "popc.b32 {d}, {0}": lambda a: a.bit_count(),
    "clz.b32 {d}, {0}": lambda a: 32 - a.bit_length(),
    "brev.b32 {d}, {0}": lambda a: int(f"{a:032b}"[::-1], 2),
    "lop3.b32 {d}, {0}, {1}, {2}, 0x6a": lambda a, b, c: a & b ^ c,
    "bfe.u32 {d}, {0}, 5, 9": lambda a: a >> 5 & 511,
    "bfi.b32 {d}, {0}, {1}, 5, 9": lambda a, b: b & ~(511 << 5) | (a & 511) << 5,
    "prmt.b32 {d}, {0}, {1}, 0x7250": lambda a, b: (
        a & 255 | (b >> 8 & 255) << 8 | (a >> 16 & 255) << 16 | b >> 24 << 24
    ),
}


@pytest.mark.parametrize("text", INTEGER)
def test_integer(text):
    function = INTEGER[text]
    inputs = words(function.__code__.co_argcount)
    got = evaluate(text, "b32", *(("b32", values) for values in inputs))
    expected = [function(*(int(v) for v in lane)) & 0xFFFFFFFF for lane in zip(*inputs, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize(
    ("text", "sign"), [("mul.wide.s32 {d}, {0}, {1}", signed), ("mul.wide.u32 {d}, {0}, {1}", int)]
)
def test_wide_products(text, sign):
    a, b = words(2)
    got = evaluate(text, "b64", ("b32", a), ("b32", b))
    assert got.tolist() == [sign(int(x)) * sign(int(y)) & (2**64 - 1) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    ("kind", "low", "bits"), [("s64.s32", signed, 64), ("u64.u32", int, 64), ("s64.s16", None, 64)]
)
def test_integer_conversion_extends_by_the_sources_sign(kind, low, bits):
    (a,) = words(1)
    register = "b16" if kind.endswith("16") else "b32"
    values = a.astype(np.uint16) if register == "b16" else a
    convert = low or (lambda v: signed(v, 16))
    got = evaluate(f"cvt.{kind} {{d}}, {{0}}", "b64", (register, values))
    assert got.tolist() == [convert(int(v)) & (2**bits - 1) for v in values]


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_setp(compare, kind):
    a, b = words(2)
    b[:4] = a[:4]
    sign = signed if kind == "s32" else int
    operation = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}[
        compare
    ]
    got = evaluate(
        f"setp.{compare}.{kind} {{d}}, {{0}}, {{1}}"
        if compare in ("lt", "le", "gt", "ge")
        else f"setp.{compare}.b32 {{d}}, {{0}}, {{1}}",
        "pred",
        ("b32", a),
        ("b32", b),
    )
    assert got.tolist() == [getattr(sign(int(x)), operation)(sign(int(y))) for x, y in zip(a, b, strict=True)]


FLOATS = np.array(
    [0, -0.0, 1, -1, 1.5, 3e38, -3e38, 1e-40, -1e-40, np.inf, -np.inf, np.nan, 6.1e-5, 0.1, 448, 7], np.float32
)


def floats(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    return [np.concatenate([rng.permutation(FLOATS), rng.normal(0, 10, 16).astype(np.float32)]) for _ in range(count)]


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    got, expected = got.view(np.float32), np.asarray(expected, np.float32)
    zeros = np.signbit(got) == np.signbit(expected)
    return bool((((got == expected) & zeros) | (np.isnan(got) & np.isnan(expected))).all())


FLOAT = {
    "add.f32 {d}, {0}, {1}": lambda a, b: a + b,
    "sub.rn.f32 {d}, {0}, {1}": lambda a, b: a - b,
    "mul.f32 {d}, {0}, {1}": lambda a, b: a * b,
    "mul.rn.ftz.f32 {d}, {0}, {1}": lambda a, b: flushed(flushed(a) * flushed(b)),
    "fma.rn.f32 {d}, {0}, {1}, {2}": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "max.f32 {d}, {0}, {1}": np.fmax,
    "min.f32 {d}, {0}, {1}": np.fmin,
    "max.NaN.f32 {d}, {0}, {1}": np.maximum,
    "min.NaN.f32 {d}, {0}, {1}, {2}": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    "neg.f32 {d}, {0}": lambda a: -a,
    "abs.f32 {d}, {0}": np.abs,
    "rcp.rn.f32 {d}, {0}": lambda a: (1 / a.astype(np.float64)).astype(np.float32),
    "ex2.approx.ftz.f32 {d}, {0}": lambda a: flushed(np.exp2(flushed(a).astype(np.float64)).astype(np.float32)),
}


@pytest.mark.parametrize("text", FLOAT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float(text):
    function = FLOAT[text]
    inputs = floats(text.count("{") - 1)
    got = evaluate(text, "b32", *(("b32", values.view(np.uint32)) for values in inputs))
    expected = function(*inputs)
    if text.startswith(("max", "min")):
        # numpy does not order zeros; the ISA says -0 < +0.
        zero = (expected == 0) | (got.view(np.float32) == 0)
        assert (got.view(np.float32)[zero] == expected[zero]).all()
        got, expected = got[~zero], expected[~zero]
    assert same(got, expected)


def test_packed_float_pairs():
    a, b = (np.stack(floats(2), 1) for _ in range(2))
    got = evaluate("mul.rn.f32x2 {d}, {0}, {1}", "b64", *(("b64", x.copy().view(np.uint64)) for x in (a, b)))
    with np.errstate(all="ignore"):
        assert same(got.view(np.float32).reshape(32, 2).view(np.uint32), a * b)


def test_conversion_to_e2m1_takes_the_first_source_to_the_high_nibble():
    """Ties to even: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4; saturates at 6."""
    x = np.array(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.25, -0.26, -5.1, 1e9, 0, -0.0, 0.2500001, 2.4999], np.float32
    )
    codes = [0, 2, 2, 4, 4, 6, 6, 7, 8, 9, 15, 7, 0, 8, 1, 4]
    a = np.concatenate([x, x[::-1]])
    got = evaluate(
        "cvt.rn.satfinite.e2m1x2.f32 {d}, {0}, {1}",
        "b8",
        ("b32", a.view(np.uint32)),
        ("b32", a[::-1].copy().view(np.uint32)),
    )
    expected = np.array(codes + codes[::-1])
    assert got.tolist() == (expected << 4 | expected[::-1]).tolist()


def test_conversion_to_e4m3_matches_an_exhaustive_search():
    rng = np.random.default_rng(fresh_seed())
    x = np.concatenate([rng.normal(0, 100, 24), [448, 464, 1e9, 2**-10, 3 * 2**-10, 0, -0.0, 17]]).astype(np.float32)
    got = evaluate("cvt.rn.satfinite.e4m3x2.f32 {d}, {0}, {0}", "b16", ("b32", x.view(np.uint32)))
    table = [struct.unpack("<f", struct.pack("<f", float(v)))[0] for v in formats.E4M3[:127]]
    for value, bits in zip(x, got & 255, strict=True):
        size = min(abs(float(value)), 448.0)
        nearest = min(range(127), key=lambda code, size=size: (abs(table[code] - size), code % 2))
        assert bits == nearest | (128 if math.copysign(1, value) < 0 else 0)
    assert (got >> 8 == got & 255).all()


def test_conversion_to_bf16_rounds_to_even():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8] * 8, np.float32)
    got = evaluate("cvt.rn.bf16x2.f32 {d}, {0}, {1}", "b32", ("b32", x.view(np.uint32)), ("b32", x.view(np.uint32)))
    assert (got & 0xFFFF)[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]
    assert (got >> 16 == got & 0xFFFF).all()


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r0, %r0;",
        "add.s33 %r1, %r0, %r0;",
        "frobnicate.b32 %r1, %r0;",
        "mul.f32.rz %r1, %r0, %r0;",
        "ld.global.b32 %r1, [%d0], 4, 4;",
        "mov.b32 %r1, %clock;",
        "add.s32 %r1, %r0, %d0;",
        "cvt.rz.bf16.f32 %h1, %r0;",
        "mbarrier.try_wait.shared.b64 %p1, [%r0], %d0;",
        ".unheard_of %r1;",
        "bra NOWHERE;",
        "match.all.sync.b32 %r1|%p1, %r0, -1;",
        "match.any.sync.b64 %r1, %d0, -1;",
        "fma.rm.f32 %r1, %r0, %r0, %r0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %d0, %d1, %r2, %p1;",
        "setp.lt.b32 %p1, %r0, 4;",
    ],
)
def test_what_is_unknown_is_an_error(line):
    with pytest.raises(ModelError):
        run(program(line), np.zeros(128, np.uint8))


def test_two_kernels_are_refused():
    with pytest.raises(UnknownInstruction, match="exactly one"):
        parse(program("") + program(""))


def test_scoped_registers_and_labels_are_separate():
    body = """
 mov.b32 %r1, 0;
 { .reg .pred P1; .reg .b32 x;
 mov.b32 x, 5; setp.eq.b32 P1, x, 5; @P1 bra DONE; mov.b32 %r1, 100; DONE: add.s32 %r1, %r1, x; }
 { .reg .b32 x;
 mov.b32 x, 7; bra DONE; mov.b32 %r1, 100; DONE: add.s32 %r1, %r1, x; }
 mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r1;"""
    out = np.zeros(32, np.uint32)
    run(program(body), out)
    assert (out == 12).all()


def test_divergent_lanes_join_again():
    body = """
 and.b32 %r1, %r0, 3; mov.b32 %r2, 0; mov.b32 %r3, 0;
LOOP: setp.ge.u32 %p1, %r3, %r1; @%p1 bra OUT; add.s32 %r2, %r2, %r0; add.s32 %r3, %r3, 1; bra LOOP;
OUT: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r4;"""
    out = np.zeros(32, np.uint32)
    run(program(body), out)
    own = [lane * (lane & 3) for lane in range(32)]
    assert out.tolist() == [own[lane ^ 1] for lane in range(32)]


def partner(mode: str, lane: int, by: int) -> int:
    """Lane that shfl reads, outside 0 to 31 where there is none."""
    return {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": by}[mode]


@pytest.mark.parametrize(("mode", "clamp"), [("up", 0), ("down", 31), ("bfly", 31), ("idx", 31)])
@pytest.mark.parametrize("by", [1, 5, 16, 31])
def test_shuffle(mode, clamp, by):
    """A lane without a partner keeps its value, and the predicate says so."""
    (a,) = words(1)
    body = f"""mad.wide.u32 %d2, %r0, 4, %d1; ld.global.b32 %r1, [%d2];
 shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1; selp.b32 %r3, 1, 0, %p1;
 mad.wide.u32 %d3, %r0, 8, %d0; st.global.v2.b32 [%d3], {{%r2, %r3}};"""
    out = np.zeros((32, 2), np.uint32)
    run(program(body), out, a)
    for lane in range(32):
        source = partner(mode, lane, by)
        there = 0 <= source < 32
        assert out[lane].tolist() == [a[source if there else lane], there]


def test_bf16_through_shared_memory():
    """cvt.rn.bf16.f32 rounds to nearest, ties to even; 16-bit stores and loads move it."""
    x = np.random.default_rng(fresh_seed()).normal(size=32).astype(np.float32)
    x[:4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xFF800000], np.uint32).view(np.float32)
    body = """mad.wide.u32 %d2, %r0, 4, %d1; ld.global.b32 %r1, [%d2]; mov.b32 %r2, buffer;
 mad.lo.s32 %r3, %r0, 2, %r2; cvt.rn.bf16.f32 %h0, %r1; st.shared.b16 [%r3], %h0;
 ld.shared.b16 %h1, [%r3]; mad.wide.u32 %d3, %r0, 2, %d0; st.global.b16 [%d3], %h1;"""
    out = np.zeros(32, np.uint16)
    run(program(body, shared=64), out, x)
    assert out[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0xFF80]
    nearest = (x.view(np.uint32)[4:].astype(np.uint64) + 0x7FFF + (x.view(np.uint32)[4:] >> 16 & 1)) >> 16
    assert out[4:].tolist() == nearest.tolist()


def test_elect_chooses_one_lane_and_names_it_to_all():
    body = """elect.sync %r1|%p1, -1; selp.b32 %r2, 1, 0, %p1;
 mad.wide.u32 %d2, %r0, 8, %d0; st.global.v2.b32 [%d2], {%r1, %r2};"""
    out = np.zeros((32, 2), np.uint32)
    run(program(body), out)
    leader = int(out[0, 0])
    assert out.tolist() == [[leader, int(lane == leader)] for lane in range(32)]


def test_match_any():
    rng = np.random.default_rng(fresh_seed())
    a = rng.choice(np.array([0, 7, 2**32 - 1, 5], np.uint32), 32)
    got = evaluate("match.any.sync.b32 {d}, {0}, -1", "b32", ("b32", a))
    assert got.tolist() == [sum(1 << lane for lane in range(32) if a[lane] == value) for value in a]


def test_match_of_some_lanes_waits_for_all_of_them():
    """The even lanes match among themselves, wherever the odd ones are; a lane that is no member is an error."""
    body = """and.b32 %r1, %r0, 1; setp.eq.b32 %p1, %r1, 1; mov.b32 %r2, 0; @%p1 bra END;
 shr.u32 %r3, %r0, 4; match.any.sync.b32 %r2, %r3, {members};
END: mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r2;"""
    out = np.zeros(32, np.uint32)
    run(program(body.format(members="0x55555555")), out)
    assert out.tolist() == [0 if lane % 2 else 0x5555 << (16 * (lane // 16)) for lane in range(32)]
    with pytest.raises(UnknownInstruction, match="member mask"):
        run(program(body.format(members="0x55555554")), out)
