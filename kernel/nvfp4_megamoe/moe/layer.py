"""One MoE layer on one rank: weights, a backend that multiplies with them, and the checks between both and a caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights

if TYPE_CHECKING:
    from nvfp4_megamoe.backends.protocol import Backend


class MoELayer:
    """Routed experts of one layer. Neither construction nor a call validates weight values: see ``ExpertWeights``."""

    def __init__(self, geometry: MoEGeometry, weights: ExpertWeights, backend: Backend) -> None:
        """Hand ``weights`` to ``backend``, which may rewrite them in place and keeps references to them.

        Raises:
            ValueError: the weights are not those of ``geometry``.
        """
        of_weights = (weights.num_experts, weights.hidden, weights.intermediate)
        of_geometry = (geometry.num_local_experts, geometry.hidden, geometry.intermediate)
        if of_weights != of_geometry:
            raise ValueError(
                f"Weights have {of_weights} local experts, hidden and intermediate size; the layer's geometry has "
                f"{of_geometry}. Build the geometry and the weights from the same configuration."
            )
        self.geometry = geometry
        self.backend = backend
        self._device = weights.w13.device
        backend.prepare(weights)

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the layer's output, each routing weight applied once; never waits for the device.

        Args:
            x: bfloat16 [T, H].
            topk_ids: int32 or int64 [T, K], global expert ids; ids that no expert has are dropped.
            topk_weights: float32 [T, K].
            expert_map: int32 [num_experts], local expert of each global one, -1 where it is on another rank; None
                where ``topk_ids`` are local ids.
            out: bfloat16 [T, H] to write into, not overlapping ``x``; allocated where it is None.
            workspace: uint8, at least ``backend.workspace_bytes(T)``; allocated where it is None.

        Returns:
            ``out``, fully written; zero for a token without a slot here.

        Raises:
            ValueError: an argument of a wrong type, shape, device or layout.
        """
        g, tokens = self.geometry, x.shape[0] if x.ndim else 0
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        self._check("x", x, (torch.bfloat16,), (tokens, g.hidden))
        self._check("topk_ids", topk_ids, (torch.int32, torch.int64), (tokens, g.top_k))
        self._check("topk_weights", topk_weights, (torch.float32,), (tokens, g.top_k))
        if expert_map is not None:
            self._check("expert_map", expert_map, (torch.int32,), (g.num_experts,))
        self._check("out", out, (torch.bfloat16,), (tokens, g.hidden))
        if tokens == 0:
            return out
        needed = self.backend.workspace_bytes(tokens)
        if workspace is None and needed:
            workspace = torch.empty(needed, dtype=torch.uint8, device=self._device)
        elif workspace is not None:
            self._check("workspace", workspace, (torch.uint8,), (workspace.numel(),))
            if workspace.numel() < needed:
                raise ValueError(
                    f"workspace has {workspace.numel()} bytes; {self.backend.name} needs {needed} for {tokens} tokens."
                )
        self.backend.forward(x, topk_ids, topk_weights, expert_map, out, workspace)
        return out

    def _check(self, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        if tensor.device != self._device:
            raise ValueError(f"{name} is on {tensor.device}; the layer's weights are on {self._device}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor.")
