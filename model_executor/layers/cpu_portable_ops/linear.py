"""Dense products over "packed" weights. Packing is a copy here: no instruction of these CPUs wants another layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import fp8
from .chunking import slices

# Weights decoded at a time: their float32 form stays in a core's second-level cache.
_DECODED = 256 << 10
_PACKABLE = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def convert_weight_packed(weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] or [E, N, K] in the layout that the operators below read: its own."""
    if weight.dim() not in (2, 3) or weight.dtype not in _PACKABLE:
        raise ValueError(
            f"convert_weight_packed: expected bfloat16, float16 or float8_e4m3fn [N, K] or [E, N, K], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    return weight.clone(memory_format=torch.contiguous_format)


def weight_packed_linear(
    out: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, bias: torch.Tensor | None, is_vnni: bool
) -> None:
    """out [M, N] = mat1 [M, K] @ mat2 [N, K].T + bias [N]; accumulated in float32."""
    result = mat1.float() @ mat2.float().T
    out.copy_(result if bias is None else result.add_(bias))


def bmm_cpu(
    out: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, is_vnni: bool, scale: torch.Tensor | None
) -> None:
    """out [B, M, N] = mat1 [B, M, K] @ mat2 [B, N, K].T, times ``scale`` (a float32 scalar) if mat2 is E4M3."""
    if (scale is not None) != (mat2.dtype == torch.float8_e4m3fn):
        raise ValueError(f"bmm_cpu: a scale goes with float8_e4m3fn weights and only with them, got {mat2.dtype}")
    for batch in range(out.shape[0]):
        weight = mat2[batch].float() if scale is None else fp8.decode_e4m3(mat2[batch], float(scale))
        out[batch].copy_(mat1[batch].float() @ weight.T)


def fp8_scaled_mm_cpu(
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    scales2: torch.Tensor,
    block_size: list[int],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    is_vnni: bool,
) -> torch.Tensor:
    """mat1 [M, K] (unquantised) times E4M3 mat2 [N, K] with float32 scales per [block_n, block_k] block.

    scales2 float32 [ceil(N / block_n), ceil(K / block_k)]; bias float32 [N]. Weights are decoded at every call, in
    float32: the only rounding is the result's, to ``out_dtype``.
    """
    rows, columns = mat2.shape
    block_n, block_k = block_size
    expected = (-(-rows // block_n), -(-columns // block_k))
    if mat1.shape[1] != columns or tuple(scales2.shape) != expected or scales2.dtype != torch.float32:
        raise ValueError(
            f"fp8_scaled_mm_cpu: weight [{rows}, {columns}] in {block_n}x{block_k} blocks needs activations "
            f"[M, {columns}] and float32 scales {list(expected)}, got {list(mat1.shape)} and "
            f"{scales2.dtype} {list(scales2.shape)}"
        )
    x = mat1.float()
    out = torch.empty(mat1.shape[0], rows, dtype=out_dtype)
    for part in slices(rows, 0, max(block_n, _DECODED // columns)):
        scale = scales2[torch.arange(part.start, part.stop) // block_n]
        if columns % block_k == 0:
            weight = fp8.decode_e4m3(mat2[part], scale)
        else:
            weight = fp8.decode_e4m3(mat2[part]) * scale.repeat_interleave(block_k, dim=1)[:, :columns]
        out[:, part] = F.linear(x, weight, None if bias is None else bias[part].float())
    return out
