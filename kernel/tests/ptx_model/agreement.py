"""GEMM 1's codes against the oracle's, and whether every difference is a rounding tie.

A kernel computes the value v before quantization in float32, with approximate exponential and reciprocal. It may land
on the other side of a rounding boundary only where the oracle's v lies within ``band`` of that boundary, for the block
scale (a function of the block's largest magnitude) or for the code itself. Any other difference is unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe.oracle import Stages, dequantized
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import e2m1, nvfp4, ue4m3

UNIT = 2.0**-24
# Rounding errors of the accumulation, in units of the sum of the products' magnitudes. The bound for any order of
# float32 additions is K; errors of random sign stay below the root of the number of additions, 11 for K = 7168.
ACCUMULATION = 4.0
APPROXIMATE = 4.0  # units: two units in the last place of an approximate function


@dataclass
class Agreement:
    """Counts over a batch's codes and block scales.

    explained: different, and the oracle's value lies within the band of the boundary. unexplained: the other
    differences. nearest: of the explained ones, the largest share of the band that one needed.
    """

    total: int = 0
    different: int = 0
    unexplained: int = 0
    nearest: float = 0.0

    @property
    def equal(self) -> float:
        return 1 - self.different / self.total if self.total else 1.0

    @property
    def right(self) -> bool:
        """The project's bound: 99.99 % equal, each difference explained; two ties are allowed in any batch."""
        return self.different <= max(1e-4 * self.total, 2) and self.unexplained == 0

    def add(self, weights: ExpertWeights, expert: int, stages: Stages, packed, scale, limit: float) -> None:
        """Count the slots of one expert.

        Args:
            weights: as in the checkpoint. stages: the oracle's for these slots.
            packed, scale: the kernel's, uint8 [n, I / 2] and [n, I / 16].
        """
        global_scale = weights.w2_input_scale[expert]
        expected = nvfp4.quantize(stages.activated.float(), global_scale)
        got = e2m1.unpack(packed)
        wrong, wrong_scale = got != e2m1.unpack(expected.packed), scale != expected.block_scale.view(torch.uint8)
        self.total += wrong.numel() + wrong_scale.numel()
        count = int(wrong.sum()) + int(wrong_scale.sum())
        self.different += count
        if not count:
            return
        weight = torch.cat([dequantized(weights, expert, half) for half in (et.GATE, et.UP)])
        moved = band(stages, stages.x.abs() @ weight.abs().T, limit)
        # The smallest share of the band that explains every difference.
        for share in torch.linspace(0.05, 1, 20).tolist():
            outside, outside_scale = _outside(stages.activated, moved * share, got, scale, global_scale)
            count = int((outside & wrong).sum()) + int((outside_scale & wrong_scale).sum())
            if not count:
                self.nearest = max(self.nearest, share)
                return
        self.unexplained += count


def band(stages: Stages, magnitude: torch.Tensor, limit: float) -> torch.Tensor:
    """float64 [n, I]: how far float32 arithmetic may move each activated value.

    Args:
        stages: the oracle's.
        magnitude: [n, 2I], sums of the products' magnitudes behind ``stages.gate_up``.
        limit: clamp of the activation.
    """
    # Accumulation, then the rounding of alpha and of the product with it.
    error = UNIT * (ACCUMULATION * magnitude + 2 * stages.gate_up.abs())
    (gate, up), (gate_error, up_error) = stages.gate_up.chunk(2, -1), error.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = gate.sigmoid()
    # exp2 of a product rounded twice, the sum with 1, the reciprocal, two products.
    relative = (1 - sigmoid) * (2 * gate.abs() + APPROXIMATE) + 1 + APPROXIMATE + 2
    slope = (sigmoid * (1 + gate * (1 - sigmoid)) * up).abs()
    return UNIT * relative * stages.activated.abs() + slope * gate_error + (gate * sigmoid).abs() * up_error


def _outside(value, moved, got, scale, global_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes under the given scales, and block scales, that no value within ``moved`` of ``value`` rounds to."""
    size = value.abs().unflatten(-1, (-1, nvfp4.BLOCK))
    least, most = (
        _scale_bits((size + sign * moved.unflatten(-1, (-1, nvfp4.BLOCK))).clamp(min=0).amax(-1), global_scale)
        for sign in (-1, 1)
    )
    bits = scale.int()
    inverse_global = 1.0 / global_scale
    divisor = ue4m3.decode(scale) * (1.0 / inverse_global)
    inverse = torch.where(divisor == 0, 0.0, 1.0 / divisor).repeat_interleave(nvfp4.BLOCK, -1)
    low, high = (e2m1.decode(e2m1.encode((value + sign * moved).float() * inverse)) for sign in (-1, 1))
    codes = e2m1.decode(got)
    return (codes < low) | (codes > high), (bits < least) | (bits > most)


def _scale_bits(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    return ue4m3.encode((1.0 / global_scale) * (amax.float() * (1 / e2m1.E2M1_MAX))).view(torch.uint8).int()
