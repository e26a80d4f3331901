"""One token for every expert, compared in a few output channels: what makes it cheap enough to leave no expert out.

The token is zero but for a few blocks of columns, so the oracle needs those columns of gate and up, and of down the
rows of the compared channels: for V4-Pro 0.4 % of the weights. It finds an expert whose weights, global scales or place
are wrong as a whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.nvfp4 import BLOCK
from nvfp4_megamoe.selftest import inputs
from nvfp4_megamoe.selftest.tipping import Reference, tipping

BLOCKS = 2
CHANNELS = 32
_CHUNK_WEIGHTS = {"cpu": 1 << 20}  # in a CPU's cache; elsewhere 1 << 24, for fewer launches


class Probes(NamedTuple):
    """For E experts: tokens bfloat16 [E, H], channels int64 [E, n], expected E rows of n without routing weights."""

    tokens: torch.Tensor
    channels: torch.Tensor
    expected: dict[oracle.LayerPrecision, Reference]


def make_probes(
    weights: ExpertWeights,
    limit: float | None,
    precisions: tuple[oracle.LayerPrecision, ...],
    rng: torch.Generator,
) -> Probes:
    """Probe every local expert; ``expected`` has a tensor for each precision.

    Scratch memory: at most about 0.5 GiB however many experts there are. Nothing waits for the device.
    """
    experts, hidden, device = weights.num_experts, weights.hidden, weights.w13.device
    blocks = _choose(experts, hidden // BLOCK, BLOCKS, rng).to(device)
    channels = _choose(experts, hidden, CHANNELS, rng).to(device)
    tokens = torch.zeros((experts, hidden), dtype=torch.bfloat16, device=device)
    expected = {precision: [] for precision in precisions}
    rows = 2 * weights.intermediate * BLOCK * blocks.shape[1] + weights.intermediate * channels.shape[1]
    together = max(1, _CHUNK_WEIGHTS.get(device.type, 1 << 24) // rows)
    for begin in range(0, experts, together):
        part = slice(begin, begin + together)
        gate_up = _columns(weights, part, blocks[part])
        size = gate_up.square().sum(-1).mean(-1).amax(-1).sqrt()
        x = inputs.probe_values(torch.where(size == 0, 1.0, size), gate_up.shape[-1], rng)
        columns = (blocks[part, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
        tokens[part].scatter_(1, columns, x)
        for precision in precisions:
            first, second = oracle.of_projections(precision)
            read = gate_up if first != "w8a8" else _columns(weights, part, blocks[part], first)
            down = _rows(weights, part, channels[part], second)
            expected[precision].append(_expected(weights, part, read, down, x, limit, (first, second)))
    return Probes(tokens, channels, {precision: Reference.cat(parts) for precision, parts in expected.items()})


def _choose(experts: int, of: int, count: int, rng: torch.Generator) -> torch.Tensor:
    """int64 [experts, count], different numbers below ``of`` for each expert."""
    return torch.rand((experts, of), generator=rng, dtype=torch.float32).topk(min(count, of)).indices


def _columns(
    weights: ExpertWeights, part: slice, blocks: torch.Tensor, precision: oracle.Precision = "w4a16"
) -> torch.Tensor:
    """Gate and up in ``blocks``: float64 [E, 2, I, 16 n]."""
    experts, count = blocks.shape
    packed = weights.w13[part].view(torch.int64).take_along_dim(blocks[:, None], 2)  # the 16 codes of a block
    scale = weights.w13_scale[part].view(torch.uint8).take_along_dim(blocks[:, None], 2)
    halves = (experts, 2, weights.intermediate)
    codes = packed.view(torch.uint8).reshape(*halves, count * BLOCK // 2)
    return oracle.dequantize(codes, scale.reshape(*halves, count), weights.w13_global[part], precision)


def _rows(weights: ExpertWeights, part: slice, channels: torch.Tensor, precision: oracle.Precision) -> torch.Tensor:
    """Down in ``channels``: float64 [E, n, I]."""
    packed, scale, global_scale, _ = (tensor[part] for tensor in weights.projection(et.DOWN).values())
    expert = torch.arange(len(channels), device=channels.device)[:, None]
    return oracle.dequantize(
        packed[expert, channels], scale.view(torch.uint8)[expert, channels], global_scale, precision
    )


def _expected(
    weights: ExpertWeights,
    part: slice,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x: torch.Tensor,
    limit: float | None,
    precisions: tuple[oracle.Precision, oracle.Precision],
) -> Reference:
    x = oracle.quantize_activations(x, weights.w13_input_scale[part].amax(1), precisions[0])
    preactivation = (gate_up.flatten(1, 2) @ x[..., None]).squeeze(-1)
    scale = weights.w2_input_scale[part]
    intermediate = oracle.quantize_activations(oracle.swiglu(preactivation, limit), scale, precisions[1])
    moved = tipping(preactivation, intermediate, limit, scale, precisions[1])
    return Reference((down @ intermediate[..., None]).squeeze(-1), moved)
