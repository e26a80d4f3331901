"""The PTX instructions that the kernels are written in, as typed functions of CuTe DSL values.

Addresses are integers: Int32 in shared memory, Int64 in global memory. Each function is one instruction, or the loop or
scope around it that PTX needs. Source: PTX ISA 9.4, by mnemonic.
"""

from __future__ import annotations

from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute import arch


def _run(code: str, *args, out: list | None = None):
    return arch.inline_ptx(code, write_only_types=out, read_only_args=list(args))


# Global memory


def load_i32(address: Int64) -> Int32:
    """A word that an earlier kernel wrote."""
    return _run("ld.global.b32 {$w0}, [{$r0}];", address, out=[Int32])


def load_i64(address: Int64) -> Int64:
    return _run("ld.global.b64 {$w0}, [{$r0}];", address, out=[Int64])


def load_f32(address: Int64) -> Float32:
    return _run("ld.global.b32 {$w0}, [{$r0}];", address, out=[Float32])


def load_4xi32(address: Int64) -> tuple:
    return _run("ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", address, out=[Int32] * 4)


def load_4xf32(address: Int64) -> tuple:
    return _run("ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", address, out=[Float32] * 4)


def stream_4xu32(address: Int64) -> tuple:
    """16 bytes that are read once."""
    return _run("ld.global.nc.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", address, out=[Uint32] * 4)


def store_u8(address: Int64, value: Uint32) -> None:
    _run("st.global.b8 [{$r0}], {$r1};", address, value)


def store_u32(address: Int64, value: Uint32) -> None:
    _run("st.global.b32 [{$r0}], {$r1};", address, value)


def store_i32(address: Int64, value: Int32) -> None:
    _run("st.global.b32 [{$r0}], {$r1};", address, value)


def store_2xi32(address: Int64, values) -> None:
    _run("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", address, *values)


def store_4xi32(address: Int64, values) -> None:
    _run("st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", address, *values)


def store_2xu32(address: Int64, values) -> None:
    _run("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", address, *values)


def store_4xu32(address: Int64, values) -> None:
    _run("st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", address, *values)


# Shared memory


def load_shared_i32(address: Int32) -> Int32:
    return _run("ld.shared.b32 {$w0}, [{$r0}];", address, out=[Int32])


def load_shared_4xf32(address: Int32) -> tuple:
    return _run("ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", address, out=[Float32] * 4)


def store_shared_f32(address: Int32, value: Float32) -> None:
    _run("st.shared.b32 [{$r0}], {$r1};", address, value)


def store_shared_bf16(address: Int32, value: Float32) -> None:
    """The value rounded to bfloat16, 2 bytes."""
    _run("{ .reg .b16 BITS; cvt.rn.bf16.f32 BITS, {$r1}; st.shared.b16 [{$r0}], BITS; }", address, value)


def store_shared_4xu32(address: Int32, values) -> None:
    _run("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", address, *values)


def store_shared_i32(address: Int32, value: Int32) -> None:
    _run("st.shared.b32 [{$r0}], {$r1};", address, value)


def load_cluster_i32(address: Int32) -> Int32:
    """A word of any block of the cluster, at an address that :func:`remote` gave."""
    return _run("ld.shared::cluster.b32 {$w0}, [{$r0}];", address, out=[Int32])


def remote(address: Int32, rank: Int32) -> Int32:
    """The same shared address in another block of the cluster."""
    return _run("mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", address, rank, out=[Int32])


def fence_async_shared() -> None:
    """Make this thread's writes to shared memory visible to the tensor core and to bulk copies."""
    _run("fence.proxy.async.shared::cta;")


# Asynchronous copies


def copy_16(target: Int32, source: Int64, size: Int32) -> None:
    """16 bytes to shared memory, of which ``size`` (0 or 16) are read and the rest are zeros; not through L1."""
    _run("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", target, source, size)


def copy_4(target: Int32, source: Int64, size: Int32) -> None:
    """4 bytes to shared memory, of which ``size`` (0 or 4) are read and the rest are zeros."""
    _run("cp.async.ca.shared.global [{$r0}], [{$r1}], 4, {$r2};", target, source, size)


def commit_copies() -> None:
    _run("cp.async.commit_group;")


def wait_copies(newer: int) -> None:
    """Wait until at most the ``newer`` latest groups of this thread's copies are under way."""
    _run(f"cp.async.wait_group {newer};")


def bulk_load(target: Int32, source: Int64, size: int, barrier: Int32) -> None:
    """``size`` contiguous bytes to shared memory; they count as transactions of the barrier."""
    _run(
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        target,
        source,
        Int32(size),
        barrier,
    )


