"""Every tensor of a DeepSeek-V4 model, in DeepSeek's naming, and how large its random values are.

The sizes are chosen so that log-probabilities tell a wrong MoE layer from a right one computed in bfloat16:

- routed experts make up most of what a layer adds to the residual streams, and attention, whose keys and values go
  through an FP8 cache, little;
- rounding seldom changes which experts are chosen, and hardly matters when it does: the embedding has a constant
  channel through which the router lowers all its logits, and there sqrt(softplus(x)) is nearly exp(x / 2), so the
  first of the chosen experts weighs several times as much as the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoint_maker import tiles
from checkpoint_maker.formats import Matrix
from checkpoint_maker.geometry import HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, Geometry

_HC_MIX = (2 + HC_MULT) * HC_MULT

# Standard deviation of a linear layer's output for inputs of standard deviation 1. It is met within a factor of about
# 2: matrices are scaled by powers of two, and the families of tiles have different widths.
_GAIN = 1.0
_ATTENTION_OUT_GAIN = 0.25
_GATE_UP_GAIN = 2.0  # large enough for the loudest experts to reach the SwiGLU clamp
_DOWN_GAIN = 0.06
_SHARED_DOWN_GAIN = 0.03

_CONSTANT_CHANNEL = 4.0  # value of channel 0 in the embedding of every token
_ROUTER_SHIFT = -3.0  # weight of channel 0 in every router logit
_ROUTER_STD = 3.0  # of a router logit
_LOGIT_STD = 1.6

_AMAX_IN = 8.0  # largest magnitude that experts get, as a calibration would find it
_AMAX_HIDDEN = {-1: 40.0, 0: 100.0, 1: 100.0}  # by an expert's loudness
_FP4_RANGE = 6.0 * 448.0


@dataclass(frozen=True)
class Plain:
    """A tensor that every format stores alike.

    ``amount`` is the standard deviation ('normal'), the value ('constant') or the number of experts to draw each row's
    distinct ones from ('experts'). ``channel_0`` replaces the first column.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Literal["normal", "constant", "experts"]
    amount: float
    channel_0: float | None = None


@dataclass(frozen=True)
class Planted:
    """What a checkpoint can be made to have; the defaults plant nothing.

    gate_up_ratio: up's ``weight_scale_2`` over gate's. vary_ratio: each expert draws its own between 1 / ratio and
    ratio. input_scale_spread: largest factor between the input scales of two experts.
    """

    gate_up_ratio: float = 1.0
    vary_ratio: bool = False
    input_scale_spread: float = 1.0


def inventory(g: Geometry, seed: int, planted: Planted) -> Iterator[Plain | Matrix]:
    """Every tensor of the model in the order of the checkpoint."""
    yield Plain("embed.weight", (g.vocab, g.hidden), torch.bfloat16, "normal", 1.0, _CONSTANT_CHANNEL)
    for layer in range(g.layers):
        prefix = f"layers.{layer}"
        yield from _hyper_connection(f"{prefix}.hc_attn", g)
        yield Plain(f"{prefix}.attn_norm.weight", (g.hidden,), torch.bfloat16, "constant", 1.0)
        yield from _attention(f"{prefix}.attn", g, g.compress_ratios[layer], seed)
        yield from _hyper_connection(f"{prefix}.hc_ffn", g)
        yield Plain(f"{prefix}.ffn_norm.weight", (g.hidden,), torch.bfloat16, "constant", 1.0)
        yield from _moe(f"{prefix}.ffn", g, layer < g.hash_layers, seed, planted)
    yield Plain("norm.weight", (g.hidden,), torch.bfloat16, "constant", 1.0)
    yield Plain("head.weight", (g.vocab, g.hidden), torch.bfloat16, "normal", _LOGIT_STD / math.sqrt(g.hidden))
    yield Plain("hc_head_fn", (HC_MULT, HC_MULT * g.hidden), torch.float32, "normal", 0.02)
    yield Plain("hc_head_base", (HC_MULT,), torch.float32, "constant", 0.0)
    yield Plain("hc_head_scale", (1,), torch.float32, "constant", 0.1)


def make(spec: Plain, seed: int) -> torch.Tensor:
    """Values of a tensor that is not quantized."""
    if spec.fill == "constant":
        return torch.full(spec.shape, spec.amount, dtype=spec.dtype)
    if spec.fill == "experts":
        draws = tiles.generator(seed, spec.name).random((spec.shape[0], int(spec.amount)), dtype="float32")
        return torch.from_numpy(draws.argsort(axis=1, kind="stable")[:, : spec.shape[1]].copy()).to(spec.dtype)
    out = tiles.normal(seed, spec.name, spec.shape, spec.amount, spec.dtype)
    if spec.channel_0 is not None:
        out[:, 0] = spec.channel_0
    return out


def _matrix(name: str, rows: int, columns: int, gain: float, seed: int) -> Matrix:
    family = int(tiles.generator(seed, name + "/family").integers(tiles.FAMILIES))
    return Matrix(name, rows, columns, family, _exponent(gain, columns))


def _exponent(gain: float, columns: int) -> int:
    return round(math.log2(gain / math.sqrt(columns)))


def _hyper_connection(prefix: str, g: Geometry) -> Iterator[Plain]:
    yield Plain(f"{prefix}_fn", (_HC_MIX, HC_MULT * g.hidden), torch.float32, "normal", 0.02)
    yield Plain(f"{prefix}_base", (_HC_MIX,), torch.float32, "normal", 0.1)
    yield Plain(f"{prefix}_scale", (3,), torch.float32, "constant", 0.1)


