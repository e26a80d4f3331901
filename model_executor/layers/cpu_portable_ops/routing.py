"""Expert routing: scores of all experts, the selected experts, and their normalised weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SCORES = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "softmax": lambda x: x.softmax(-1),
}


def _score(
    op: str, gating_output: torch.Tensor, scoring_func: str, allowed: tuple[str, ...], fused: int
) -> torch.Tensor:
    if scoring_func not in allowed:
        raise ValueError(f"{op}: scoring_func must be one of {', '.join(allowed)}, got {scoring_func!r}")
    if fused:
        raise ValueError(f"{op}: shared experts fused into routing are not supported on this CPU, got {fused}")
    return _SCORES[scoring_func](gating_output.float())


def biased_topk_cpu(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts with the best biased score; their weights are the unbiased scores.

    gating_output [T, E], correction_bias [E] -> weights float32 [T, K], ids int32 [T, K], best first.
    """
    scores = _score(
        "biased_topk_cpu", gating_output, scoring_func, ("sigmoid", "sqrtsoftplus"), num_fused_shared_experts
    )
    ids = (scores + correction_bias.float()).topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
        if apply_routed_scaling_factor_on_output:
            if routed_scaling_factor is None:
                raise ValueError("biased_topk_cpu: apply_routed_scaling_factor_on_output needs routed_scaling_factor")
            weights = weights * routed_scaling_factor
    return weights, ids.to(torch.int32)


def hash_topk_cpu(
    gating_output: torch.Tensor,
    tid2eid: torch.Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts given by each token's table row; weights are their scores, normalised unless softmax.

    gating_output [T, E], tid2eid int32 [T, K] -> weights float32 [T, K], ids int32 [T, K].
    """
    if tid2eid.shape != (gating_output.shape[0], topk) or gating_output.shape[1] != num_experts:
        raise ValueError(
            f"hash_topk_cpu: expected tid2eid [{gating_output.shape[0]}, {topk}] and {num_experts} experts, "
            f"got {list(tid2eid.shape)} and {gating_output.shape[1]}"
        )
    allowed = ("softmax", "sigmoid", "sqrtsoftplus")
    scores = _score("hash_topk_cpu", gating_output, scoring_func, allowed, num_fused_shared_experts)
    weights = scores.gather(1, tid2eid.to(torch.int64))
    if scoring_func != "softmax":
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total * routed_scaling_factor, weights)
    return weights, tid2eid.clone()
