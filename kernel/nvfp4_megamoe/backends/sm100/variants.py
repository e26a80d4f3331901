"""Which compiled GEMMs serve a batch, from shapes alone, so that a CUDA graph is valid for any routing.

The number that decides is the mean of an expert's slots, T * K over all experts of the layer: what an expert here gets
under uniform routing, on one rank or many. Any other routing gives the same results, only later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvfp4_megamoe.moe.geometry import MoEGeometry

# Largest mean for each part size. An expert with more slots than a part reads its weights more than once: by Poisson's
# distribution that happens to less than one in a hundred up to these means.
FEW_MEAN = {16: 8, 32: 21, 64: 47}


def few_slots(tokens: int, geometry: MoEGeometry) -> int | None:
    """Slots of a part in the kernels for few tokens, or None where an expert has too many."""
    slots = tokens * geometry.top_k
    return next((part for part, mean in FEW_MEAN.items() if slots <= mean * geometry.num_experts), None)


def most_few_tokens(geometry: MoEGeometry) -> int:
    """Most tokens that are computed by the kernels for few tokens."""
    return max(FEW_MEAN.values()) * geometry.num_experts // geometry.top_k


def first_variant(tokens: int, geometry: MoEGeometry) -> str:
    """Kernel of GEMM 1.

    With few slots an expert the weights' bytes bound the time: they are the rows of the tile. With many, a pair of
    blocks reads each weight once for 256 slots.
    """
    if few := few_slots(tokens, geometry):
        return f"gemm1_few{few}"
    mean = tokens * geometry.top_k / geometry.num_experts
    if mean >= 256:
        return "gemm1_pair"
    return "gemm1_n256" if mean >= 128 else "gemm1_n128"


def second_variant(tokens: int, geometry: MoEGeometry, fused: bool) -> str:
    """Kernel of GEMM 2: for few tokens and in pairs where GEMM 1 is, for the same reasons.

    The two for few tokens share the layout of the intermediate's scales. ``fused``: it adds to the tokens' sums.
    """
    if few := few_slots(tokens, geometry):
        tile = f"few{few}"
    else:
        tile = "pair" if tokens * geometry.top_k >= 256 * geometry.num_experts else "n128"
    return f"gemm2_{tile}" + ("_add" if fused else "")
