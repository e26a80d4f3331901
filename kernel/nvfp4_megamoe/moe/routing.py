"""From the router's choices to the slots of this rank's experts; on the device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Slots(NamedTuple):
    """The (token, k) pairs of a batch, grouped by local expert.

    order: int32 [T * K], every flat index ``t * K + k`` once; those of expert 0 first, then of expert 1 and so on,
        each in increasing order, and last those without an expert here.
    offsets: int32 [E + 1]; the slots of local expert ``e`` are ``order[offsets[e]:offsets[e + 1]]``, and
        ``offsets[E]`` is the number of slots with an expert here.
    """

    order: torch.Tensor
    offsets: torch.Tensor


def make_slots(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_local_experts: int) -> Slots:
    """Group a batch's (token, k) pairs by local expert.

    Args:
        topk_ids: int32 or int64 [T, K]. An id that no expert has, such as the -1 of a padding token, is dropped.
        expert_map: int32 [num_experts], local expert of each global one, -1 where it is on another rank; None where
            ``topk_ids`` are local ids.
        num_local_experts: E, which may be zero.

    Returns:
        Slots on the device of ``topk_ids``; the shapes depend on those of the arguments alone, so the call can be
        captured in a CUDA graph.
    """
    ids = topk_ids.reshape(-1)
    known = num_local_experts if expert_map is None else expert_map.shape[0]
    here = (ids >= 0) & (ids < known)
    if expert_map is not None and known > 0:
        ids = expert_map[ids.clamp(0, known - 1)]
        here = here & (ids >= 0) & (ids < num_local_experts)
    # A slot without an expert here sorts behind the last local expert.
    local = torch.where(here, ids, num_local_experts).to(torch.int32)
    in_order, order = torch.sort(local, stable=True)
    experts = torch.arange(num_local_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(in_order, experts, out_int32=True)
    return Slots(order.to(torch.int32), offsets)
