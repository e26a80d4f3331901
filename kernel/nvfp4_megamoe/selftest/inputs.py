"""Tokens under which every part of an expert's weights matters, scaled by the weights themselves.

Gaussian tokens would hide a lost block of 16 columns behind the 447 others of a row of 7168, and a lost intermediate
row behind 3071. Here each block of columns and each row dominates in one of a few tokens; blocks of a token differ in
size, so that a scale read from another block shows.
"""

from __future__ import annotations

import torch

from nvfp4_megamoe.numerics.metrics import norms
from nvfp4_megamoe.numerics.nvfp4 import BLOCK

BLOCK_TOKENS = 8
ROW_TOKENS = 8
CLAMP_TOKENS = 2
MIXED_TOKENS = 4

_PREACTIVATION = 2.0  # root mean square of gate and up under a block token
_ALIGNED = 4.0  # of the rows that a row token is aligned with


def expert_tokens(gate: torch.Tensor, up: torch.Tensor, limit: float | None, rng: torch.Generator) -> torch.Tensor:
    """Tokens for the full comparison of one expert.

    Args:
        gate, up: float32 [I, H], the dequantized weights.
        limit: SwiGLU's clamp, or None.
        rng: on the CPU, so that the tokens do not depend on the device's generator.

    Returns:
        bfloat16 [n, H]: block tokens, row tokens, and with a limit tokens that exceed it in a third of the rows.
    """
    hidden, device = gate.shape[1], gate.device
    size = row_norm(gate, up)
    bound = float("inf") if limit is None else limit
    blocks = _block_tokens(hidden, rng).to(device)
    # A block token's size is the mean over its columns; a row's output follows from it only on average.
    blocks *= min(_PREACTIVATION, bound / 4) / (size * blocks.square().mean(1, keepdim=True).sqrt())
    parts = [blocks, _row_tokens(gate, up, min(_ALIGNED, bound / 2), rng)]
    if limit is not None:
        parts.append(_gaussian(CLAMP_TOKENS, hidden, rng).to(device) * (limit / size))
    return torch.cat(parts).bfloat16()


def plain_tokens(size: torch.Tensor, count: int, hidden: int, rng: torch.Generator) -> torch.Tensor:
    """Gaussian tokens, bfloat16 [count, H], for weights of row norm ``size``."""
    return (
        torch.randn((count, hidden), generator=rng, dtype=torch.float32).to(size.device) * (_PREACTIVATION / 2 / size)
    ).bfloat16()


def probe_values(size: torch.Tensor, columns: int, rng: torch.Generator) -> torch.Tensor:
    """Non-zero part of one token for each of E experts: bfloat16 [E, columns].

    Args:
        size: [E], row norm of the weights in those columns.
        columns: number of non-zero columns.
        rng: on the CPU.
    """
    values = _gaussian(len(size), columns, rng).to(size.device)
    return (values * (_PREACTIVATION / size.float())[:, None]).bfloat16()


def row_norm(*weights: torch.Tensor) -> torch.Tensor:
    """The largest of the matrices' mean row norms, float32 []; 1 where all are zero."""
    size = torch.stack([w.norm(dim=-1).square().mean().sqrt() for w in weights]).amax()
    return torch.where(size == 0, 1.0, size)


def _gaussian(rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    """float32, whatever the default type is: loaders change it."""
    return torch.randn((rows, columns), generator=rng, dtype=torch.float32)


def _block_tokens(hidden: int, rng: torch.Generator) -> torch.Tensor:
    blocks = hidden // BLOCK
    own = torch.arange(blocks) % BLOCK_TOKENS == torch.arange(BLOCK_TOKENS)[:, None]
    others = torch.exp2(-1 - 3 * torch.rand((BLOCK_TOKENS, blocks), generator=rng, dtype=torch.float32))
    gains = torch.where(own, torch.ones_like(others), others).repeat_interleave(BLOCK, dim=1)
    return _gaussian(BLOCK_TOKENS, hidden, rng) * gains


def _row_tokens(gate: torch.Tensor, up: torch.Tensor, target: float, rng: torch.Generator) -> torch.Tensor:
    """float32 [n, H]; token t is the sum of every n-th gate row (positive, where SiLU passes) and up row (any sign)."""
    rows = gate.shape[0]
    own = (torch.arange(rows) % ROW_TOKENS == torch.arange(ROW_TOKENS)[:, None]).float()
    signs = torch.randint(0, 2, (rows,), generator=rng).float() * 2 - 1
    own, signs = own.to(gate.device), signs.to(gate.device)
    directions = [own / norms(gate) @ gate, own * signs / norms(up) @ up]
    return sum(directions) * (target / row_norm(gate, up))
