"""Memory, copies and barriers of the model: right programs give right numbers, wrong ones are reported."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_model import BarrierError, Deadlock, OutOfBounds, ProxyError, UndefinedRead, formats
from ptx_model.programs import program, run
from ptx_model.testing import fresh_seed

# One lane initialises a barrier at buffer+0; a bulk copy brings 512 bytes to buffer+1024; every lane reads its word.
BULK = """
 mov.b32 %r1, buffer; setp.eq.b32 %p1, %r0, 0;
 @%p1 mbarrier.init.shared.b64 [%r1], 1;
 bar.sync 0;
 @!%p1 bra WAIT;
 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {expected};
 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+1024], [%d1], 512, [%r1];
WAIT:
 {wait}
 mad.lo.u32 %r2, %r0, 4, %r1; ld.shared.b32 %r3, [%r2+1024];
 mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r3;
"""
SPIN = "mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra WAIT;"


def source() -> np.ndarray:
    return np.random.default_rng(fresh_seed()).integers(0, 2**32, 128, dtype=np.uint32)


def test_bulk_load_arrives_with_its_bytes():
    data, out = source(), np.zeros(32, np.uint32)
    run(program(BULK.format(expected=512, wait=SPIN), 2048), out, data)
    assert (out == data[:32]).all()


def test_deleted_wait_is_an_undefined_read():
    with pytest.raises(UndefinedRead, match=r"still being written|never written.*ld\.shared"):
        for seed in range(20):
            run(program(BULK.format(expected=512, wait=""), 2048), np.zeros(32, np.uint32), source(), seed=seed)


def test_deleted_wait_reads_poison_where_undefined_reads_are_allowed():
    data, outs = source(), []
    for seed in range(20):
        outs.append(np.zeros(32, np.uint32))
        run(program(BULK.format(expected=512, wait=""), 2048), outs[-1], data, strict=False, seed=seed)
    assert (np.array(outs) == 0xA5A5A5A5).any()


@pytest.mark.parametrize("expected", [496, 528])
def test_wrong_transaction_count_is_a_deadlock_that_names_the_wait(expected):
    with pytest.raises(Deadlock, match="try_wait"):
        run(program(BULK.format(expected=expected, wait=SPIN), 2048), np.zeros(32, np.uint32), source())


def test_too_many_arrivals():
    body = """mov.b32 %r1, buffer; setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 40; bar.sync 0;
 mbarrier.arrive.shared.b64 _, [%r1], 3;"""
    with pytest.raises(BarrierError, match=r"40 arrivals a phase and got more.*mbarrier\.arrive"):
        run(program(body, 1024), np.zeros(4, np.uint8))


def test_uninitialised_barrier():
    with pytest.raises(BarrierError, match="no mbarrier"):
        run(program("mov.b32 %r1, buffer; mbarrier.arrive.shared.b64 _, [%r1];", 1024), np.zeros(4, np.uint8))


def test_lost_arrival_is_a_deadlock():
    body = """mov.b32 %r1, buffer; setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 2; bar.sync 0;
 @%p1 mbarrier.arrive.shared.b64 _, [%r1];
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra W;"""
    with pytest.raises(Deadlock, match="warp 0"):
        run(program(body, 1024), np.zeros(4, np.uint8))


def test_named_barrier_with_a_missing_warp_is_a_deadlock():
    with pytest.raises(Deadlock, match=r"bar\.sync 1, 96"):
        run(program("bar.sync 1, 96;"), np.zeros(4, np.uint8), warps=2)


@pytest.mark.parametrize(
    "body",
    [
        "st.global.b32 [%d0+128], %r0;",
        "ld.global.b32 %r1, [%d1+16];",
        "ld.global.b32 %r1, [%d1+2];",
        "mov.b32 %r1, buffer; st.shared.b32 [%r1+1024], %r0;",
        "mov.b32 %r1, buffer; ld.shared.v2.b32 {%r2, %r3}, [%r1+4];",
    ],
)
def test_out_of_bounds_or_misaligned(body):
    with pytest.raises(OutOfBounds, match="line"):
        run(program(body, 1024), np.zeros(128, np.uint8))


def test_vector_and_narrow_accesses():
    body = """mad.wide.u32 %d2, %r0, 16, %d1; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2];
 ld.global.s8 %r5, [%d2]; ld.global.u16 %r6, [%d2+2]; mad.wide.u32 %d3, %r0, 16, %d0;
 st.global.v4.b32 [%d3], {%r5, %r6, %r3, %r4};"""
    data = np.random.default_rng(fresh_seed()).integers(0, 2**32, (32, 4), dtype=np.uint32)
    out = np.zeros((32, 4), np.uint32)
    run(program(body), out, data)
    low = data[:, 0]
    assert (out[:, 0] == (low & 255).astype(np.uint8).astype(np.int8).astype(np.int32).astype(np.uint32)).all()
    assert (out[:, 1] == low >> 16).all()
    assert (out[:, 2:] == data[:, 2:]).all()


def test_atomic_add_counts_every_lane():
    out, got = np.zeros(1, np.uint32), "atom.global.add.u32 %r1, [%d0], 3;"
    run(program(got), out, warps=4)
    assert out[0] == 3 * 128


# Every lane copies 16 bytes, the second half of the lanes only 4 of them.
GATHER = """mov.b32 %r1, buffer; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d2, %r0, 16, %d1;
 setp.lt.u32 %p1, %r0, 16; selp.b32 %r3, 16, 4, %p1;
 cp.async.cg.shared.global [%r2], [%d2], 16, %r3;
 {wait}
 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; mad.wide.u32 %d3, %r0, 16, %d0;
 st.global.v4.b32 [%d3], {{%r4, %r5, %r6, %r7}};"""


def test_cp_async_fills_with_zeros():
    data = np.random.default_rng(fresh_seed()).integers(0, 2**32, (32, 4), dtype=np.uint32)
    out = np.ones((32, 4), np.uint32)
    run(program(GATHER.format(wait="cp.async.commit_group; cp.async.wait_group 0;"), 1024), out, data)
    expected = data.copy()
    expected[16:, 1:] = 0
    assert (out == expected).all()


def test_cp_async_group_that_is_not_waited_for():
    with pytest.raises(UndefinedRead):
        for seed in range(20):
            run(
                program(GATHER.format(wait="cp.async.commit_group; cp.async.wait_group 1;"), 1024),
                np.zeros((32, 4), np.uint32),
                np.zeros((32, 4), np.uint32),
                seed=seed,
            )


# Every lane writes 16 bytes to shared memory, and stores or adds them to global memory in bulk.
STORE = """mov.b32 %r1, buffer; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d2, %r0, 16, %d1;
 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d2]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
 {fence} mad.wide.u32 %d3, %r0, {stride}, %d0;
 {copy} [%d3], [%r2], 16; cp.async.bulk.commit_group; {wait}"""
PLAIN = "cp.async.bulk.global.shared::cta.bulk_group"
FENCE, READ = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"


def test_bulk_store():
    data = np.random.default_rng(fresh_seed()).integers(0, 2**32, (32, 4), dtype=np.uint32)
    out = np.zeros((32, 4), np.uint32)
    run(program(STORE.format(fence=FENCE, stride=16, copy=PLAIN, wait=READ), 1024), out, data)
    assert (out == data).all()


def test_bulk_store_without_proxy_fence():
    with pytest.raises(ProxyError, match="without fence"):
        run(
            program(STORE.format(fence="", stride=16, copy=PLAIN, wait=READ), 1024),
            np.zeros((32, 4), np.uint32),
            np.zeros((32, 4), np.uint32),
        )


def test_exit_while_a_bulk_store_reads():
    with pytest.raises(OutOfBounds, match="exits while"):
        run(
            program(STORE.format(fence=FENCE, stride=16, copy=PLAIN, wait=""), 1024),
            np.zeros((32, 4), np.uint32),
            np.zeros((32, 4), np.uint32),
        )


def test_bulk_reduction_adds_in_bfloat16():
    data = np.random.default_rng(fresh_seed()).integers(1, 3, (32, 8)).astype(np.float32)
    out = np.zeros(8, np.uint16)
    copy = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16"
    run(program(STORE.format(fence=FENCE, stride=0, copy=copy, wait=READ), 1024), out, formats.encode_bf16(data))
    assert (formats.decode_bf16(out) == data.sum(0)).all()


def test_cluster_barrier_and_remote_arrival():
    """Block 1 arrives at block 0's barrier; block 0 waits for 32 arrivals, then stores."""
    body = """mov.b32 %r1, buffer; mov.b32 %r2, %cluster_ctarank; setp.eq.b32 %p1, %r0, 0; setp.eq.b32 %p3, %r2, 1;
 @%p1 mbarrier.init.shared.b64 [%r1], 32; fence.mbarrier_init.release.cluster;
 barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
 @!%p3 bra W; mapa.shared::cluster.u32 %r3, %r1, 0;
 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3]; bra END;
W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra W;
 mad.wide.u32 %d2, %r0, 4, %d0; mov.b32 %r4, 9; st.global.b32 [%d2], %r4;
END: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"""
    out = np.zeros(32, np.uint32)
    run(program(body, 1024), out, cluster=2)
    assert (out == 9).all()


