"""The CPU backend: W4A16, or W4A4 emulated; weights stay packed as the checkpoint has them."""

from __future__ import annotations

import ctypes
import math
from typing import ClassVar

import torch

from nvfp4_megamoe.backends.cpu import library, torch_path
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.nvfp4 import BLOCK


class CpuBackend:
    """One layer on the CPU, implementing ``backends.protocol.Backend``.

    Numbers: products of the exact weights with bfloat16 (W4A16) or NVFP4 (W4A4) activations, accumulated in float32;
    the global scales multiply the accumulators; the intermediate is rounded to bfloat16 (W4A16) or NVFP4 (W4A4); a
    token's slots are summed in float32 and rounded once. Results are identical on repeat and for any number of
    threads; that a token is computed with others may move them by a rounding of the float32 sums.
    """

    name: ClassVar[str] = "cpu"
    precisions: ClassVar[tuple[str, ...]] = ("w4a16", "w4a4")

    def __init__(self, geometry: MoEGeometry, precision: str | None = None) -> None:
        """Load or build the kernel.

        Args:
            geometry: of the layer.
            precision: ``w4a16``, which is the default, or ``w4a4``.

        Raises:
            UnsupportedError: the geometry or the precision is not supported, or the kernel that
                ``NVFP4_CPU_KERNEL`` asks for is not available.
        """
        self.precision = precision or self.precisions[0]
        reason = self.unsupported_reason(geometry, torch.device("cpu"))
        if self.precision not in self.precisions:
            reason = f"precision {self.precision!r} is not one of {', '.join(self.precisions)}"
        if reason:
            raise UnsupportedError(f"The cpu backend cannot compute this layer: {reason}.")
        self.geometry = geometry
        self._kernel = library.compiled()
        self._weights: ExpertWeights | None = None
        self._layer = library.Layer(
            local_experts=geometry.num_local_experts,
            num_experts=geometry.num_experts,
            top_k=geometry.top_k,
            hidden=geometry.hidden,
            intermediate=geometry.intermediate,
            limit=math.inf if geometry.swiglu_limit is None else geometry.swiglu_limit,
            quantize_activations=self.precision == "w4a4",
        )
        self._layer_address = ctypes.byref(self._layer)

    @classmethod
    def unsupported_reason(cls, geometry: MoEGeometry, device: torch.device) -> str | None:
        """See ``Backend.unsupported_reason``."""
        if device.type != "cpu":
            return f"it computes on the CPU, the layer is on {device}"
        for what, size in (("hidden", geometry.hidden), ("intermediate", geometry.intermediate)):
            if size <= 0 or size % BLOCK:
                return f"{what} must be a multiple of {BLOCK}, the block of NVFP4, and is {size}"
        return None

    def prepare(self, weights: ExpertWeights) -> None:
        """Take references to ``weights``; nothing is converted, copied or checked beyond type and layout.

        Raises:
            ValueError: the weights are not contiguous CPU tensors of this layer's shapes.
        """
        g, layer = self.geometry, self._layer
        shape = (weights.num_experts, weights.hidden, weights.intermediate)
        expected = (g.num_local_experts, g.hidden, g.intermediate)
        tensors = {name: tensor for name, tensor in vars(weights).items() if isinstance(tensor, torch.Tensor)}
        if shape != expected:
            raise ValueError(f"Weights have (experts, hidden, intermediate) = {shape}; the layer has {expected}.")
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be a contiguous CPU tensor; it is on {tensor.device} with strides {tensor.stride()}."
                )
            if name in dict(layer._fields_):
                setattr(layer, name, tensor.data_ptr())
        self._weights = weights

    def workspace_bytes(self, max_tokens: int) -> int:
        """See ``Backend.workspace_bytes``; stops growing at 4096 tokens, which are computed at a time."""
        if self._kernel is None or max_tokens == 0:
            return 0
        return self._kernel.nvfp4_workspace_bytes(self._layer_address, max_tokens)

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
    ) -> None:
        """See ``Backend.forward``. Rows of ``x`` and ``out`` may be strided.

        Raises:
            ValueError: an argument of a wrong type, shape or layout, which the kernel would read as memory.
        """
        if self._weights is None:
            raise ValueError("prepare(weights) must come before forward.")
        g, tokens = self.geometry, x.shape[0]
        _require("x", x, torch.bfloat16, (tokens, g.hidden), rows_only=True)
        _require("out", out, torch.bfloat16, (tokens, g.hidden), rows_only=True)
        _require("topk_weights", topk_weights, torch.float32, (tokens, g.top_k))
        is_int64 = topk_ids.dtype == torch.int64
        _require("topk_ids", topk_ids, torch.int64 if is_int64 else torch.int32, (tokens, g.top_k))
        if expert_map is not None:
            _require("expert_map", expert_map, torch.int32, (g.num_experts,))
        if tokens == 0:
            return
        if self._kernel is None:
            torch_path.forward(
                self._weights, g.swiglu_limit, self.precision == "w4a4", x, topk_ids, topk_weights, expert_map, out
            )
            return
        needed = self.workspace_bytes(tokens)
        if workspace is None or workspace.numel() < needed or not workspace.is_contiguous():
            given = "none" if workspace is None else f"{workspace.numel()} bytes"
            raise ValueError(f"workspace must be {needed} contiguous bytes for {tokens} tokens; it is {given}.")
        self._kernel.nvfp4_forward(
            self._layer_address,
            x.data_ptr(),
            x.stride(0),
            topk_ids.data_ptr(),
            is_int64,
            topk_weights.data_ptr(),
            None if expert_map is None else expert_map.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            tokens,
            workspace.data_ptr(),
        )


def _require(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], rows_only: bool = False
) -> None:
    whole = tensor.is_contiguous() or (rows_only and tensor.stride(-1) == 1)
    if tensor.dtype != dtype or tensor.shape != shape or not whole:
        raise ValueError(
            f"{name} must be a contiguous {dtype} {list(shape)}; it is {tensor.dtype} {list(tensor.shape)} with "
            f"strides {tensor.stride()}."
        )
