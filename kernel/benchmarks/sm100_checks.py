"""Whether a W4A4 layer computes what the oracle computes: the shapes that reach every kernel of the SM100 backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2, worst_row

# Relative L2 to the oracle, which quantizes as the kernels do: bfloat16 costs .002, twice that where slots are added
# in bfloat16. In single rows a rounding tie shows: one code is up to .02 of a row of 256 intermediate values, one block
# scale .05; a lost block of 16 weights costs .18.
LIMIT, ROW_LIMIT = 0.006, 0.06
PRO = {"hidden": 7168, "intermediate": 3072, "swiglu_limit": 10.0}
FLASH = {"hidden": 4096, "intermediate": 2048, "swiglu_limit": 10.0}
SMALL = {"hidden": 512, "intermediate": 256, "swiglu_limit": 1.5}
CHECKED = 64  # tokens of a large batch that are compared

Build = Callable[[MoEGeometry, ExpertWeights], MoELayer]


@dataclass(frozen=True)
class Check:
    """One batch on one geometry.

    experts: of the model; a quarter of them are on this rank, by a random map. one_expert: all slots go to one local
    expert. one_scale: the experts share an input scale. Every tenth token is padding.
    """

    name: str
    shape: dict
    experts: int
    top_k: int
    tokens: int
    one_scale: bool = False
    one_expert: bool = False

    @property
    def geometry(self) -> MoEGeometry:
        return MoEGeometry(self.experts, self.experts // 4, self.top_k, **self.shape)


CHECKS = (
    *(Check(f"small, {t} tokens", SMALL, 16, 4, t, t % 2 > 0) for t in (1, 7, 40, 129, 300, 700, 1100)),
    Check("small, one expert", SMALL, 16, 4, 300, one_expert=True),
    *(Check(f"V4-Pro's K, {t} tokens", PRO, 16, 4, t) for t in (1, 64, 150, 300, 700, 1100)),
    *(Check(f"V4-Flash's K, {t} tokens", FLASH, 16, 4, t, True) for t in (3, 1100)),
)


def random_weights(geometry: MoEGeometry, one_scale: bool, rng: torch.Generator) -> ExpertWeights:
    """Weights of every code on the generator's device; gate and up have different global scales."""
    weights = ExpertWeights.empty(geometry.num_local_experts, geometry.hidden, geometry.intermediate, rng.device)

    def uniform(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=rng, device=rng.device)

    for codes, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        codes.copy_(torch.randint(0, 256, codes.shape, generator=rng, device=rng.device, dtype=torch.uint8))
        scale.copy_((uniform(scale) + 0.3).to(torch.float8_e4m3fn))
    weights.w13_global.copy_((uniform(weights.w13_global) + 0.5) / geometry.hidden**0.5 / 3)
    weights.w2_global.copy_((uniform(weights.w2_global) + 0.5) / geometry.intermediate**0.5 / 3)
    weights.w13_input_scale.copy_(uniform(weights.w13_input_scale) * 1e-3 + 1.5e-3)
    weights.w2_input_scale.copy_(uniform(weights.w2_input_scale) * 1e-3 + 1e-3)
    if one_scale:
        weights.w13_input_scale.fill_(2e-3)
    return weights


def clone(weights: ExpertWeights) -> ExpertWeights:
    """A copy that a backend may rewrite."""
    return ExpertWeights(**{f.name: getattr(weights, f.name).clone() for f in fields(weights)})


def make_batch(check: Check, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """x, topk_ids, topk_weights, expert_map."""
    g, device = check.geometry, rng.device
    x = torch.randn(check.tokens, g.hidden, generator=rng, device=device).bfloat16()
    weight, ids = torch.rand(check.tokens, g.num_experts, generator=rng, device=device).topk(g.top_k)
    local = torch.randperm(g.num_experts, generator=rng, device=device)[: g.num_local_experts]
    expert_map = torch.full((g.num_experts,), -1, dtype=torch.int32, device=device)
    expert_map[local] = torch.arange(g.num_local_experts, dtype=torch.int32, device=device)
    if check.one_expert:
        ids[:, 0] = local[0]
        ids[:, 1:] = -1
    ids[9::10] = -1
    return x, ids.to(torch.int32), weight, expert_map


def run_check(check: Check, build: Build, device: torch.device | str, seed: int) -> dict:
    """Compare one batch with the oracle; a second call must give the same bits, unless sums are fused.

    On a GPU also: a CUDA graph that was captured with one routing computes another one right.
    """
    rng = torch.Generator(device).manual_seed(seed)
    weights = random_weights(check.geometry, check.one_scale, rng)
    layer = build(check.geometry, clone(weights))
    x, ids, weight, expert_map = make_batch(check, rng)
    workspace = torch.full((layer.backend.workspace_bytes(check.tokens),), 0xFF, dtype=torch.uint8, device=device)

    def call(chosen: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, torch.nan)
        return layer(x, chosen, weight, expert_map, out=out, workspace=workspace)

    rows = torch.randperm(check.tokens, generator=rng, device=device)[:CHECKED]
    limit = check.geometry.swiglu_limit
    expected = moe_oracle(weights, x[rows], ids[rows], weight[rows], expert_map, limit, "w4a4")
    out, again = call(ids), call(ids)
    error, (_, worst) = relative_l2(out[rows], expected), worst_row(out[rows], expected)
    found = {
        "check": check.name,
        "relative_l2": error,
        "worst_row": worst,
        "finite": bool(out.isfinite().all()),
        "repeatable": torch.equal(out, again),
    }
    must_repeat = not getattr(layer.backend, "fused", False)
    passed = found["finite"] and error <= LIMIT and worst <= ROW_LIMIT and (found["repeatable"] or not must_repeat)
    if torch.device(device).type == "cuda":
        found["graph"] = _graph_error(call, ids, rng)
        passed = passed and found["graph"] <= LIMIT
    return {**found, "passed": passed}


def _graph_error(call, ids: torch.Tensor, rng: torch.Generator) -> float:
    """Relative L2 of a replay with another routing to a plain call with it."""
    buffer = torch.full_like(ids, -1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call(buffer)
    buffer.copy_(ids)
    graph.replay()
    return relative_l2(replayed, call(ids).double())