REMOTE = """mov.b32 %r1, buffer; mov.b32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1;
 mad.lo.u32 %r4, %r0, 4, %r1; mad.lo.u32 %r5, %r2, 100, %r0; st.shared.b32 [%r4], %r5;
 {barrier}
 mapa.shared::cluster.u32 %r6, %r4, %r3; ld.shared{window}.b32 %r7, [%r6];
 mad.lo.u32 %r8, %r2, 32, %r0; mad.wide.u32 %d2, %r8, 4, %d0; st.global.b32 [%d2], %r7;
 barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"""
CLUSTER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def test_load_from_another_blocks_shared_memory():
    out = np.zeros((2, 32), np.uint32)
    run(program(REMOTE.format(barrier=CLUSTER, window="::cluster"), 1024), out, cluster=2)
    assert out.tolist() == [list(range(100, 132)), list(range(32))]


@pytest.mark.parametrize(
    ("barrier", "window", "error"),
    [(CLUSTER, "", OutOfBounds), (CLUSTER, "::cta", OutOfBounds), ("", "::cluster", UndefinedRead)],
)
def test_faulty_load_from_another_blocks_shared_memory(barrier, window, error):
    with pytest.raises(error, match=r"another block's|never written"):
        for seed in range(20):
            ptx = program(REMOTE.format(barrier=barrier, window=window), 1024)
            run(ptx, np.zeros((2, 32), np.uint32), cluster=2, seed=seed)


