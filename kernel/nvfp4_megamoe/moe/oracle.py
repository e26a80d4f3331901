"""What a MoE layer must compute, in float64, with activations quantized exactly as a backend quantizes them.

Everything but that rounding is exact to float64: weights are rounded in ``w8a8`` alone, accumulation loses nothing.
What remains between an oracle and a right backend is float32 accumulation and its rare effect on a rounding decision.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4, ue4m3

_BYTES_AT_ONCE = {"cpu": 4 << 20}

Precision = Literal["w4a16", "w4a8", "w8a8", "w4a4"]
LayerPrecision = Precision | tuple[Precision, Precision]  # of both projections, or of each


class Stages(NamedTuple):
    """What one expert computes for n slots, stage by stage; all float64.

    x: [n, H], the input as GEMM 1 reads it. gate_up: [n, 2I], after the global scales, before the activation.
    activated: [n, I], as computed. intermediate: [n, I], as GEMM 2 reads it. out: [n, H], without routing weights.
    """

    x: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor
    intermediate: torch.Tensor
    out: torch.Tensor


def moe_oracle(
    weights: ExpertWeights,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    swiglu_limit: float | None,
    precision: LayerPrecision,
) -> torch.Tensor:
    """This rank's part of the layer's output.

    Args:
        weights: of the local experts.
        x: bfloat16 [T, H].
        topk_ids: int32 or int64 [T, K]; ids that no expert has are dropped.
        topk_weights: float32 [T, K].
        expert_map: int32 [num_experts], local expert of each global one or -1; None: ids are local.
        swiglu_limit: clamp of the activation's inputs, or None.
        precision: of the activations: ``w4a16`` bfloat16; ``w4a8`` E4M3 with a float32 scale for each token,
            amax / 448; ``w8a8`` the same of bfloat16, and weights too rounded to E4M3, each times its block scale;
            ``w4a4`` NVFP4 with the expert's input scale as global scale. Two, where the projections differ.

    Returns:
        float64 [T, H] on the device of ``x``; zero for a token without a slot here. Memory: one expert's weights in
        float64, for experts that tokens are routed to.
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(weights.num_experts):
        mine = _chosen(topk_ids, expert_map, expert)
        tokens, k = mine.nonzero(as_tuple=True)
        if tokens.numel():
            slots = expert_stages(weights, expert, x[tokens], swiglu_limit, precision).out
            out.index_add_(0, tokens, slots * topk_weights[tokens, k].double().unsqueeze(-1))
    return out


def expert_stages(
    weights: ExpertWeights,
    expert: int,
    x: torch.Tensor,
    swiglu_limit: float | None,
    precision: LayerPrecision,
) -> Stages:
    """Every stage of one local expert for the tokens ``x``, bfloat16 [n, H]."""
    w13_input_scale, w2_input_scale = weights.w13_input_scale[expert].amax(), weights.w2_input_scale[expert]
    first, second = of_projections(precision)
    x = quantize_activations(x, w13_input_scale, first)
    gate_up = torch.cat([_times(x, weights, expert, half, first) for half in (et.GATE, et.UP)], dim=-1)
    activated = swiglu(gate_up, swiglu_limit)
    intermediate = quantize_activations(activated, w2_input_scale, second)
    return Stages(x, gate_up, activated, intermediate, _times(intermediate, weights, expert, et.DOWN, second))


def dequantized(weights: ExpertWeights, expert: int, projection: str, precision: Precision = "w4a16") -> torch.Tensor:
    """Weights of gate (``w1``), down (``w2``) or up (``w3``): float64 [rows, columns], as :func:`dequantize`."""
    packed, block_scale, global_scale, _ = (part[expert] for part in weights.projection(projection).values())
    return dequantize(packed, block_scale, global_scale, precision)


def _times(x: torch.Tensor, weights: ExpertWeights, expert: int, projection: str, precision: Precision) -> torch.Tensor:
    """``x`` times a projection's weights: float64 [n, rows]."""
    packed, block_scale, global_scale, _ = (part[expert] for part in weights.projection(projection).values())
    parts = zip(*(tensor.split(rows_at_once(packed)) for tensor in (packed, block_scale)), strict=True)
    return torch.cat([x @ dequantize(*rows, global_scale, precision).T for rows in parts], dim=-1)


def rows_at_once(packed: torch.Tensor) -> int:
    """How many rows of ``packed``, uint8 [rows, K / 2], to hold dequantized at a time, so that it costs least.

    On a CPU they stay in its cache, and in memory that the process has: large tensors are given back to the system and
    found again page by page. On a GPU few launches matter more, and it is all of one expert of DeepSeek-V4.
    """
    return max(1, _BYTES_AT_ONCE.get(packed.device.type, 256 << 20) // (packed.shape[-1] * 2 * torch.float64.itemsize))


def of_projections(precision: LayerPrecision) -> tuple[Precision, Precision]:
    """The precision of the first projection and of the second."""
    return (precision, precision) if isinstance(precision, str) else precision


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """float64 weights that a GEMM reads; arguments as in ``nvfp4.dequantize``. Exact but for ``w8a8``."""
    if precision != "w8a8":
        return nvfp4.dequantize(packed, block_scale, global_scale, torch.float64)
    # An eighth of value * block scale is at most 6 * 448 / 8 = 336 and so never saturates.
    folded = nvfp4.dequantize(packed, block_scale, torch.full_like(global_scale, 0.125), torch.float32)
    over_rows = global_scale.double().reshape(global_scale.shape + (1,) * (packed.ndim - global_scale.ndim))
    return folded.to(torch.float8_e4m3fn).double() * 8 * over_rows


def swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(min(gate, L)) * clamp(up, -L, L) for [n, 2I], gate columns first; no clamp where ``limit`` is None."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def quantize_activations(x: torch.Tensor, global_scale: torch.Tensor, precision: Precision) -> torch.Tensor:
    """The values that a GEMM reads instead of ``x``, as float64.

    Args:
        x: [n, K], bfloat16, or float64 of an epilogue, which a backend holds in float32 and rounds from there.
        global_scale: float32 [], used by ``w4a4`` alone.
        precision: as in :func:`moe_oracle`.

    Raises:
        ValueError: unknown precision.
    """
    x = x.float()
    if precision == "w4a16":
        return x.bfloat16().double()
    if precision in ("w4a8", "w8a8"):
        x = x.bfloat16().float() if precision == "w8a8" else x
        scale = x.abs().amax(-1, keepdim=True) / ue4m3.UE4M3_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (x / scale).clamp(-ue4m3.UE4M3_MAX, ue4m3.UE4M3_MAX).to(torch.float8_e4m3fn)
        return codes.double() * scale.double()
    if precision == "w4a4":
        return nvfp4.dequantize(*nvfp4.quantize(x, global_scale), dtype=torch.float64)
    raise ValueError(f"Unknown precision {precision!r}: expected w4a16, w4a8, w8a8 or w4a4.")


def _chosen(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, expert: int) -> torch.Tensor:
    """bool [T, K], which choices fall on local expert ``expert``."""
    if expert_map is None:
        return topk_ids == expert
    return torch.isin(topk_ids, (expert_map == expert).nonzero().flatten().to(topk_ids.dtype))
