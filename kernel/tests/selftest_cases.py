"""Layers, right backends with stated noise, and planted faults for the tests of the layer test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from moe_cases import random_map, random_tensors
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4
from nvfp4_megamoe.selftest import LayerReport, LayerTest, Options
from nvfp4_megamoe.selftest.limits import limits_for
from nvfp4_megamoe.selftest.tipping import tipping

NAME = "layers.3.ffn.experts"
# The demo's shape with fewer experts, half of them here.
GEOMETRY = MoEGeometry(num_experts=12, num_local_experts=6, top_k=6, hidden=256, intermediate=128, swiglu_limit=10.0)

# Noise of a right kernel's sums, relative to their root mean square; see selftest/limits.py.
SUM_NOISE = {"w4a16": 1e-5, "w4a8": 3e-4, "w4a4": 1e-5}


def nearest(report) -> float:
    """The largest value over its limit."""
    return max(m.value / m.limit for m in report.worst().values())


class Case:
    """One rank's random layer, and a copy of its weights that a fault may be planted in."""

    def __init__(self, rng: torch.Generator, geometry: MoEGeometry = GEOMETRY) -> None:
        self.geometry = geometry
        sharded = geometry.num_local_experts < geometry.num_experts
        self.expert_map = random_map(geometry, rng) if sharded else None
        experts = range(geometry.num_local_experts)
        self.ids = [int((self.expert_map == e).nonzero()) for e in experts] if sharded else list(experts)
        tensors = random_tensors(geometry, rng, NAME)
        self.weights = ExpertWeights.from_checkpoint(tensors, NAME, self.ids, geometry, "random.safetensors")
        self.seed = int(torch.randint(1 << 30, (), generator=rng))

    def report(
        self,
        precision: str = "w4a16",
        fault: Callable[[ExpertWeights], None] | None = None,
        backend: object | None = None,
        wrap: Callable[[MoELayer], Callable] = lambda layer: layer,
        **options: object,
    ) -> LayerReport:
        """Test the layer on ``backend``, its weights changed by ``fault`` after the oracle has seen them."""
        backend = backend or CpuBackend(self.geometry, precision)
        options = Options(**{"seed": self.seed, **options})
        test = LayerTest(NAME, self.geometry, self.weights, backend, self.expert_map, options)
        weights = ExpertWeights(**{name: tensor.clone() for name, tensor in vars(self.weights).items()})
        if fault is not None:
            fault(weights)
        return test.run(wrap(MoELayer(self.geometry, weights, backend)))


