"""Layers, batches, routings and planted faults for the tests of the Hopper kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from moe_cases import Batch
from nvfp4_megamoe.backends.sm90 import backend, library
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(
        not library.library_path().exists(), reason="python -m nvfp4_megamoe.backends.sm90.build has not run"
    ),
]
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


def prepared(geometry: MoEGeometry, weights: ExpertWeights, precision: str = "exact") -> backend.Sm90Backend:
    own = backend.Sm90Backend(geometry, precision)
    own.prepare(clone(weights))
    return own


def run(own: backend.Sm90Backend, batch: Batch, expert_map: torch.Tensor | None, *variants: int | None) -> torch.Tensor:
    """Output, with the output and the workspace poisoned before."""
    out = torch.full_like(batch.x, float("nan"))
    workspace = torch.full((own.workspace_bytes(len(batch.x)),), 0xFF, dtype=torch.uint8, device="cuda")
    own.forward(*batch, expert_map, out, workspace, *variants)
    return out


def on_gpu(batch: Batch) -> Batch:
    return Batch(*(t.cuda() for t in batch))


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


def dropped_slots(weights: ExpertWeights, batch: Batch) -> Batch:
    """Of every eighth token the heaviest slot; a single one may be of an expert with a small global scale."""
    ids = batch.topk_ids.clone()
    heaviest = batch.topk_weights[::8].argmax(-1, keepdim=True)
    ids[::8] = ids[::8].scatter(1, heaviest, -1)
    return batch._replace(topk_ids=ids)


FAULTS = [gate_alpha_for_up, swapped_nibbles, one_swapped_byte, lost_scale_block, dropped_slots]
