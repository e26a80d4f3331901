"""GPT-J rotary embedding: (even, odd) neighbours form a pair; the table row is [cos..., sin...]."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotate the last dimension of ``x`` (float32 [T, ..., R]) by each token's angles.

    positions int64 [T]; cos_sin_cache float32 [max_position, R], cosines first. ``inverse`` turns the other way.
    """
    turn = torch.complex(*cos_sin_cache[positions].chunk(2, dim=-1))
    if inverse:
        turn = turn.conj()
    turn = turn.view(turn.shape[:1] + (1,) * (x.dim() - 2) + turn.shape[1:])
    pairs = torch.view_as_complex(x.unflatten(-1, (x.shape[-1] // 2, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)