class NoisyBackend:
    """The oracle with noise where kernels have it: in the sums before the activation, and bfloat16 slots and output.

    ``noise`` is relative to the root mean square of a token's sums.
    """

    name = "noisy"

    def __init__(self, geometry: MoEGeometry, precision: str, noise: float, seed: int) -> None:
        self.geometry, self.precision, self.noise = geometry, precision, noise
        self.rng = torch.Generator().manual_seed(seed)

    def prepare(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def workspace_bytes(self, max_tokens: int) -> int:
        return 0

    def forward(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        w, total = self.weights, torch.zeros(x.shape, dtype=torch.float64)
        for e in range(w.num_experts):
            chosen = topk_ids == e if expert_map is None else torch.isin(topk_ids, (expert_map == e).nonzero())
            tokens, k = chosen.nonzero(as_tuple=True)
            if len(tokens):
                slots = self._expert(e, x[tokens]).bfloat16().double()
                total.index_add_(0, tokens, slots * topk_weights[tokens, k].double()[:, None])
        out.copy_(total)

    def _expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        first, second = oracle.of_projections(self.precision)
        x = oracle.quantize_activations(x, w.w13_input_scale[e].amax(), first)
        sums = torch.cat([x @ oracle.dequantized(w, e, half, first).T for half in (et.GATE, et.UP)], dim=-1)
        size = sums.square().mean(1, keepdim=True).sqrt()
        sums += torch.randn(sums.shape, generator=self.rng, dtype=torch.float64) * (self.noise * size)
        hidden = oracle.swiglu(sums, self.geometry.swiglu_limit)
        hidden = oracle.quantize_activations(hidden, w.w2_input_scale[e], second)
        return hidden @ oracle.dequantized(w, e, et.DOWN, second).T


def moved_and_allowed(rows: int, intermediate: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative L2 [rows] between random intermediates in NVFP4 and those of noisy sums, and the rows' own limits."""
    sums = torch.randn((rows, 2 * intermediate), generator=rng, dtype=torch.float64) * 2
    noise = torch.randn(sums.shape, generator=rng, dtype=torch.float64) * (2 * SUM_NOISE["w4a4"])
    scale = nvfp4.global_scale_of(oracle.swiglu(sums, 10.0))
    right, noisy = (oracle.quantize_activations(oracle.swiglu(x, 10.0), scale, "w4a4") for x in (sums, sums + noise))
    limits = limits_for("w4a4", intermediate, 1)
    return (right - noisy).norm(dim=1) / right.norm(dim=1), limits.rows(tipping(sums, right, 10.0, scale, "w4a4"))


class SizedBackend(NoisyBackend):
    """Exact for few tokens, else with the second projection in E4M3; says so, or claims to be exact throughout."""

    def __init__(self, geometry: MoEGeometry, honest: bool, seed: int) -> None:
        super().__init__(geometry, "auto", 3e-4, seed)
        self.honest = honest

    def precision_at(self, tokens: int, num_experts: int):
        return self._computed(tokens, num_experts) if self.honest else "w4a16"

    def _computed(self, tokens: int, num_experts: int):
        return ("w4a16", "w8a8") if tokens * self.geometry.top_k / num_experts >= 1 else "w4a16"

    def forward(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        self.precision = self._computed(len(x), len(expert_map))
        super().forward(x, topk_ids, topk_weights, expert_map, out, workspace)


def up_scale_wrong(w: ExpertWeights) -> None:
    w.w13_global[:, 1] *= 1.25


def gate_block_lost(w: ExpertWeights) -> None:
    w.w13[:, : w.intermediate, 8 * 5 : 8 * 6] = 0


def up_block_lost(w: ExpertWeights) -> None:
    w.w13[:, w.intermediate :, -8:] = 0


def down_block_lost(w: ExpertWeights) -> None:
    w.w2[:, :, :8] = 0


def gate_row_lost(w: ExpertWeights) -> None:
    w.w13[:, 37] = 0


def intermediate_column_lost(w: ExpertWeights) -> None:
    w.w2[:, :, 40] &= 0xF0


def output_channel_lost(w: ExpertWeights) -> None:
    w.w2[:, 200] = 0


def nibbles_swapped(w: ExpertWeights) -> None:
    w.w2.copy_(w.w2 >> 4 | w.w2 << 4)


def gate_and_up_swapped(w: ExpertWeights) -> None:
    w.w13.copy_(w.w13.roll(w.intermediate, 1))


def block_scales_shifted(w: ExpertWeights) -> None:
    bits = w.w13_scale.view(torch.uint8)
    bits.copy_(bits.roll(1, -1))


def last_expert_unpacked(w: ExpertWeights) -> None:
    w.w2[-1, 128:] = 0


def one_experts_scale_wrong(w: ExpertWeights) -> None:
    w.w2_global[2] *= 1.25


def experts_exchanged(w: ExpertWeights) -> None:
    for tensor in vars(w).values():
        tensor[[0, 1]] = tensor[[1, 0]]


WEIGHT_FAULTS = [
    up_scale_wrong,
    gate_block_lost,
    up_block_lost,
    down_block_lost,
    gate_row_lost,
    intermediate_column_lost,
    output_channel_lost,
    nibbles_swapped,
    gate_and_up_swapped,
    block_scales_shifted,
    last_expert_unpacked,
    one_experts_scale_wrong,
    experts_exchanged,
]


def one_row_in_256_zero(layer: MoELayer) -> Callable:
    def faulty(x, ids, weights, expert_map, out):
        layer(x, ids, weights, expert_map, out=out)[255::256] = 0
        return out

    return faulty


def routing_weights_squared(layer: MoELayer) -> Callable:
    return lambda x, ids, weights, expert_map, out: layer(x, ids, weights.square(), expert_map, out=out)


def routing_weights_ignored(layer: MoELayer) -> Callable:
    return lambda x, ids, weights, expert_map, out: layer(x, ids, torch.ones_like(weights), expert_map, out=out)


def other_ranks_slots_computed(layer: MoELayer) -> Callable:
    return lambda x, ids, weights, expert_map, out: layer(x, ids, weights, expert_map.clamp(min=0), out=out)


def padding_computed(layer: MoELayer) -> Callable:
    return lambda x, ids, weights, expert_map, out: layer(x, ids.clamp(min=0), weights, expert_map, out=out)


def rows_without_slots_unwritten(layer: MoELayer) -> Callable:
    def faulty(x, ids, weights, expert_map, out):
        here = torch.isin(ids, (expert_map >= 0).nonzero()).any(1)
        out[here] = layer(x, ids, weights, expert_map)[here]
        return out

    return faulty


def long_batches_wrong(layer: MoELayer) -> Callable:
    def faulty(x, ids, weights, expert_map, out):
        layer(x, ids, weights, expert_map, out=out)
        return out.mul_(1.25 if len(x) > 256 else 1.0)

    return faulty


LAYER_FAULTS = [
    one_row_in_256_zero,
    routing_weights_squared,
    routing_weights_ignored,
    other_ranks_slots_computed,
    rows_without_slots_unwritten,
    long_batches_wrong,
]


def without_clamp(geometry: MoEGeometry, precision: str) -> CpuBackend:
    """A backend that forgot SwiGLU's clamp."""
    return CpuBackend(replace(geometry, swiglu_limit=None), precision)