MULTICAST = """mov.b32 %r1, buffer; mov.b32 %r2, %cluster_ctarank; setp.eq.b32 %p1, %r0, 0; mov.b16 %h1, {mask};
 @%p1 mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster;
 barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
 @!%p1 bra W;
 mad.lo.u32 %r3, %r2, 128, %r1; mad.wide.u32 %d3, %r2, 128, %d1;
 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r3+512], [%d3], 128, [%r1], %h1;
 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra W;
 mad.lo.u32 %r4, %r0, 8, %r1; ld.shared.v2.b32 {{%r5, %r6}}, [%r4+512];
 mad.lo.u32 %r7, %r2, 32, %r0; mad.wide.u32 %d2, %r7, 8, %d0; st.global.v2.b32 [%d2], {{%r5, %r6}};
 barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"""


def test_multicast_load_counts_at_the_barrier_of_every_block():
    """Each block brings half of the data to both, perhaps before the other one expects its bytes."""
    data = np.random.default_rng(fresh_seed()).integers(0, 2**32, 64, dtype=np.uint32)
    for seed in range(5):
        out = np.zeros((2, 64), np.uint32)
        run(program(MULTICAST.format(mask=3), 1024), out, data, cluster=2, seed=seed)
        assert (out == data).all()


def test_multicast_load_to_one_block_leaves_the_other_waiting():
    with pytest.raises(Deadlock):
        run(program(MULTICAST.format(mask=1), 1024), np.zeros((2, 64), np.uint32), np.zeros(64, np.uint32), cluster=2)


def test_same_seed_same_run():
    data = source()
    counts = [
        run(program(BULK.format(expected=512, wait=SPIN), 2048), np.zeros(32, np.uint32), data, seed=5).executed
        for _ in range(2)
    ]
    assert counts[0] == counts[1]


_LONG_WORK = "mov.b32 %r8, 0; WORK: add.s32 %r8, %r8, 1; setp.lt.s32 %p1, %r8, 500; @%p1 bra WORK;"


def test_some_warps_are_slow():
    """A warp with 1500 instructions to go can be ahead of one with ten, in some runs."""
    body = f"""setp.ge.u32 %p2, %r0, 32; @%p2 bra SHORT;
 {_LONG_WORK} mov.b32 %r3, 1; st.global.b32 [%d0+4], %r3; bra END;
SHORT: ld.global.b32 %r4, [%d0+4]; st.global.b32 [%d0], %r4;
END:"""
    found = []
    for seed in range(40):
        out = np.zeros(2, np.uint32)
        run(program(body), out, warps=2, seed=seed)
        found.append(int(out[0]))
    assert 2 <= sum(found) <= 20


def test_some_copies_are_late():
    """A copy that is not waited for is still under way after 1500 instructions, in some runs."""
    body = f"""mov.b32 %r2, buffer; mad.lo.s32 %r2, %r0, 16, %r2; mad.wide.u32 %d2, %r0, 16, %d1;
 cp.async.cg.shared.global [%r2], [%d2], 16; {_LONG_WORK} ld.shared.b32 %r4, [%r2]; st.global.b32 [%d0], %r4;"""
    source, late = np.zeros(32 * 16, np.uint8), 0
    for seed in range(40):
        try:
            run(program(body, shared=512), np.zeros(1, np.uint32), source, seed=seed)
        except UndefinedRead:
            late += 1
    assert 2 <= late <= 20
