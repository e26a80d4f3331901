"""The Hopper kernels on a Hopper GPU against the float64 oracle, on fresh inputs; planted faults must be caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from moe_cases import Batch, random_batch, random_map
from nvfp4_megamoe.backends.sm90 import backend, layout, library
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2, worst_row

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(
        not library.library_path().exists(), reason="python -m nvfp4_megamoe.backends.sm90.build has not run"
    ),
]

LIMIT = 0.006  # bf16 output and intermediate: 0.0026 to 0.003
WORST = 0.012
GEOMETRIES = [
    MoEGeometry(num_experts=8, num_local_experts=8, top_k=3, hidden=512, intermediate=256, swiglu_limit=10.0),
    MoEGeometry(num_experts=12, num_local_experts=5, top_k=4, hidden=640, intermediate=384, swiglu_limit=None),
]


def random_weights(geometry: MoEGeometry, rng: torch.Generator) -> ExpertWeights:
    """Weights on the GPU: all codes; zero and subnormal scales; globals that differ up to 10x between gate and up."""
    e, h, i = geometry.num_local_experts, geometry.hidden, geometry.intermediate

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8).cuda()

    def scales(*shape: int) -> torch.Tensor:
        bits = torch.randint(0x28, 0x50, shape, generator=rng, dtype=torch.uint8)
        kind = torch.randint(0, 64, shape, generator=rng)
        bits[kind == 0], bits[kind == 1] = 0, 3
        return bits.cuda().view(torch.float8_e4m3fn)

    def spread(*shape: int) -> torch.Tensor:
        return (10 ** torch.rand(shape, generator=rng) * 0.006).cuda()

    return ExpertWeights(
        w13=codes(e, 2 * i, h // 2), w13_scale=scales(e, 2 * i, h // 16),
        w13_global=spread(e, 2), w13_input_scale=spread(e, 2),
        w2=codes(e, h, i // 2), w2_scale=scales(e, h, i // 16), w2_global=spread(e), w2_input_scale=spread(e),
    )  # fmt: skip


def clone(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(**{f.name: getattr(weights, f.name).clone() for f in dataclasses.fields(weights)})


def prepared(geometry: MoEGeometry, weights: ExpertWeights) -> backend.Sm90Backend:
    own = backend.Sm90Backend(geometry)
    own.prepare(clone(weights))
    return own


def run(
    own: backend.Sm90Backend, batch: Batch, expert_map: torch.Tensor | None, variant: int | None = None
) -> torch.Tensor:
    """Output, with the output and the workspace poisoned before."""
    out = torch.full_like(batch.x, float("nan"))
    workspace = torch.full((own.workspace_bytes(len(batch.x)),), 0xFF, dtype=torch.uint8, device="cuda")
    own.forward(*batch, expert_map, out, workspace, variant=variant)
    return out


def on_gpu(batch: Batch) -> Batch:
    return Batch(*(t.cuda() for t in batch))


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_l2(out, expected) <= LIMIT and worst_row(out, expected)[1] <= WORST


def one_expert(batch: Batch) -> Batch:
    ids = torch.full_like(batch.topk_ids, -1)
    ids[:, 0] = 3
    return batch._replace(topk_ids=ids)


def few_experts(batch: Batch) -> Batch:
    return batch._replace(topk_ids=batch.topk_ids % 3)


def out_of_range(batch: Batch) -> Batch:
    ids = batch.topk_ids.clone()
    ids[::2, 0], ids[1::3, 1] = 10**6, -(10**6)
    return batch._replace(topk_ids=ids.long())


ROUTINGS: dict[str, Callable[[Batch], Batch]] = {
    "random": lambda b: b, "one expert": one_expert, "few experts": few_experts, "out of range": out_of_range,
}  # fmt: skip


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 7, 150, 333])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_against_the_oracle(rng: torch.Generator, geometry: MoEGeometry, tokens: int, routing: str) -> None:
    weights = random_weights(geometry, rng)
    own = prepared(geometry, weights)
    expert_map = random_map(geometry, rng).cuda() if geometry.num_local_experts < geometry.num_experts else None
    batch = ROUTINGS[routing](on_gpu(random_batch(geometry, tokens, rng)))
    expected = moe_oracle(weights, *batch, expert_map, geometry.swiglu_limit, "w4a16")
    for variant in (None, *backend.VARIANTS):
        out = run(own, batch, expert_map, variant)
        assert_close(out, expected)
        assert torch.equal(out, run(own, batch, expert_map, variant)), "two runs differ"


def test_no_local_slot_gives_zeros(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[0]
    own = prepared(geometry, random_weights(geometry, rng))
    batch = on_gpu(random_batch(geometry, 70, rng))
    for ids in (torch.full_like(batch.topk_ids, -1), torch.full_like(batch.topk_ids, 8)):
        for variant in backend.VARIANTS:
            assert run(own, batch._replace(topk_ids=ids), None, variant).eq(0).all()
    empty = Batch(*(t[:0] for t in batch))
    own.forward(*empty, None, empty.x, None)


def test_chunks_agree_with_one_launch(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES[0]
    own = prepared(geometry, random_weights(geometry, rng))
    batch = on_gpu(random_batch(geometry, 300, rng))
    whole = run(own, batch, None, 128)
    monkeypatch.setattr(backend, "MAX_CHUNK", 128)
    assert relative_l2(run(own, batch, None, 128), whole) < 1e-3


def test_nan_stays_in_its_row(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[0]
    own = prepared(geometry, random_weights(geometry, rng))
    batch = on_gpu(random_batch(geometry, 40, rng))
    clean = run(own, batch, None)
    batch.x[7, 5] = float("nan")
    out = run(own, batch, None)
    others = torch.arange(40, device="cuda") != 7
    assert out[7].isnan().any() and torch.equal(out[others], clean[others])


def test_graph_replay_follows_new_inputs(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[0]
    weights = random_weights(geometry, rng)
    own = prepared(geometry, weights)
    batch = on_gpu(random_batch(geometry, 90, rng))
    out = torch.empty_like(batch.x)
    workspace = torch.empty(own.workspace_bytes(90), dtype=torch.uint8, device="cuda")
    own.forward(*batch, None, out, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own.forward(*batch, None, out, workspace)
    for routing in ROUTINGS.values():
        new = routing(on_gpu(random_batch(geometry, 90, rng)))
        for old, value in zip(batch, new, strict=True):
            old.copy_(value.clamp(-1, 100) if value.dtype == torch.int64 else value)
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, moe_oracle(weights, *batch, None, geometry.swiglu_limit, "w4a16"))


def test_repacking_kernel_agrees_with_the_layout(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[1]
    weights = random_weights(geometry, rng)
    own = prepared(geometry, weights)
    for name, gate_up in (("w13", True), ("w2", False)):
        values, scales = getattr(weights, name).cpu(), getattr(weights, f"{name}_scale").cpu()
        for e in range(geometry.num_local_experts):
            packed = getattr(own.weights, name)[e].cpu().flatten()
            packed_scale = getattr(own.weights, f"{name}_scale")[e].cpu().view(torch.uint8).flatten()
            assert torch.equal(packed, layout.pack_values(values[e], scales[e], gate_up))
            assert torch.equal(packed_scale, layout.pack_scales(scales[e], gate_up))


def gate_alpha_for_up(weights: ExpertWeights, batch: Batch) -> Batch:
    weights.w13_global[:, 1] = weights.w13_global[:, 0]
    return batch


def swapped_nibbles(weights: ExpertWeights, batch: Batch) -> Batch:
    weights.w2.copy_((weights.w2 >> 4) | (weights.w2 << 4))
    return batch


def one_swapped_byte(weights: ExpertWeights, batch: Batch) -> Batch:
    row = weights.w13[:, 17]
    row.copy_((row >> 4) | (row << 4))
    return batch


def lost_scale_block(weights: ExpertWeights, batch: Batch) -> Batch:
    weights.w13_scale.view(torch.uint8)[:, :, 3] = 0
    return batch


def dropped_slot(weights: ExpertWeights, batch: Batch) -> Batch:
    ids = batch.topk_ids.clone()
    ids[11, 1] = -1
    return batch._replace(topk_ids=ids)


@pytest.mark.parametrize(
    "fault", [gate_alpha_for_up, swapped_nibbles, one_swapped_byte, lost_scale_block, dropped_slot]
)
def test_planted_faults_are_caught(rng: torch.Generator, fault: Callable) -> None:
    geometry = GEOMETRIES[0]
    weights = random_weights(geometry, rng)
    batch = on_gpu(random_batch(geometry, 64, rng))
    expected = moe_oracle(weights, *batch, None, geometry.swiglu_limit, "w4a16")
    broken = clone(weights)
    wrong = fault(broken, batch)
    with pytest.raises(AssertionError):
        assert_close(run(prepared(geometry, broken), wrong, None), expected)


def test_bad_arguments_are_refused(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[0]
    own = prepared(geometry, random_weights(geometry, rng))
    x, ids, w = on_gpu(random_batch(geometry, 16, rng))
    out, workspace = torch.empty_like(x), torch.empty(own.workspace_bytes(16), dtype=torch.uint8, device="cuda")
    good = (x, ids, w, None, out, workspace)
    own.forward(*good)
    wide = torch.empty(16, 1024, dtype=torch.bfloat16, device="cuda")
    for at, bad in ((0, x.float()), (0, wide[:, ::2]), (0, wide.flatten()[1 : 1 + x.numel()].view(16, 512)),
                    (1, ids.float()),
                    (4, out[:8]), (5, workspace[:100]), (5, None), (0, x.cpu())):  # fmt: skip
        with pytest.raises(UnsupportedError):
            own.forward(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="prepare"):
        backend.Sm90Backend(geometry).forward(*good)


def test_prepare_needs_one_experts_memory(rng: torch.Generator) -> None:
    geometry = GEOMETRIES[0]
    weights = random_weights(geometry, rng)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backend.Sm90Backend(geometry).prepare(weights)
    one_expert_bytes = (weights.w13[0].numel() + weights.w13_scale[0].numel()) * 1.1 + 4096
    assert torch.cuda.max_memory_allocated() - before <= one_expert_bytes
