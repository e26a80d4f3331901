"""The NVFP4 parameters of a MoE layer before and after loading: sentinels, and scales for ``--load-format dummy``."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)

_BLOCK_SCALES = ("w13_weight_scale", "w2_weight_scale")
_SCALARS = ("w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale")
_UE4M3_NAN = 0x7F

# Values of the size that ModelOpt exports for weights of standard deviation 0.02 and activations up to 8.
_DUMMY_WEIGHT_SCALE_2 = 5e-5
_DUMMY_INPUT_SCALE = 8.0 / (6 * 448)


def mark_unloaded(layer: torch.nn.Module) -> None:
    """Fill every scale of ``layer`` with NaN: a scale that is still NaN after loading was never written."""
    for name in _SCALARS:
        getattr(layer, name).data.fill_(float("nan"))
    for name in _BLOCK_SCALES:
        getattr(layer, name).data.view(torch.uint8).fill_(_UE4M3_NAN)


def fill_dummy(layer: torch.nn.Module) -> None:
    """Give ``layer`` valid random weights, the same on every start: dummy loading leaves negative and zero scales."""
    logger.warning_once("--load-format dummy: routed experts get random NVFP4 weights, not a checkpoint's")
    for name in ("w13_weight", "w2_weight"):
        data = getattr(layer, name).data
        generator = torch.Generator(device=data.device).manual_seed(0)
        data.random_(0, 256, generator=generator)
    for name in _BLOCK_SCALES:
        data = getattr(layer, name).data.view(torch.uint8)
        generator = torch.Generator(device=data.device).manual_seed(1)
        data.random_(0x50, 0x78, generator=generator)
    layer.w13_weight_scale_2.data.fill_(_DUMMY_WEIGHT_SCALE_2)
    layer.w2_weight_scale_2.data.fill_(_DUMMY_WEIGHT_SCALE_2)
    layer.w13_input_scale.data.fill_(_DUMMY_INPUT_SCALE)
    layer.w2_input_scale.data.fill_(_DUMMY_INPUT_SCALE)