def bulk_load_pair(target: Int32, source: Int64, size: int, barrier: Int32) -> None:
    """The same bytes to this place in both blocks of a pair; they count at the barrier of each."""
    _run(
        "{ .reg .b16 BOTH; mov.b16 BOTH, 3; "
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[{$r0}], [{$r1}], {$r2}, [{$r3}], BOTH; }",
        target,
        source,
        Int32(size),
        barrier,
    )


def bulk_store(target: Int64, source: Int32, size: int) -> None:
    _run("cp.async.bulk.global.shared::cta.bulk_group [{$r0}], [{$r1}], {$r2};", target, source, Int32(size))


def bulk_add_bf16(target: Int64, source: Int32, size: int) -> None:
    """Add bfloat16 values to global memory, atomically for each element, in no fixed order."""
    _run(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [{$r0}], [{$r1}], {$r2};",
        target,
        source,
        Int32(size),
    )


def commit_bulk() -> None:
    _run("cp.async.bulk.commit_group;")


def wait_bulk_read() -> None:
    """Wait until this thread's bulk stores have read shared memory."""
    _run("cp.async.bulk.wait_group.read 0;")


def wait_bulk() -> None:
    """Wait until this thread's bulk stores are complete in global memory."""
    _run("cp.async.bulk.wait_group 0;")


# Exchange within a warp; every lane takes part


def match_any(value: Int32) -> Uint32:
    """Mask of the lanes with the same value."""
    return _run("match.any.sync.b32 {$w0}, {$r0}, 0xffffffff;", value, out=[Uint32])


def shuffle_up(value: Int32, distance: int) -> Int32:
    """The value of the lane ``distance`` before, 0 where there is none."""
    return _run(
        "{ .reg .pred THERE; .reg .b32 VALUE; "
        f"shfl.sync.up.b32 VALUE|THERE, {{$r0}}, {distance}, 0, 0xffffffff; "
        "selp.b32 {$w0}, VALUE, 0, THERE; }",
        value,
        out=[Int32],
    )


def shuffle_from(value: Int32, lane: Int32) -> Int32:
    """The value of a lane."""
    return _run("shfl.sync.idx.b32 {$w0}, {$r0}, {$r1}, 31, 0xffffffff;", value, lane, out=[Int32])


def count_bits(mask: Uint32) -> Int32:
    return _run("popc.b32 {$w0}, {$r0};", mask, out=[Int32])


# Barriers


def init_barrier(barrier: Int32, arrivals: int | Int32) -> None:
    _run("mbarrier.init.shared::cta.b64 [{$r0}], {$r1};", barrier, Int32(arrivals))


def expect(barrier: Int32, size: int) -> None:
    """Arrive, and let the phase wait for ``size`` transaction bytes."""
    _run("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{$r0}], {$r1};", barrier, Int32(size))


def arrive(barrier: Int32) -> None:
    _run("mbarrier.arrive.release.cta.shared::cta.b64 _, [{$r0}];", barrier)


def arrive_remote(barrier: Int32) -> None:
    """Arrive at a barrier of another block of the cluster."""
    _run("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{$r0}];", barrier)


def wait(barrier: Int32, parity: Int32, scope: str = "cta") -> None:
    """Wait until the phase of this parity is complete."""
    _run(
        "{ .reg .pred DONE; AGAIN: mbarrier.try_wait.parity.acquire."
        + scope
        + ".shared::cta.b64 DONE, [{$r0}], {$r1}; @DONE bra PAST; bra AGAIN; PAST: }",
        barrier,
        parity,
    )


# Tensor memory and tensor core


def allocate_tmem(target: Int32, columns: int, group: int) -> None:
    """Allocate columns and write their address to shared memory; by one whole warp, of each block of the group."""
    _run(f"tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [{{$r0}}], {{$r1}};", target, Int32(columns))
    _run(f"tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;")


def free_tmem(address: Int32, columns: int, group: int) -> None:
    _run(f"tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 {{$r0}}, {{$r1}};", address, Int32(columns))


