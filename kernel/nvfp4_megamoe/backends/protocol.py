"""What the MoE layer asks of an architecture's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from nvfp4_megamoe.moe.geometry import MoEGeometry
    from nvfp4_megamoe.moe.oracle import LayerPrecision
    from nvfp4_megamoe.moe.weights import ExpertWeights


def precision_at(backend: Backend, tokens: int, num_experts: int) -> LayerPrecision:
    """What a call of ``tokens`` tokens over ``num_experts`` global experts is computed in, as the oracle names it.

    ``backend.precision``, unless the backend decides by size and has a method of this name.
    """
    decide = getattr(backend, "precision_at", None)
    return backend.precision if decide is None else decide(tokens, num_experts)


class Backend(Protocol):
    """Kernels for one MoE layer on one device.

    ``prepare`` is called once, after the weights are in place; ``forward`` any number of times after it.

    Attributes:
        name: as in the table of ``select.py``.
        precisions: of the activations that the kernels offer, the default first.
        precision: the one that this instance computes with, or the policy by which it chooses one for each call.
    """

    name: str
    precisions: ClassVar[tuple[str, ...]]
    precision: str

    def __init__(self, geometry: MoEGeometry, precision: str | None = None) -> None:
        """For one layer of ``geometry``; the default precision where ``precision`` is None."""

    @classmethod
    def unsupported_reason(cls, geometry: MoEGeometry, device: torch.device) -> str | None:
        """Say why this backend cannot compute ``geometry`` on ``device``, or None where it can."""

    def prepare(self, weights: ExpertWeights) -> None:
        """Convert ``weights`` in place to what the kernels read; keeps references, never a second copy."""

    def workspace_bytes(self, max_tokens: int) -> int:
        """Bytes of scratch that ``forward`` needs for up to ``max_tokens`` tokens."""

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
    ) -> None:
        """Write this rank's part of the layer's output into ``out``.

        Args:
            x: bfloat16 [T, H].
            topk_ids: int32 or int64 [T, K], global expert ids.
            topk_weights: float32 [T, K], applied exactly once.
            expert_map: int32 [global experts], global to local id, -1 for experts of other ranks; None: ids are local.
            out: bfloat16 [T, H], fully written; zero for a token without a slot here.
            workspace: uint8 scratch of at least ``workspace_bytes(T)``, or None where that is zero.
        """
