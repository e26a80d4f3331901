"""Which expert each token of the layer test goes to, and in which batches the tokens are run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.selftest.inputs import MIXED_TOKENS

_ROWS_OF_AN_EXPERT = 288  # of each fully compared expert in the long batch: more than one tile of 256, not a multiple


class Batches(NamedTuple):
    """Routing of T distinct tokens: those of each compared expert, then mixed ones, then one for each expert.

    ids: int32 [T, K], global; every slot but a token's own goes to an expert of another rank, or to none.
    weights: float32 [T, K]. A token of one expert has 1 there; the others' slots have weights that would show.
    mixed_weights: float32 [n, compared experts], what each mixed token takes of each expert; the last takes nothing.
    indices: int64, the tokens of each batch that is run.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    mixed_weights: torch.Tensor
    indices: list[torch.Tensor]


def make_batches(
    geometry: MoEGeometry,
    compared: list[int],
    expert_ids: list[int],
    tokens: list[int],
    expert_map: torch.Tensor | None,
    sizes: tuple[int, ...],
    rng: torch.Generator,
) -> Batches:
    """Route the tokens; everything on the CPU.

    Args:
        geometry: of the layer on this rank.
        compared: local experts that are compared in full. expert_ids: global id of each local expert.
        tokens: number of tokens of each compared expert.
        expert_map: the layer's. sizes: of further batches, by number of tokens. rng: on the CPU.
    """
    top_k, ids = geometry.top_k, torch.tensor(expert_ids, dtype=torch.int32)
    single = torch.cat([ids[expert].repeat(count) for expert, count in zip(compared, tokens, strict=True)] + [ids])
    own = sum(tokens)
    mixed = MIXED_TOKENS + 1 if compared else 0
    routed = _elsewhere(geometry, expert_map, own + mixed + len(ids), rng)
    weights = torch.rand(routed.shape, generator=rng, dtype=torch.float32) + 0.5
    rows = torch.cat([torch.arange(own), torch.arange(own + mixed, len(routed))])
    routed[rows, rows % top_k] = single
    weights[rows, rows % top_k] = 1.0
    mixed_weights = torch.zeros((mixed, len(compared)), dtype=torch.float32)
    for row in range(mixed - 1):
        chosen = torch.randperm(len(compared), generator=rng)[:top_k]
        slots = torch.randperm(top_k, generator=rng)[: len(chosen)]
        routed[own + row, slots] = ids[torch.tensor(compared)[chosen]]
        mixed_weights[row, chosen] = weights[own + row, slots]
    everything = torch.arange(len(routed))
    repeats = -(-_ROWS_OF_AN_EXPERT // min(tokens)) if tokens else 1
    long = torch.cat([torch.arange(own + mixed).repeat(repeats), everything[own + mixed :]])
    further = [everything.repeat(-(-size // max(len(everything), 1)))[:size] for size in sizes]
    return Batches(routed, weights, mixed_weights, [everything, long, *further])


def _elsewhere(
    geometry: MoEGeometry, expert_map: torch.Tensor | None, tokens: int, rng: torch.Generator
) -> torch.Tensor:
    """int32 [tokens, K], different experts of other ranks for each token, or -1 where there are none left."""
    others = torch.empty(0, dtype=torch.int64)
    if expert_map is not None:
        others = (expert_map.cpu() < 0).nonzero().flatten()
    ids = torch.full((tokens, geometry.top_k), -1, dtype=torch.int32)
    count = min(len(others), geometry.top_k)
    if count:
        chosen = torch.rand((tokens, len(others)), generator=rng, dtype=torch.float32).topk(count).indices
        ids[:, :count] = others[chosen].to(torch.int32)
    return ids
