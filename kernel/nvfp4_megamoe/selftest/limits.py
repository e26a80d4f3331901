"""How far a right backend may be from the oracle, from a noise budget for each precision.

The oracle quantizes as the backend does, so what a budget has to cover is small:

* rounding to bfloat16 of a slot and of the token's sum: 1.6e-3 each, relative, for values all over an octave;
* float32 sums (for FP8 tensor cores: sums of about 12 bits) in another order, and an approximate exponential. They
  move a value by less than 1e-5 of a row's root mean square (FP8: 3e-4). Where a value of the intermediate lies at a
  rounding boundary, its code changes. n changed codes of the widest step move a row by sqrt(n * step / I), where step
  is the square of that width over the mean square of the row: 1.2 for E2M1, whose widest step is a third of the largest
  value of a block of 16; 1.1 for E4M3, whose widest step is 7 % of the largest value of a row, which is up to 15 times
  its root mean square, as products of two Gaussians are; 0.014 for bfloat16, whose widest step is 0.8 % of that.
  The scale of an NVFP4 block can change as well, which moves some rows further: see tipping.py.

All four limits are relative, on rows that were divided by the norm of their reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nvfp4_megamoe.moe.oracle import LayerPrecision, of_projections


class Limits(NamedTuple):
    """Largest value that passes, by metric (see ``judge.py``).

    calc_diff: 1 - 2<a, b> / (|a|^2 + |b|^2) over all rows. norm: | |a| / |b| - 1 |. row: relative L2 of the worst row,
    a token. column: relative L2 of the worst column, an output channel.
    """

    calc_diff: float
    norm: float
    row: float
    column: float

    def rows(self, moved: torch.Tensor) -> torch.Tensor:
        """Each row's own limit, float64 [n], where codes that may tip over move it by ``moved`` (tipping.py)."""
        return (self.row**2 + (_TIPPED * moved).square()).sqrt()

    def with_tipping(self, moved: torch.Tensor) -> Limits:
        """For the mean of rows that are moved so, float64 [n]; ``row`` stays that of a row in which nothing may tip."""
        mean = float((_TIPPED * moved).square().mean())
        return self._replace(calc_diff=self.calc_diff + mean / 2, norm=math.sqrt(self.norm**2 + mean))


class _Budget(NamedTuple):
    noise: float  # relative L2 of roundings and sums
    step: float  # square of the widest step of the intermediate's format, over the mean square of a row


_BUDGETS = {
    "w4a16": _Budget(noise=2.3e-3, step=0.014),
    "w4a8": _Budget(noise=6e-3, step=1.1),
    "w8a8": _Budget(noise=1.3e-2, step=1.1),  # measured on an H200; the codes that a sum tips over are in it
    "w4a4": _Budget(noise=3e-3, step=1.2),
}
_MARGIN = 3.0  # between a budget of relative L2 and its limit
_CHANGED_IN_A_ROW = 2.0  # codes of the widest step at most
_CHANGED_ON_AVERAGE = 0.2  # over many rows; of few, one may have as many as a row may have
_TIPPED = 1.5  # of what may tip over in the intermediate, in the output
COLUMN = 0.2  # a lost output channel has 1; a changed code moves each channel by its weight


def limits_for(precision: LayerPrecision, intermediate: int, rows: int) -> Limits:
    """Limits for some tokens of one layer, in which no block scale may tip over.

    Args:
        precision: of the activations; of two, the limits are those of the larger noise.
        intermediate: I of this rank's experts. The fewer codes a row has, the more one changed code weighs.
        rows: how many different tokens are compared, at least 1. A token's repetitions have the same changed codes.

    Raises:
        ValueError: there is no budget for the precision.
    """
    for one in of_projections(precision):
        if one not in _BUDGETS:
            raise ValueError(f"There is no noise budget for precision {one!r}; expected {', '.join(_BUDGETS)}.")
    noise, step = max(_BUDGETS[one] for one in of_projections(precision))
    rounding = (_MARGIN * noise) ** 2
    mean = rounding + max(_CHANGED_ON_AVERAGE, _CHANGED_IN_A_ROW / rows) * step / intermediate
    row = math.sqrt(rounding + _CHANGED_IN_A_ROW * step / intermediate)
    return Limits(calc_diff=mean / 2, norm=math.sqrt(mean), row=row, column=max(COLUMN, 2 * row))
