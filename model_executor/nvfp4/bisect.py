"""Switches for finding which part of the model is wrong. Each one warns loudly: output with it is not the model's.

``MEGA_MOE_DEBUG=1``   log each layer's shapes and scales once, and the slot counts of each call
``MEGA_MOE_STATIC=1``  the routed experts return zeros
``SKIP_ATTENTION=1``   every attention layer returns zeros
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

if TYPE_CHECKING:
    from nvfp4_megamoe.moe.weights import ExpertWeights

logger = init_logger(__name__)


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r}: expected 0 or 1")
    return value == "1"


DEBUG = _switch("MEGA_MOE_DEBUG")
STATIC_MOE = _switch("MEGA_MOE_STATIC")
SKIP_ATTENTION = _switch("SKIP_ATTENTION")

_WARNINGS = {
    "MEGA_MOE_DEBUG": (DEBUG, "every MoE call copies slot counts to the host: serving is slow"),
    "MEGA_MOE_STATIC": (STATIC_MOE, "routed experts return ZEROS: the output is NOT the model's"),
    "SKIP_ATTENTION": (SKIP_ATTENTION, "attention returns ZEROS: the output is NOT the model's"),
}


def _warn() -> None:
    for name, (active, consequence) in _WARNINGS.items():
        if active:
            logger.warning_once("%s=1 is set: %s. Unset it to serve.", name, consequence)


def install_attention_switch(attention: torch.nn.Module) -> None:
    """Make ``attention``, whose forward takes (positions, hidden_states, ...), return zeros under SKIP_ATTENTION=1."""
    _warn()
    if SKIP_ATTENTION:
        attention.forward = lambda positions, hidden_states, *rest: torch.zeros_like(hidden_states)


def log_layer(layer_name: str, weights: ExpertWeights) -> None:
    """Log shapes and the range of each kind of scale of one layer."""
    _warn()
    if not DEBUG:
        return
    ratio = weights.w13_global[:, 1] / weights.w13_global[:, 0]
    logger.info(
        "%s: w13 %s, w2 %s; weight_scale_2 gate %s up %s down %s; up/gate %s; input_scale w13 %s w2 %s",
        layer_name,
        tuple(weights.w13.shape),
        tuple(weights.w2.shape),
        _span(weights.w13_global[:, 0]),
        _span(weights.w13_global[:, 1]),
        _span(weights.w2_global),
        _span(ratio),
        _span(weights.w13_input_scale),
        _span(weights.w2_input_scale),
    )


def log_call(
    layer_name: str, hidden_states: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> None:
    """Log one call's shapes and how its slots fall on this rank's experts; does nothing while a graph is captured."""
    if not DEBUG or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    ids = topk_ids.reshape(-1).long()
    local = ids if expert_map is None else expert_map.long()[ids]
    counts = torch.bincount(local[local >= 0])
    logger.info(
        "%s: x %s |max| %.4g, %d slots of which %d here, on %d experts, at most %d on one",
        layer_name,
        tuple(hidden_states.shape),
        hidden_states.abs().max().item() if hidden_states.numel() else 0.0,
        ids.numel(),
        int(counts.sum()),
        int((counts > 0).sum()),
        int(counts.max()) if counts.numel() else 0,
    )


def _span(values: torch.Tensor) -> str:
    return f"{values.min().item():.4g}..{values.max().item():.4g}"
