"""Random layers, batches and their kernels' launches for the tests of the SM100 backend."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from nvfp4_megamoe.backends.sm100 import layout
from nvfp4_megamoe.backends.sm100.plan import Plan, max_tiles
from nvfp4_megamoe.backends.sm100.weights import Parameters, arrange
from nvfp4_megamoe.moe.oracle import expert_stages
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4

from . import own_kernels
from .agreement import Agreement
from .machine import Machine
from .reference_plan import make_plan
from .testing import fresh_seed

LIMIT = 2.0
_UNUSED = torch.zeros(16, dtype=torch.uint8)


@dataclass
class Case:
    """A layer, its arranged copy, a batch and its plan."""

    weights: ExpertWeights
    arranged: ExpertWeights
    parameters: Parameters
    plan: Plan
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    seed: int

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat indices of an expert's slots, in slot order, and their rows in the tiles' images."""
        flat = (self.topk_ids.flatten() == expert).nonzero().flatten()
        before = sum(-(-int((self.topk_ids == other).sum()) // 128) for other in range(expert))
        return flat, before * 128 + torch.arange(len(flat))


def random_weights(rng: torch.Generator, experts: int, hidden: int, inter: int, one_scale: bool) -> ExpertWeights:
    """NVFP4 weights of every code, gate and up with global scales 1.2 to 2 times apart, input scales equal or not."""
    weights = ExpertWeights.empty(experts, hidden, inter)
    for codes, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        codes.copy_(torch.randint(0, 256, codes.shape, generator=rng, dtype=torch.uint8))
        scale.copy_((torch.rand(scale.shape, generator=rng) + 0.3).to(torch.float8_e4m3fn))
    # Never close to one another: one taken for the other must show.
    ratio = torch.rand(experts, generator=rng) * 0.8 + 1.2
    ratio = torch.where(torch.rand(experts, generator=rng) < 0.5, ratio, 1 / ratio)
    pair = (torch.rand(experts, 1, generator=rng) + 0.5) * torch.stack([ratio.rsqrt(), ratio.sqrt()], 1)
    weights.w13_global.copy_(pair / math.sqrt(hidden) / 3)
    weights.w2_global.copy_((torch.rand(experts, generator=rng) + 0.5) / math.sqrt(inter) / 3)
    weights.w13_input_scale.copy_(torch.rand(experts, 2, generator=rng) * 1e-3 + 1.5e-3)
    if one_scale:
        weights.w13_input_scale[:, 0] = weights.w13_input_scale.amax()
    weights.w2_input_scale.copy_(torch.rand(experts, generator=rng) * 1e-3 + 1e-3)
    return weights


def random_ids(rng: torch.Generator, counts: list[int], top_k: int) -> torch.Tensor:
    """int64 [T, K]: local expert e is chosen by counts[e] tokens, no token has it twice, -1 elsewhere."""
    tokens = max(-(-sum(counts) // top_k) + 3, max(counts))
    ids = torch.full((tokens, top_k), -1)
    # The most wanted first, so that the tokens with free places left suffice.
    for expert in sorted(range(len(counts)), key=lambda e: -counts[e]):
        free = (ids < 0).sum(1) + torch.rand(tokens, generator=rng)
        for token in free.argsort(descending=True)[: counts[expert]].tolist():
            places = (ids[token] < 0).nonzero().flatten()
            ids[token, places[torch.randint(len(places), (1,), generator=rng)]] = expert
    return ids


def make_case(
    counts: list[int], hidden: int, inter: int, one_scale: bool, top_k: int = 2, seed: int | None = None
) -> Case:
    """A batch in which local expert e gets counts[e] slots; the other choices have no expert here."""
    seed = fresh_seed() if seed is None else seed
    rng = torch.Generator().manual_seed(seed)
    ids = random_ids(rng, counts, top_k)
    weights = random_weights(rng, len(counts), hidden, inter, one_scale)
    arranged = ExpertWeights(**{name: value.clone() for name, value in vars(weights).items()})
    parameters = arrange(arranged)
    x = torch.randn(len(ids), hidden, generator=rng).bfloat16()
    plan = make_plan(ids, None, len(counts), parameters.one_scale)
    return Case(weights, arranged, parameters, plan, x, ids, torch.rand(ids.shape, generator=rng), seed)


def few_slots(name: str) -> int | None:
    """Slots of a part, for a kernel for few tokens."""
    match = re.search("few([0-9]+)", name)
    return int(match[1]) if match else None


def quantize(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row-major scales of the activations."""
    rows, hidden = len(case.plan.source), case.x.shape[1]
    codes, scale = torch.zeros(rows, hidden // 2, dtype=torch.uint8), torch.zeros(rows, hidden // 16, dtype=torch.uint8)
    args = [case.x, case.plan.source, case.parameters.input_scales, codes, scale, hidden, rows]
    own_kernels.execute("quantize_rows", args, seed=case.seed)
    return codes, scale


def gemm1(case: Case, codes: torch.Tensor, scale: torch.Tensor, name: str, blocks: int, **options):
    """Images of GEMM 1's codes and scales, and the machine that made them; ``options`` as in ``Machine``."""
    steps, plan = case.weights.intermediate // 256, case.plan
    images = max_tiles(case.topk_ids.numel(), case.weights.num_experts)
    out = torch.full((images, steps, layout.CODE_BYTES), 0xA5, dtype=torch.uint8)
    scales = (layout.SCALE_BYTES,)
    if slots := few_slots(name):
        scales = (128 // slots, layout.part_scale_bytes(slots))
    out_scale = torch.full((images, steps, *scales), 0xA5, dtype=torch.uint8)
    table = (plan.pairs, plan.num_pairs) if name == "gemm1_pair" else (plan.tiles, plan.num_tiles)
    args = [codes, scale, plan.a_row, case.arranged.w13, case.arranged.w13_scale, *table]
    args += [case.parameters.first, out, out_scale, _UNUSED, _UNUSED, case.top_k, 2 * case.weights.intermediate]
    args += [case.weights.hidden, LIMIT, blocks]
    machine = own_kernels.execute(name, args, **({"seed": case.seed, "approximation_ulps": 2} | options))
    return out, out_scale, machine


def gemm2(case: Case, codes: torch.Tensor, scale: torch.Tensor, name: str, blocks: int, **options):
    """Weighted rows of GEMM 2, one for each slot or summed by token for the adding variant, and the machine."""
    (tokens, hidden), plan = case.x.shape, case.plan
    rows = tokens if name.endswith("add") else case.topk_ids.numel()
    out = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    table = (plan.pairs, plan.num_pairs) if "pair" in name else (plan.tiles, plan.num_tiles)
    args = [codes, scale, _UNUSED, case.arranged.w2, case.arranged.w2_scale, *table]
    args += [case.parameters.second, out, _UNUSED, plan.order, case.topk_weights, case.top_k, hidden]
    args += [case.weights.intermediate, LIMIT, blocks]
    machine = own_kernels.execute(name, args, **({"seed": case.seed} | options))
    return out, machine


def sum_slots(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """The layer's output from the slots' rows."""
    out = torch.full(case.x.shape, torch.nan, dtype=torch.bfloat16)
    args = [rows, case.plan.here, out, case.top_k, case.x.shape[1], len(case.x)]
    own_kernels.execute("sum_slots", args, seed=case.seed)
    return out


def stages_of(case: Case):
    """(expert, flat indices, image rows, oracle's stages) of every expert with slots."""
    for expert in range(case.weights.num_experts):
        flat, rows = case.rows_of(expert)
        if len(flat):
            yield expert, flat, rows, expert_stages(case.weights, expert, case.x[flat // case.top_k], LIMIT, "w4a4")


def agreement_of(case: Case, out: torch.Tensor, out_scale: torch.Tensor) -> Agreement:
    """GEMM 1's images against the oracle."""
    codes = layout.codes_of(out)
    parts = out_scale.dim() > 3
    scale = layout.scales_of_parts(out_scale, 128 // out_scale.shape[2]) if parts else layout.scales_of(out_scale)
    result = Agreement()
    for expert, _, rows, stages in stages_of(case):
        result.add(case.weights, expert, stages, codes[rows], scale[rows], LIMIT)
    return result


def codes_equal(case: Case, out: torch.Tensor, out_scale: torch.Tensor) -> float:
    """Share of GEMM 1's codes that equal the oracle's, block scales counted with them."""
    return agreement_of(case, out, out_scale).equal


def oracle_images(case: Case, slots: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """GEMM 2's input as the oracle has it, in images, scales in parts of ``slots``; zeros in rows without a slot."""
    inter, images = case.weights.intermediate, max_tiles(case.topk_ids.numel(), case.weights.num_experts)
    codes = torch.zeros(images * 128, inter // 2, dtype=torch.uint8)
    scale = torch.zeros(images * 128, inter // 16, dtype=torch.uint8)
    for expert, _, rows, stages in stages_of(case):
        q = nvfp4.quantize(stages.activated.float(), case.weights.w2_input_scale[expert])
        codes[rows], scale[rows] = q.packed, q.block_scale.view(torch.uint8)
    return layout.code_images(codes), layout.scale_parts(scale, slots) if slots else layout.scale_images(scale)


def expected_output(case: Case) -> torch.Tensor:
    """float64 [T, H]: the W4A4 oracle's layer."""
    out = torch.zeros(case.x.shape, dtype=torch.float64)
    for _, flat, _, stages in stages_of(case):
        weighted = stages.out * case.topk_weights.flatten()[flat].double()[:, None]
        out.index_add_(0, flat // case.top_k, weighted)
    return out


class ModelLauncher:
    """Stands in for the CUDA driver: executes every launch on the model."""

    def __init__(self, blocks: int, **options: object) -> None:
        self.blocks, self.options, self.names = blocks, options, []

    def launch(self, name: str, blocks: int, args: list) -> Machine:
        """See ``driver.Launcher``; persistent kernels run on fewer blocks."""
        self.names.append(name)
        blocks = self.blocks if name.startswith("gemm") else blocks
        return own_kernels.execute(name, [*args, blocks], **self.options)
