"""Hyper-connections: mix several residual streams into a layer's input, and its output back into the streams."""

from __future__ import annotations

import numpy as np
import torch

from .chunking import slices


def hc_pre_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int,
    sinkhorn_iters: int,
    rms_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates of the streams and the layer's input.

    x bfloat16 [T, S, D]; hc_fn float32 [(2 + S) * S, S * D]; hc_scale float32 [3]; hc_base float32 [(2 + S) * S].
    Returns the input [T, D] in x's type, the post gates float32 [T, S] and the doubly stochastic stream mixture
    float32 [T, S, S].
    """
    tokens, streams, dim = x.shape
    out = x.new_empty(tokens, dim)
    post = torch.empty(tokens, hc_mult)
    comb = torch.empty(tokens, hc_mult, hc_mult)
    gates = slice(0, streams), slice(streams, 2 * streams), slice(2 * streams, None)
    for part in slices(tokens, streams * dim * 12):
        value = x[part].float()
        mixes = _mixes(value, hc_fn, rms_eps)
        pre, after, mix = (torch.addcmul(hc_base[g], mixes[:, g], s) for g, s in zip(gates, hc_scale, strict=True))
        out[part] = torch.bmm(pre.sigmoid_().add_(hc_eps).unsqueeze(1), value).squeeze(1)
        post[part] = after.sigmoid_().mul_(2.0)
        comb[part] = _sinkhorn(mix.unflatten(1, (streams, streams)), sinkhorn_iters, hc_eps)
    return out, post, comb


def hc_post_fused_cpu(x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Stream s of the result is ``post[s] * x + sum over r of comb[r, s] * residual[r]``.

    x [T, D], residual [T, S, D], post float32 [T, S], comb float32 [T, S, S] -> [T, S, D] in x's type.
    """
    out = torch.empty_like(residual, dtype=x.dtype)
    for part in slices(x.shape[0], residual.shape[1] * residual.shape[2] * 12):
        mixed = torch.bmm(comb[part].transpose(1, 2), residual[part].float())
        out[part] = mixed.addcmul_(post[part].unsqueeze(2), x[part].float().unsqueeze(1))
    return out


def hc_head_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """Collapse the streams before the output head: x [T, S, D], hc_fn float32 [S, S * D] -> [T, D] in x's type."""
    out = x.new_empty(x.shape[0], x.shape[2])
    for part in slices(x.shape[0], x.shape[1] * x.shape[2] * 12):
        value = x[part].float()
        gate = _mixes(value, hc_fn, norm_eps).mul_(hc_scale).add_(hc_base).sigmoid_().add_(hc_eps)
        out[part] = torch.bmm(gate.unsqueeze(1), value).squeeze(1)
    return out


def _mixes(value: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Linear map of all streams, divided by their common root mean square."""
    flat = value.flatten(1)
    return (flat @ weight.T).mul_(torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps))


def _sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Softmax of the rows of [T, S, S], then columns and rows normalised in turn, epsilons where the native kernel has
    them.

    In NumPy with the tokens last: each step is a handful of short vector operations, for which PyTorch's overhead per
    operation would dominate a decode step.
    """
    matrix = logits.softmax(-1).add_(eps).permute(1, 2, 0).contiguous()
    values = matrix.numpy()
    for axis in [0] + [1, 0] * (iterations - 1):
        total = np.add.reduce(values, axis=axis, keepdims=True)
        total += eps
        values /= total
    return matrix.permute(2, 0, 1)
