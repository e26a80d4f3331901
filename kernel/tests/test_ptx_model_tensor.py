"""tcgen05 in the model: a hand-written NVFP4 multiplication, and what happens when one thing in it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_model import BarrierError, Deadlock, OutOfBounds, UndefinedRead, UnknownInstruction, formats
from ptx_model.programs import program, run
from ptx_model.testing import fresh_seed

M, N, K = 128, 64, 256
A_BYTES, B_BYTES, SA_BYTES, SB_BYTES = M * K // 2, N * K // 2, M * K // 16, 128 * K // 16
A_AT, B_AT, SA_AT, SB_AT = 1024, 1024 + A_BYTES, 1024 + A_BYTES + B_BYTES, 1024 + A_BYTES + B_BYTES + SA_BYTES
TOTAL = A_BYTES + B_BYTES + SA_BYTES + SB_BYTES
# 128-byte swizzle, stride 1024 between groups of 8 rows; no swizzle, stride 128, for scales; version 1.
OPERAND = 2 << 61 | 1 << 46 | (1024 >> 4) << 32 | 1 << 16
SCALES = 1 << 46 | (128 >> 4) << 32 | 1 << 16
SHAPE = 1 << 7 | 1 << 10 | (N >> 3) << 17 | (M >> 7) << 27

GEMM = """
 mov.b32 %r1, buffer; setp.eq.b32 %p1, %r0, 0; shr.u32 %r30, %r0, 5;
 @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r1+8], 1;
READY: setp.ne.b32 %p4, %r30, 0; @%p4 bra ALLOCATED;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+16], 128;
 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
ALLOCATED: bar.sync 0; ld.shared.b32 %r2, [%r1+16];
 @!%p1 bra EPILOGUE;
 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {transactions};
 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+1024], [%d1], {total}, [%r1];
 {wait}
 shr.u32 %r3, %r1, 4; cvt.u64.u32 %d2, %r3;
 add.s32 %r4, %r2, 64; add.s32 %r5, %r2, 80;
{steps}
 {commit}
EPILOGUE: mbarrier.try_wait.parity.shared.b64 %p3, [%r1+8], 0; @!%p3 bra EPILOGUE;
 shl.b32 %r6, %r30, 21; add.s32 %r6, %r6, %r2; mad.wide.u32 %d7, %r0, {row_bytes}, %d0; mov.b32 %r7, 0;
COLUMNS: tcgen05.ld.sync.aligned.32x32b.x4.b32 {{%r8, %r9, %r10, %r11}}, [%r6];
 {wait_ld}
 st.global.v4.b32 [%d7], {{%r8, %r9, %r10, %r11}};
 add.s32 %r6, %r6, 4; add.s64 %d7, %d7, 16; add.s32 %r7, %r7, 4; setp.lt.u32 %p5, %r7, {n}; @%p5 bra COLUMNS;
 bar.sync 0; @%p4 bra END; {dealloc} END:
