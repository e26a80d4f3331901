"""GPT-J rotary embedding: (even, odd) neighbours form a pair; the table row is [cos..., sin...]."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotate the last dimension of ``x`` (float32 [T, ..., R]) by each token's angles.

    positions int64 [T]; cos_sin_cache float32 [max_position, R], cosines first. ``inverse`` turns the other way.
    """
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    if inverse:
        sin = -sin
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