def _attention(prefix: str, g: Geometry, ratio: int, seed: int) -> Iterator[Plain | Matrix]:
    width = g.heads * HEAD_DIM
    yield Plain(f"{prefix}.attn_sink", (g.heads,), torch.float32, "constant", 0.0)
    yield _matrix(f"{prefix}.wq_a", g.q_lora_rank, g.hidden, _GAIN, seed)
    yield Plain(f"{prefix}.q_norm.weight", (g.q_lora_rank,), torch.bfloat16, "constant", 1.0)
    yield _matrix(f"{prefix}.wq_b", width, g.q_lora_rank, _GAIN, seed)
    yield _matrix(f"{prefix}.wkv", HEAD_DIM, g.hidden, _GAIN, seed)
    yield Plain(f"{prefix}.kv_norm.weight", (HEAD_DIM,), torch.bfloat16, "constant", 1.0)
    yield _matrix(f"{prefix}.wo_a", g.o_groups * g.o_lora_rank, width // g.o_groups, _GAIN, seed)
    yield _matrix(f"{prefix}.wo_b", g.hidden, g.o_groups * g.o_lora_rank, _ATTENTION_OUT_GAIN, seed)
    if ratio:
        yield from _compressor(f"{prefix}.compressor", g, HEAD_DIM, ratio)
    if ratio == 4:
        yield _matrix(f"{prefix}.indexer.wq_b", g.index_heads * INDEX_HEAD_DIM, g.q_lora_rank, _GAIN, seed)
        yield Plain(f"{prefix}.indexer.weights_proj.weight", (g.index_heads, g.hidden), torch.bfloat16, "normal", 0.02)
        yield from _compressor(f"{prefix}.indexer.compressor", g, INDEX_HEAD_DIM, ratio)


def _compressor(prefix: str, g: Geometry, head_dim: int, ratio: int) -> Iterator[Plain]:
    width = head_dim * (2 if ratio == 4 else 1)  # overlapping windows: two series in one tensor
    std = 0.3 / math.sqrt(g.hidden)
    yield Plain(f"{prefix}.ape", (ratio, width), torch.float32, "normal", 0.02)
    yield Plain(f"{prefix}.wkv.weight", (width, g.hidden), torch.bfloat16, "normal", std)
    yield Plain(f"{prefix}.wgate.weight", (width, g.hidden), torch.bfloat16, "normal", std)
    yield Plain(f"{prefix}.norm.weight", (head_dim,), torch.bfloat16, "constant", 1.0)


def _moe(prefix: str, g: Geometry, hashed: bool, seed: int, planted: Planted) -> Iterator[Plain | Matrix]:
    std = _ROUTER_STD / math.sqrt(g.hidden)
    yield Plain(f"{prefix}.gate.weight", (g.experts_count, g.hidden), torch.bfloat16, "normal", std, _ROUTER_SHIFT)
    if hashed:
        yield Plain(f"{prefix}.gate.tid2eid", (g.vocab, g.top_k), torch.int64, "experts", g.experts_count)
    else:
        yield Plain(f"{prefix}.gate.bias", (g.experts_count,), torch.float32, "normal", 0.01)
    for part, rows, columns, gain in (
        ("w1", g.intermediate, g.hidden, _GAIN),
        ("w2", g.hidden, g.intermediate, _SHARED_DOWN_GAIN),
        ("w3", g.intermediate, g.hidden, _GAIN),
    ):
        yield _matrix(f"{prefix}.shared_experts.{part}", rows, columns, gain, seed)
    for expert in range(g.experts_count):
        yield from _expert(f"{prefix}.experts.{expert}", g, seed, planted)


def _expert(prefix: str, g: Geometry, seed: int, planted: Planted) -> Iterator[Matrix]:
    """An expert. Gate and up share their amax, as ModelOpt exports them; experts differ by factors of 2 and 4."""
    rng = tiles.generator(seed, prefix)
    family, down_family = (int(f) for f in rng.integers(tiles.FAMILIES, size=2))
    loudness = int(rng.integers(-1, 2))
    ratio = planted.gate_up_ratio
    level = (-1.0, -0.5, 0.5, 1.0)[int(rng.integers(4))]
    if planted.vary_ratio:
        ratio **= level
    # A factor below 1 would push the largest block scales past 448.
    gate_factor, up_factor = (1.0, ratio) if ratio >= 1.0 else (1.0 / ratio, 1.0)
    spread = planted.input_scale_spread ** rng.random(3)
    hidden_amax = _AMAX_HIDDEN[loudness]
    up_exponent = _exponent(_GATE_UP_GAIN, g.hidden) + loudness
    down_exponent = _exponent(_DOWN_GAIN, g.intermediate) - 2 * loudness
    for part, rows, columns, kind, exponent, factor, amax in (
        ("w1", g.intermediate, g.hidden, family, up_exponent, gate_factor, _AMAX_IN * spread[0]),
        ("w2", g.hidden, g.intermediate, down_family, down_exponent, 1.0, hidden_amax * spread[1]),
        ("w3", g.intermediate, g.hidden, family, up_exponent, up_factor, _AMAX_IN * spread[2]),
    ):
        yield Matrix(f"{prefix}.{part}", rows, columns, kind, exponent, True, factor, float(amax) / _FP4_RANGE)
