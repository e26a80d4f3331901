"""Random layers, batches and checkpoint tensors for the tests of ``nvfp4_megamoe.moe``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.routing import Slots, make_slots
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4

PREFIX = "layers.3.ffn.experts"
GEOMETRY = MoEGeometry(num_experts=8, num_local_experts=8, top_k=3, hidden=64, intermediate=48, swiglu_limit=10.0)


class Batch(NamedTuple):
    """One call's arguments: x, topk_ids, topk_weights."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def random_tensors(geometry: MoEGeometry, rng: torch.Generator, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of every expert; global and input scales differ between gate, up, down and experts."""
    tensors = {}
    for expert in range(geometry.num_experts):
        for projection in et.PROJECTIONS:
            rows, half = et.shape_of(projection, et.WEIGHT, geometry.hidden, geometry.intermediate)
            w = torch.randn((rows, half * 2), generator=rng) / (half * 2) ** 0.5 * 2
            slack = torch.exp(torch.rand((), generator=rng) * 2)
            q = nvfp4.quantize(w, nvfp4.global_scale_of(w) * slack)
            # Calibrated for activations of a few standard deviations, differently for each projection.
            input_scale = (3 + 3 * torch.rand((), generator=rng)) / (6 * 448)
            for kind, value in zip(et.DTYPES, (q.packed, q.block_scale, q.global_scale, input_scale), strict=True):
                tensors[f"{prefix}.{expert}.{projection}.{kind}"] = value
    return tensors


def random_weights(geometry: MoEGeometry, rng: torch.Generator, expert_ids: list[int] | None = None) -> ExpertWeights:
    ids = list(range(geometry.num_local_experts)) if expert_ids is None else expert_ids
    return ExpertWeights.from_checkpoint(random_tensors(geometry, rng), PREFIX, ids, geometry, "random.safetensors")


def random_batch(geometry: MoEGeometry, tokens: int, rng: torch.Generator) -> Batch:
    """Each token's experts differ from one another, and its weights sum to one."""
    x = torch.randn((tokens, geometry.hidden), generator=rng).bfloat16()
    scores = torch.rand((tokens, geometry.num_experts), generator=rng)
    values, ids = scores.topk(geometry.top_k)
    return Batch(x, ids.to(torch.int32), values / values.sum(-1, keepdim=True))


def random_map(geometry: MoEGeometry, rng: torch.Generator) -> torch.Tensor:
    """expert_map that places ``num_local_experts`` experts here, in random order."""
    here = torch.randperm(geometry.num_experts, generator=rng)[: geometry.num_local_experts]
    expert_map = torch.full((geometry.num_experts,), -1, dtype=torch.int32)
    expert_map[here] = torch.arange(geometry.num_local_experts, dtype=torch.int32)
    return expert_map


class Float32Backend:
    """W4A16 in plain float32, slot by slot: a right backend with the rounding noise of one, for the tests alone."""

    name = "float32"
    precision = "w4a16"

    def __init__(self, swiglu_limit: float | None, scratch: int = 0) -> None:
        self.swiglu_limit = swiglu_limit
        self.scratch = scratch

    @classmethod
    def unsupported_reason(cls, geometry: MoEGeometry, device: torch.device) -> str | None:
        return None

    def prepare(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def workspace_bytes(self, max_tokens: int) -> int:
        return self.scratch * max_tokens

    def slots(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> Slots:
        return make_slots(topk_ids, expert_map, self.weights.num_experts)

    def combine(self, topk_weights: torch.Tensor) -> torch.Tensor:
        return topk_weights

    def forward(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        w, top_k = self.weights, topk_ids.shape[1]
        order, offsets = self.slots(topk_ids, expert_map)
        total = torch.zeros(x.shape)
        for e in range(w.num_experts):
            for slot in order[offsets[e] : offsets[e + 1]].tolist():
                token, k = divmod(slot, top_k)
                raw = nvfp4.dequantize(w.w13[e], w.w13_scale[e], torch.ones(())) @ x[token].float()
                gate, up = (raw.reshape(2, -1) * w.w13_global[e].unsqueeze(-1)).unbind()
                if self.swiglu_limit is not None:
                    gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
                h = (gate / (1 + torch.exp(-gate)) * up).bfloat16().float()
                y = nvfp4.dequantize(w.w2[e], w.w2_scale[e], torch.ones(())) @ h * w.w2_global[e]
                total[token] += self.combine(topk_weights)[token, k] * y
        out.copy_(total)
