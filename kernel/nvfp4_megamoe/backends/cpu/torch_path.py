"""The MoE layer in plain torch, for CPUs without a compiler: one touched expert is decoded at a time."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from nvfp4_megamoe.moe.routing import make_slots
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4

_ONE = torch.ones(())


def forward(
    weights: ExpertWeights,
    limit: float | None,
    quantize_activations: bool,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As ``Backend.forward``; float32 throughout, the global scales applied to the accumulators."""
    order, offsets = make_slots(topk_ids, expert_map, weights.num_experts)
    order, bounds = order.long(), offsets.tolist()
    flat_weights = topk_weights.reshape(-1, 1)
    total = torch.zeros(out.shape, dtype=torch.float32)
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        slots = order[begin:end]
        tokens = slots // topk_ids.shape[1]
        alphas, down_alpha = weights.w13_global[expert], weights.w2_global[expert]
        rows = x[tokens].float()
        if quantize_activations:
            scale = weights.w13_input_scale[expert].amax()
            rows, alphas = _quantized(rows, scale), alphas * scale
        gate_up = rows @ nvfp4.dequantize(weights.w13[expert], weights.w13_scale[expert], _ONE).T
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate * alphas[0], up * alphas[1]
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        rows = F.silu(gate) * up
        if quantize_activations:
            scale = weights.w2_input_scale[expert]
            rows, down_alpha = _quantized(rows, scale), down_alpha * scale
        else:
            rows = rows.bfloat16().float()
        down = rows @ nvfp4.dequantize(weights.w2[expert], weights.w2_scale[expert], _ONE).T
        total.index_add_(0, tokens, down * down_alpha * flat_weights[slots])
    out.copy_(total)


def _quantized(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """NVFP4 values of ``x`` without the global scale, which belongs to the accumulator."""
    packed, block_scale, _ = nvfp4.quantize(x, global_scale)
    return nvfp4.dequantize(packed, block_scale, _ONE)
