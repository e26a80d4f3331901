"""The CPU backend against the float64 oracle, for every variant of the kernel that this machine can run."""

from __future__ import annotations

import dataclasses
import threading

import cpu_variants
import pytest
import torch
from moe_cases import Batch, random_batch, random_map, random_weights
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import metrics

# Rounding the output to bfloat16 alone gives 0.0017. A W4A4 rounding decision that float32 makes otherwise than float64
# moves one activation by a step of E2M1.
TOLERANCE = {"w4a16": 0.006, "w4a4": 0.03}
ROW_TOLERANCE = {"w4a16": 0.012, "w4a4": 0.15}
LIMIT = 10.0

# 208 and 336: neither whole chunks (128 or 64) nor whole row blocks. 16: less than a chunk.
SHAPES = [(64, 48), (208, 336), (16, 16), (512, 144)]
# 1 to 6 tokens an expert are fused with decoding, more go through scratch.
TOKENS = [1, 2, 5, 9, 16, 43]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of an oversubscribed machine wait for each other; their number has a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def geometry(hidden: int = 64, intermediate: int = 48, experts: int = 8, top_k: int = 3) -> MoEGeometry:
    return MoEGeometry(experts, experts, top_k, hidden, intermediate, LIMIT)


def run(backend: CpuBackend, batch: Batch, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """Forward into poisoned memory."""
    out = torch.full_like(batch.x, torch.nan)
    workspace = torch.full((backend.workspace_bytes(len(batch.x)),), 0xFF, dtype=torch.uint8)
    backend.forward(*batch, expert_map, out, workspace)
    return out


def check(out: torch.Tensor, expected: torch.Tensor, precision: str = "w4a16") -> None:
    assert metrics.relative_l2(out, expected) <= TOLERANCE[precision]
    assert metrics.worst_row(out, expected)[1] <= ROW_TOLERANCE[precision]


def prepared(variant: str, g: MoEGeometry, weights: ExpertWeights, precision: str | None = None) -> CpuBackend:
    made = cpu_variants.backend(variant, g, precision)
    made.prepare(weights)
    return made


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_oracle(shape, precision, rng):
    g = geometry(*shape)
    weights = random_weights(g, rng)
    backends = {variant: prepared(variant, g, weights, precision) for variant in cpu_variants.VARIANTS}
    for tokens in TOKENS:
        batch = random_batch(g, tokens, rng)
        expected = moe_oracle(weights, *batch, None, LIMIT, precision)
        for variant, backend in backends.items():
            print(f"{variant=} {tokens=}")
            check(run(backend, batch), expected, precision)


@pytest.mark.parametrize("tokens", [30, 66])
@pytest.mark.parametrize("variant", [v for v in cpu_variants.VARIANTS if v != "torch"])
def test_rows_of_several_pieces(variant, tokens, rng):
    """Rows are decoded in pieces of 256 or 512; their sums stay in registers for few tokens, in memory for many."""
    g = geometry(hidden=656, intermediate=528, experts=2, top_k=1)
    weights = random_weights(g, rng)
    batch = random_batch(g, tokens, rng)
    batch = batch._replace(topk_ids=torch.zeros_like(batch.topk_ids))
    check(run(prepared(variant, g, weights), batch), moe_oracle(weights, *batch, None, LIMIT, "w4a16"))


@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_swiglu_limit(variant, limit, rng):
    g = dataclasses.replace(geometry(), swiglu_limit=limit)
    weights = random_weights(g, rng)
    batch = random_batch(g, 20, rng)
    out = run(prepared(variant, g, weights), batch)
    check(out, moe_oracle(weights, *batch, None, limit, "w4a16"))
    with pytest.raises(AssertionError):
        check(out, moe_oracle(weights, *batch, None, 1.0, "w4a16"))


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return packed << 4 | packed >> 4


def lose_block(scale: torch.Tensor) -> torch.Tensor:
    lost = scale.view(torch.uint8).clone()
    lost[:, :, 1] = 0
    return lost.view(torch.float8_e4m3fn)


WEIGHT_FAULTS = {
    "gate alpha for up": lambda w: {"w13_global": w.w13_global[:, :1].expand(-1, 2).contiguous()},
    "swapped nibbles": lambda w: {"w13": swap_nibbles(w.w13)},
    "swapped nibbles of down": lambda w: {"w2": swap_nibbles(w.w2)},
    "value-cast scales": lambda w: {"w13_scale": w.w13_scale.view(torch.uint8).float().to(torch.float8_e4m3fn)},
    "lost scale block": lambda w: {"w13_scale": lose_block(w.w13_scale)},
    "lost scale block of down": lambda w: {"w2_scale": lose_block(w.w2_scale)},
}
BATCH_FAULTS = {
    "squared routing weights": lambda b: b._replace(topk_weights=b.topk_weights.square()),
    "dropped slot": lambda b: b._replace(topk_ids=b.topk_ids.index_fill(1, torch.tensor([1]), -1)),
    "dropped slot of one token": lambda b: b._replace(topk_ids=b.topk_ids.index_fill(0, torch.tensor([1]), -1)),
}


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("fault", [*WEIGHT_FAULTS, *BATCH_FAULTS])
@pytest.mark.parametrize("variant", ["native", "torch"])
def test_planted_faults_are_found(variant, fault, precision, rng):
    g = geometry(256, 128)
    weights = random_weights(g, rng)
    batch = random_batch(g, 17, rng)
    expected = moe_oracle(weights, *batch, None, LIMIT, precision)
    check(run(prepared(variant, g, weights, precision), batch), expected, precision)
    faulty, given = weights, batch
    if fault in WEIGHT_FAULTS:
        faulty = dataclasses.replace(weights, **WEIGHT_FAULTS[fault](weights))
    else:
        given = BATCH_FAULTS[fault](batch)
    with pytest.raises(AssertionError):
        check(run(prepared(variant, g, faulty, precision), given), expected, precision)


def test_w4a4_needs_the_experts_own_input_scale(rng):
    g = geometry(256, 128)
    weights = random_weights(g, rng)
    batch = random_batch(g, 17, rng)
    expected = moe_oracle(weights, *batch, None, LIMIT, "w4a4")
    for name in ("w13_input_scale", "w2_input_scale"):
        value = getattr(weights, name)
        collapsed = dataclasses.replace(weights, **{name: value.amax().expand_as(value).contiguous()})
        with pytest.raises(AssertionError):
            check(run(prepared("native", g, collapsed, "w4a4"), batch), expected, "w4a4")


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_nan_stays_in_its_row(variant, precision, rng):
    g = geometry(208, 336)
    backend = prepared(variant, g, random_weights(g, rng), precision)
    for tokens in (4, 40):  # fused with decoding, and through scratch
        batch = random_batch(g, tokens, rng)
        clean = run(backend, batch)
        dirty = batch.x.clone()
        dirty[1, 17] = torch.nan
        out = run(backend, batch._replace(x=dirty))
        assert out[1].isnan().all()
        rest = torch.arange(tokens) != 1
        assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_many_tokens_on_one_expert(variant, rng):
    g = geometry(top_k=1)
    weights = random_weights(g, rng)
    batch = random_batch(g, 1100, rng)  # more than two blocks of 512
    batch.topk_ids.fill_(5)
    check(run(prepared(variant, g, weights), batch), moe_oracle(weights, *batch, None, LIMIT, "w4a16"))


def test_more_tokens_than_one_pass(rng):
    g = geometry()
    weights = random_weights(g, rng)
    backend = prepared("native", g, weights)
    batch = random_batch(g, 4100, rng)
    assert backend.workspace_bytes(4100) == backend.workspace_bytes(4096)
    check(run(backend, batch), moe_oracle(weights, *batch, None, LIMIT, "w4a16"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_expert_map_and_ids_without_an_expert(variant, dtype, rng):
    g = MoEGeometry(8, 3, 3, 64, 48, LIMIT)
    weights = random_weights(g, rng, [0, 1, 2])
    expert_map = random_map(g, rng)
    batch = random_batch(g, 30, rng)
    ids = batch.topk_ids.to(dtype)
    ids[3, 1], ids[4, 0], ids[5, 2] = -1, 8, torch.iinfo(torch.int32).max
    ids[6] = ids[6, 0]  # duplicates
    ids[7] = (expert_map < 0).nonzero()[0]  # no expert here
    batch = batch._replace(topk_ids=ids)
    out = run(prepared(variant, g, weights), batch, expert_map)
    check(out, moe_oracle(weights, *batch, expert_map, LIMIT, "w4a16"))
    assert (out[7] == 0).all()
    if dtype == torch.int64:
        batch = batch._replace(topk_ids=torch.full_like(ids, 2**32))  # 0 in its low half
        assert (run(prepared(variant, g, weights), batch, expert_map) == 0).all()


@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_nothing_to_do(variant, rng):
    g = geometry()
    backend = prepared(variant, g, random_weights(g, rng))
    assert backend.workspace_bytes(0) == 0
    empty = random_batch(g, 0, rng)
    backend.forward(*empty, None, torch.empty_like(empty.x), None)
    nowhere = random_batch(g, 9, rng)
    nowhere.topk_ids.fill_(-1)
    assert (run(backend, nowhere) == 0).all()


def test_strided_rows(rng):
    g = geometry()
    weights = random_weights(g, rng)
    batch = random_batch(g, 7, rng)
    wide, out = torch.zeros(7, 100).bfloat16(), torch.full((7, 90), 3.0).bfloat16()
    wide[:, :64] = batch.x
    backend = prepared("native", g, weights)
    workspace = torch.empty(backend.workspace_bytes(7), dtype=torch.uint8)
    backend.forward(wide[:, :64], batch.topk_ids, batch.topk_weights, None, out[:, :64], workspace)
    check(out[:, :64], moe_oracle(weights, *batch, None, LIMIT, "w4a16"))
    assert (out[:, 64:] == 3).all()


@pytest.mark.parametrize("variant", [v for v in cpu_variants.VARIANTS if v != "torch"])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_same_bits_for_any_number_of_threads(variant, precision, rng):
    g = geometry(208, 336)
    backend = prepared(variant, g, random_weights(g, rng), precision)
    for tokens in (1, 40):
        batch, outs = random_batch(g, tokens, rng), []
        for threads in (1, 2, 5, 1, 30):
            torch.set_num_threads(threads)
            outs.append(run(backend, batch))
        assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_calls_from_two_threads(rng):
    g = geometry(208, 336)
    weights = [random_weights(g, rng) for _ in range(2)]
    batches = [random_batch(g, 30, rng) for _ in range(2)]
    backends = [prepared("native", g, w) for w in weights]
    expected = [run(*pair) for pair in zip(backends, batches, strict=True)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(backends[i], batches[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_through_the_layer(rng):
    g = geometry()
    weights = random_weights(g, rng)
    batch = random_batch(g, 11, rng)
    check(MoELayer(g, weights, CpuBackend(g))(*batch), moe_oracle(weights, *batch, None, LIMIT, "w4a16"))


@pytest.mark.parametrize("shape", [(72, 48), (64, 40), (0, 48)])
def test_refuses_sizes_that_are_no_whole_blocks(shape):
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        CpuBackend(geometry(*shape))


def test_refuses_what_it_would_misread(rng):
    g = geometry()
    weights = random_weights(g, rng)
    batch = random_batch(g, 4, rng)
    backend = CpuBackend(g)
    out, workspace = torch.empty_like(batch.x), torch.empty(1 << 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="prepare"):
        backend.forward(*batch, None, out, workspace)
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        backend.prepare(dataclasses.replace(weights, w2=weights.w2.transpose(1, 2).contiguous().transpose(1, 2)))
    with pytest.raises(ValueError, match="the layer has"):
        CpuBackend(geometry(64, 64)).prepare(weights)
    backend.prepare(weights)
    for name, bad in (
        ("x", batch._replace(x=batch.x.float())),
        ("topk_ids", batch._replace(topk_ids=batch.topk_ids.short())),
        ("topk_ids", batch._replace(topk_ids=batch.topk_ids[:, :2])),
        ("topk_weights", batch._replace(topk_weights=batch.topk_weights.double())),
        ("topk_weights", batch._replace(topk_weights=batch.topk_weights.T.contiguous().T)),
    ):
        with pytest.raises(ValueError, match=name):
            backend.forward(*bad, None, out, workspace)
    with pytest.raises(ValueError, match="expert_map"):
        backend.forward(*batch, torch.zeros(7, dtype=torch.int32), out, workspace)
    with pytest.raises(ValueError, match="workspace"):
        backend.forward(*batch, None, out, workspace[:100])
    with pytest.raises(UnsupportedError, match="w4a8"):
        CpuBackend(g, "w4a8")
