"""How far a result is from its reference; float64 inside, Python floats outside (each call waits for the device).

Every metric is infinite where an input has a NaN or an infinity, so no threshold lets one through.
"""

from __future__ import annotations

import math

import torch


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - 2<a, b> / (|a|^2 + |b|^2), symmetric: 0 for equal tensors, 1 for orthogonal ones, 2 for opposite ones.

    Args:
        a: floating point [...].
        b: floating point, the shape of ``a``.

    Source: DeepGEMM's error metric, computed as |a - b|^2 / (|a|^2 + |b|^2), which does not cancel.
    """
    a, b = _float64(a, b)
    return _ratio((a - b).square().sum(), a.square().sum() + b.square().sum())


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, ``b`` being the reference; 0 where both are zero, infinite where only ``b`` is."""
    a, b = _float64(a, b)
    return _ratio((a - b).norm(), b.norm())


def norm_ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a| / |b|, ``b`` being the reference; 1 where both are zero, infinite where only ``b`` is.

    Noise hardly moves it, a wrong scale does.
    """
    a, b = _float64(a, b)
    return _ratio(a.norm(), b.norm(), both_zero=1.0)


def norms(x: torch.Tensor) -> torch.Tensor:
    """Of each row of ``x``, floating point [n, N]: [n], on its device, 1 where it is zero: to divide rows by."""
    sizes = x.norm(dim=1)
    return torch.where(sizes == 0, 1.0, sizes)


def worst_row(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """Row with the largest relative L2 error, which the error of the whole tensor hides.

    Args:
        a: floating point [..., N] with at least one row.
        b: floating point, the shape of ``a``; the reference.

    Returns:
        Index of the row (leading dimensions flattened) and its ``|a - b| / |b|``, as in :func:`relative_l2`.
    """
    a, b = _float64(a, b)
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    error, size = (a - b).norm(dim=-1), b.norm(dim=-1)
    relative = torch.where(error == 0, 0.0, error / size).nan_to_num(nan=math.inf, posinf=math.inf)
    index = int(relative.argmax())
    return index, float(relative[index])


def _float64(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"A result is compared with a reference of its own shape: {tuple(a.shape)}, {tuple(b.shape)}.")
    return a.double(), b.double()


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor, both_zero: float = 0.0) -> float:
    top, bottom = float(numerator), float(denominator)
    if not (math.isfinite(top) and math.isfinite(bottom)):
        return math.inf
    if bottom == 0.0:
        return both_zero if top == 0.0 else math.inf
    return top / bottom
