"""How far a right kernel's NVFP4 intermediate may be from the oracle's where values lie at rounding boundaries.

A kernel's sums differ from the oracle's by their order. Where that takes a value of the intermediate over a boundary,
its code changes, and where it takes the largest value of a block over one, the block's scale and with it all 16 values.
In a block that holds much of a row, one such scale moved the row by 0.18: more than a fault may. So what can tip over
is found out for each row, instead of leaving room for it in every limit. Without this, 10 of 120,000 random rows of
I = 3072 would have been beyond their limit, and a start of V4-Pro tests 20,000; with it none came nearer than 0.61 of
it (sums off by 1e-5; kernel/tests/layer_test_limits.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.numerics.metrics import norms

# What float32 sums may be off by, relative to a row's root mean square: five times the noise budget of limits.py.
_REACH = 5e-5


@dataclass(frozen=True)
class Reference:
    """The oracle's results. rows: float64 [n, H]. moved: float64 [n], relative L2 by which codes may move each row."""

    rows: torch.Tensor
    moved: torch.Tensor

    @staticmethod
    def cat(parts: list[Reference]) -> Reference:
        return Reference(torch.cat([part.rows for part in parts]), torch.cat([part.moved for part in parts]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: torch.Tensor | slice) -> Reference:
        return Reference(self.rows[index], self.moved[index])


def tipping(
    gate_up: torch.Tensor,
    intermediate: torch.Tensor,
    limit: float | None,
    global_scale: torch.Tensor,
    precision: oracle.Precision,
) -> torch.Tensor:
    """Relative L2 between the furthest intermediates that sums so near to the oracle's give: float64 [n].

    Args:
        gate_up: float64 [n, 2I], the oracle's sums. intermediate: float64 [n, I], the oracle's, quantized.
        limit: SwiGLU's clamp, or None.
        global_scale: float32, of the intermediate, [] or [n].
        precision: of the second projection. Zero for all but ``w4a4``: without block scales, limits.py has room enough.
    """
    if precision != "w4a4":
        return torch.zeros(len(gate_up), dtype=torch.float64, device=gate_up.device)
    reach = _REACH * gate_up.square().mean(1, keepdim=True).sqrt()
    gate, up = gate_up.chunk(2, dim=-1)
    moved = torch.stack([torch.cat(pair, dim=-1) for pair in ((gate, up), (gate + reach, up), (gate, up + reach))])
    hidden, *others = oracle.swiglu(moved, limit)
    away = sum((other - hidden).abs() for other in others).copysign(hidden)
    # Together, because a GPU's time goes into launches here.
    both = torch.cat([hidden + away, hidden - away])
    scale = global_scale.expand(len(hidden)).repeat(2)
    upper, lower = oracle.quantize_activations(both, scale, precision).chunk(2)
    return (upper - lower).norm(dim=1) / norms(intermediate)
