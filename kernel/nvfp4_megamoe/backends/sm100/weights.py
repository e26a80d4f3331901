"""From a layer's weights to what the kernels read: in place, once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.backends.sm100 import layout
from nvfp4_megamoe.moe.weights import ExpertWeights


class Parameters(NamedTuple):
    """Small per-expert numbers, float32.

    first: [E, 4], alpha of gate and of up, then the scale pair of GEMM 2's input. second: [E, 4], alpha of GEMM 2.
    input_scales: [E, 2], the scale pair of GEMM 1's input: reciprocal of the global scale, and reciprocal of that.
    one_scale: all rows of ``input_scales`` are equal.
    """

    first: torch.Tensor
    second: torch.Tensor
    input_scales: torch.Tensor
    one_scale: bool


def scale_pair(global_scale: torch.Tensor) -> torch.Tensor:
    """[E, 2]: 1 / s, and 1 / (1 / s), which is what ``numerics.nvfp4.quantize`` multiplies with."""
    inverse = 1.0 / global_scale
    return torch.stack([inverse, 1.0 / inverse], 1)


def arrange(weights: ExpertWeights) -> Parameters:
    """Cut the weights into images, in place, and collect the experts' numbers.

    Raises:
        UnsupportedError: the shapes are not whole images.
    """
    layout.check_shape(2 * weights.intermediate, weights.hidden, "gate and up weights")
    layout.check_shape(weights.hidden, weights.intermediate, "down weights")
    layout.arrange_(weights.w13, is_scale=False, gate_up=True)
    layout.arrange_(weights.w13_scale, is_scale=True, gate_up=True)
    layout.arrange_(weights.w2, is_scale=False, gate_up=False)
    layout.arrange_(weights.w2_scale, is_scale=True, gate_up=False)
    input_scale = weights.w13_input_scale.amax(1)
    second = torch.zeros(weights.num_experts, 4, device=weights.w2_global.device)
    second[:, 0] = weights.w2_global * weights.w2_input_scale
    return Parameters(
        torch.cat([weights.w13_global * input_scale[:, None], scale_pair(weights.w2_input_scale)], 1).contiguous(),
        second,
        scale_pair(input_scale),
        bool((input_scale == input_scale[0]).all()),
    )
