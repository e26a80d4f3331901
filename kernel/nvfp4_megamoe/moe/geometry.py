"""The numbers that fix the shapes of one MoE layer on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEGeometry:
    """Shapes of one rank's part of a MoE layer.

    Attributes:
        num_experts: routed experts of the whole layer, over all ranks.
        num_local_experts: experts whose weights are on this rank.
        top_k: experts a token is routed to.
        hidden: columns of the layer's input and output, H.
        intermediate: rows of gate and of up, columns of down, I, on this rank.
        swiglu_limit: clamp of SwiGLU's inputs, or None for none.
    """

    num_experts: int
    num_local_experts: int
    top_k: int
    hidden: int
    intermediate: int
    swiglu_limit: float | None