"""
STEP = """
 add.s64 %d3, %d2, {scale_a}; add.s64 %d4, %d2, {scale_b}; add.s64 %d5, %d2, {a}; add.s64 %d6, %d2, {b};
 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r4], %d3; tcgen05.cp.cta_group::1.32x128b.warpx4 [%r5], %d4;
 setp.ne.b32 %p6, {step}, {first};
 tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%r2], %d5, %d6, {shape}, [%r4], [%r5], %p6;"""


def gemm(**changes) -> str:
    """The program, with parts replaced."""
    operand, scales = changes.pop("operand", OPERAND), changes.pop("scales", SCALES)
    first, shape = changes.pop("first", 0), changes.pop("shape", SHAPE)
    steps = "".join(
        STEP.format(
            step=k,
            first=first,
            shape=shape,
            a=operand + ((A_AT + 32 * k) >> 4),
            b=operand + ((B_AT + 32 * k) >> 4),
            scale_a=scales + ((SA_AT + 512 * k) >> 4),
            scale_b=scales + ((SB_AT + 512 * k) >> 4),
        )
        for k in range(K // 64)
    )
    parts = {
        "transactions": TOTAL,
        "total": TOTAL,
        "steps": steps,
        "row_bytes": N * 4,
        "n": N,
        "wait": "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra WAIT;",
        "wait_ld": "tcgen05.wait::ld.sync.aligned;",
        "commit": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+8];",
        "dealloc": "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 128;",
    }
    return program(GEMM.format(**(parts | changes)), 1024 + TOTAL)


def swizzle_operand(packed: np.ndarray) -> np.ndarray:
    """K-major rows of 128 bytes in the 128-byte swizzle: chunk c of row r goes to chunk c xor r % 8."""
    out = np.empty_like(packed)
    for row in range(len(packed)):
        for chunk in range(8):
            to = chunk ^ row % 8
            out[row, 16 * to : 16 * to + 16] = packed[row, 16 * chunk : 16 * chunk + 16]
    return out


def tile_scales(scale: np.ndarray) -> np.ndarray:
    """[rows up to 128, K / 16] in 512-byte tiles of 128 x 4."""
    out = np.zeros((scale.shape[1] // 4, 32, 4, 4), np.uint8)
    for row in range(len(scale)):
        out[:, row % 32, row // 32] = scale[row].reshape(-1, 4)
    return out.reshape(-1)


def operands():
    rng = np.random.default_rng(fresh_seed())
    a, b = rng.integers(0, 256, (M, K // 2), np.uint8), rng.integers(0, 256, (N, K // 2), np.uint8)
    sa, sb = rng.integers(32, 80, (M, K // 16), np.uint8), rng.integers(32, 80, (N, K // 16), np.uint8)
    return a, b, sa, sb


def image(a, b, sa, sb, tile=tile_scales) -> np.ndarray:
    scales = np.zeros(SB_BYTES, np.uint8)
    tiled = tile(sb)
    scales[: tiled.size] = tiled
    return np.concatenate([swizzle_operand(a).reshape(-1), swizzle_operand(b).reshape(-1), tile(sa), scales])


def reference(a, b, sa, sb) -> np.ndarray:
    left, right = (
        formats.unpack_e2m1(p).astype(np.float64) * np.repeat(formats.E4M3[s].astype(np.float64), 16, 1)
        for p, s in ((a, sa), (b, sb))
    )
    return left @ right.T


def multiply(data: np.ndarray, **changes) -> np.ndarray:
    out = np.zeros((M, N), np.float32)
    run(gemm(**changes), out, data, warps=4, seed=fresh_seed())
    return out


def relative(got, expected) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_block_scaled_multiplication():
    parts = operands()
    assert relative(multiply(image(*parts)), reference(*parts)) < 1e-6


@pytest.mark.parametrize(("bit", "sign"), [(13, -1), (14, -1)])
def test_negated_operand(bit, sign):
    parts = operands()
    assert relative(multiply(image(*parts), shape=SHAPE | 1 << bit), sign * reference(*parts)) < 1e-6


def test_unswizzled_scales_give_wrong_numbers():
    parts = operands()
    got = multiply(image(*parts, tile=lambda s: np.ascontiguousarray(s).reshape(-1)))
    assert relative(got, reference(*parts)) > 0.1


def test_unswizzled_operand_gives_wrong_numbers():
    a, b, sa, sb = operands()
    data = image(a, b, sa, sb)
    data[:A_BYTES] = a.reshape(-1)
    assert relative(multiply(data), reference(a, b, sa, sb)) > 0.1


def test_wrong_stride_in_the_descriptor():
    parts = operands()
    wrong = OPERAND ^ (1024 >> 4) << 32 | (512 >> 4) << 32
    assert relative(multiply(image(*parts), operand=wrong), reference(*parts)) > 0.1


def test_accumulator_that_is_never_cleared_is_poison():
    assert np.isnan(multiply(image(*operands()), first=99)).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"operand": OPERAND ^ 1 << 46},
        {"operand": OPERAND ^ 2 << 61},
        {"operand": OPERAND | 1 << 49},
        {"scales": SCALES | 2 << 61},
        {"shape": SHAPE | 1 << 23},
        {"shape": SHAPE | 1 << 31},
        {"shape": SHAPE | 1 << 15},
        {"shape": SHAPE ^ 1 << 27},
        {"shape": SHAPE ^ 1 << 7 | 2 << 7},
    ],
)
def test_wrong_descriptor_is_an_error(changes):
    with pytest.raises(UnknownInstruction, match="tcgen05"):
        multiply(image(*operands()), **changes)


def test_deleted_full_wait():
    """The copy may happen to come first; of several runs one sees that it need not."""
    with pytest.raises(UndefinedRead, match=r"tcgen05\.(cp|mma)"):
        for _ in range(20):
            multiply(image(*operands()), wait="")


@pytest.mark.parametrize("wrong", [TOTAL - 16, TOTAL + 16])
def test_wrong_transaction_count(wrong):
    with pytest.raises(Deadlock, match="try_wait"):
        multiply(image(*operands()), transactions=wrong)


def test_missing_commit():
    with pytest.raises(Deadlock, match="try_wait"):
        multiply(image(*operands()), commit="")


def test_registers_before_wait_ld_are_poison():
    assert np.isnan(multiply(image(*operands()), wait_ld="")).all()


def test_tmem_that_is_not_freed():
    with pytest.raises(BarrierError, match="128 TMEM columns"):
        multiply(image(*operands()), dealloc="")


def test_columns_outside_the_allocation():
    body = """mov.b32 %r1, buffer; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
 ld.shared.b32 %r2, [%r1]; tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r3, %r4}, [%r2+31];"""
    with pytest.raises(OutOfBounds, match=r"TMEM columns 31\.\.32"):
        run(program(body, 1024), np.zeros(4, np.uint8))


def test_another_warps_tmem_lanes():
    body = """mov.b32 %r1, buffer; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
 ld.shared.b32 %r2, [%r1]; add.s32 %r2, %r2, 2097152; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2];"""
    with pytest.raises(OutOfBounds, match="may read 0"):
        run(program(body, 1024), np.zeros(4, np.uint8))