def copy_scales(target: Int32, descriptor: Int64, group: int) -> None:
    """512 bytes of block scales to four TMEM columns, to every quarter of the lanes."""
    _run(f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [{{$r0}}], {{$r1}};", target, descriptor)


def multiply(target: Int32, a: Int64, b: Int64, shape: int, scale_a: Int32, scale_b: Int32, add, group: int) -> None:
    """NVFP4 K = 64 step: target (+)= (a * scale_a)(b * scale_b)^T, adding where ``add`` is not zero."""
    _run(
        "{ .reg .pred ADD; setp.ne.b32 ADD, {$r6}, 0; "
        f"tcgen05.mma.cta_group::{group}.kind::mxf4nvf4.block_scale.block16 "
        "[{$r0}], {$r1}, {$r2}, {$r3}, [{$r4}], [{$r5}], ADD; }",
        target,
        a,
        b,
        Uint32(shape),
        scale_a,
        scale_b,
        add,
    )


def commit(barrier: Int32) -> None:
    """Arrive at the barrier when this thread's tensor core work so far is complete."""
    _run("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [{$r0}];", barrier)


def commit_pair(barrier: Int32) -> None:
    """The same at the barriers of both blocks of a pair."""
    _run(
        "{ .reg .b16 BOTH; mov.b16 BOTH, 3; tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster"
        ".multicast::cluster.b64 [{$r0}], BOTH; }",
        barrier,
    )


def load_columns(address: Int32) -> tuple:
    """16 columns of this warp's TMEM lanes as float32; defined after :func:`wait_loads`."""
    names = ", ".join(f"{{$w{i}}}" for i in range(16))
    return _run(f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{names}}}, [{{$r0}}];", address, out=[Float32] * 16)


def wait_loads() -> None:
    _run("tcgen05.wait::ld.sync.aligned;")


def fence_before() -> None:
    _run("tcgen05.fence::before_thread_sync;")


def fence_after() -> None:
    _run("tcgen05.fence::after_thread_sync;")


# Between the lanes of a warp


def other_half(value: Float32) -> Float32:
    """The value of the lane 16 further, or 16 before."""
    return _run("shfl.sync.bfly.b32 {$w0}, {$r0}, 16, 0x1f, 0xffffffff;", value, out=[Float32])


def value_of_lane(value: Float32, lane: int) -> Float32:
    return _run(f"shfl.sync.idx.b32 {{$w0}}, {{$r0}}, {lane}, 0x1f, 0xffffffff;", value, out=[Float32])


# Arithmetic


def bf16_low(pair: Uint32) -> Float32:
    """The lower of two packed bfloat16."""
    return _run("shl.b32 {$w0}, {$r0}, 16;", pair, out=[Float32])


def bf16_high(pair: Uint32) -> Float32:
    return _run("and.b32 {$w0}, {$r0}, 0xffff0000;", pair, out=[Float32])


def absolute(x: Float32) -> Float32:
    return _run("abs.f32 {$w0}, {$r0};", x, out=[Float32])


def larger(a: Float32, b: Float32) -> Float32:
    """The larger; NaN if one is NaN."""
    return _run("max.NaN.f32 {$w0}, {$r0}, {$r1};", a, b, out=[Float32])


def smaller(a: Float32, b: Float32) -> Float32:
    return _run("min.NaN.f32 {$w0}, {$r0}, {$r1};", a, b, out=[Float32])


def product(a: Float32, b: Float32) -> Float32:
    """Rounded by itself: never fused with an addition."""
    return _run("mul.rn.f32 {$w0}, {$r0}, {$r1};", a, b, out=[Float32])


def exp2(x: Float32) -> Float32:
    return _run("ex2.approx.ftz.f32 {$w0}, {$r0};", x, out=[Float32])


def reciprocal(x: Float32) -> Float32:
    """Correctly rounded."""
    return _run("rcp.rn.f32 {$w0}, {$r0};", x, out=[Float32])


def fast_reciprocal(x: Float32) -> Float32:
    return _run("rcp.approx.ftz.f32 {$w0}, {$r0};", x, out=[Float32])


def encode_ue4m3(x: Float32) -> Uint32:
    """Bits of a non-negative value, in the low byte."""
    return _run(
        "{ .reg .b16 BITS; cvt.rn.satfinite.e4m3x2.f32 BITS, 0f00000000, {$r0}; cvt.u32.u16 {$w0}, BITS; }",
        x,
        out=[Uint32],
    )


def decode_ue4m3(bits: Uint32) -> Float32:
    """Value of the low byte."""
    return _run(
        "{ .reg .b16 BITS, LOW, HIGH; .reg .b32 BOTH; cvt.u16.u32 BITS, {$r0}; cvt.rn.f16x2.e4m3x2 BOTH, BITS; "
        "mov.b32 {LOW, HIGH}, BOTH; cvt.f32.f16 {$w0}, LOW; }",
        bits,
        out=[Float32],
    )


def encode_e2m1(values) -> Uint32:
    """Codes of 8 values, the first in the lowest nibble."""
    parts = "".join(f"cvt.rn.satfinite.e2m1x2.f32 B{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}}; " for i in range(4))
    code = "{ .reg .b8 B0, B1, B2, B3; " + parts + "mov.b32 {$w0}, {B0, B1, B2, B3}; }"
    return _run(code, *values, out=[Uint32])


def pack_bf16(low: Float32, high: Float32) -> Uint32:
    return _run("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", high, low, out=[Uint32])
