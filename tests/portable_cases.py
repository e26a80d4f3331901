"""Random inputs of the portable CPU operators, shared by their tests against a reference and against native kernels."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import torch

_LAYERS = str(Path(__file__).resolve().parents[1] / "model_executor" / "layers")
if _LAYERS not in sys.path:
    sys.path.insert(0, _LAYERS)

POISON = 0xFF  # as a scale it reads NaN, as an E4M3 code it is one


def generator() -> torch.Generator:
    """Fresh numbers each run; PORTABLE_SEED repeats a printed one."""
    seed = int(os.environ.get("PORTABLE_SEED") or secrets.randbits(31))
    print(f"PORTABLE_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def rope_table(g: torch.Generator, positions: int, dim: int = 64) -> torch.Tensor:
    angle = torch.rand(positions, dim // 2, generator=g) * 6.28
    return torch.cat((angle.cos(), angle.sin()), dim=1).contiguous()


def pages(count: int, content: int, padding: int = 64) -> torch.Tensor:
    """Poisoned pages of a larger pool: rows of ``content`` bytes that lie ``padding`` bytes apart."""
    return torch.full((count, content + padding), POISON, dtype=torch.uint8)[:, :content]


def slots(g: torch.Generator, count: int, total: int) -> torch.Tensor:
    return torch.randperm(total, generator=g)[:count]


def qnorm_insert(g: torch.Generator, tokens: int = 11, heads: int = 3, block: int = 4) -> dict:
    slot = slots(g, tokens - 1, 5 * block - 1)  # the last stays free: there a -1 taken for a slot would write
    slot[2] = -1
    spread = torch.logspace(-4, 2, tokens).unsqueeze(1)
    return dict(
        q=torch.randn(tokens, heads, 512, generator=g).bfloat16(),
        kv=(torch.randn(tokens, 512, generator=g) * spread).bfloat16(),
        positions=torch.randint(0, 40, (tokens,), generator=g),
        swa_kv_cache_2d=pages(5, block * 584),
        slot_mapping=slot,
        cos_sin_cache=rope_table(g, 40),
        q_head_padded=heads + 1,
        eps=1e-6,
        cache_block_size=block,
    )


def filled_mla_cache(g: torch.Generator, count: int, block: int) -> torch.Tensor:
    """Pages in which every row is finite: codes short of NaN, scales near one, bfloat16 normals."""
    cache = pages(count, block * 584)
    codes = torch.randint(0, 127, (count, block, 448), generator=g) + 128 * torch.randint(
        0, 2, (count, block, 448), generator=g
    )
    # The native reader is not exact for zeros and subnormals; its own test covers normal codes only.
    codes = torch.where((codes & 0x78) == 0, codes | 0x30, codes)
    rope = torch.randn(count, block, 64, generator=g).bfloat16().view(torch.uint8)
    cache[:, : block * 576] = torch.cat((codes.to(torch.uint8), rope), dim=2).flatten(1)
    scales = torch.randint(114, 121, (count, block, 8), generator=g)
    scales[..., 7] = 0
    cache[:, block * 576 :] = scales.to(torch.uint8).flatten(1)
    return cache


def flash_mla(
    g: torch.Generator, tokens: int = 6, heads: int = 3, window: int = 7, compressed: int = 5, spread: bool = False
) -> dict:
    """``spread`` gives each token rows of its own; otherwise all choose among a few."""
    block_w, block_c = 8, 2
    pages_w = max(4, -(-(tokens * window) // block_w)) if spread else 4
    pages_c = max(6, -(-(tokens * compressed) // block_c)) if spread else 6

    def choose(width: int, total: int) -> torch.Tensor:
        if spread:
            return slots(g, tokens * width, total).view(tokens, width)
        return torch.stack([slots(g, width, total) for _ in range(tokens)]) if tokens else torch.zeros(0, width).long()

    window_slots = choose(window, pages_w * block_w)
    compressed_slots = choose(compressed, pages_c * block_c)
    window_slots[0, 2:] = -1
    if compressed:
        compressed_slots[0] = -1
        compressed_slots[-1, 0] = pages_c * block_c  # past the cache
    return dict(
        out=torch.full((tokens, heads, 512), torch.nan, dtype=torch.bfloat16),
        q=torch.randn(tokens, heads, 512, generator=g).bfloat16(),
        window_cache_2d=filled_mla_cache(g, pages_w, block_w),
        window_slots=window_slots,
        window_block_size=block_w,
        compressed_cache_2d=filled_mla_cache(g, pages_c, block_c),
        compressed_slots=compressed_slots,
        compressed_block_size=block_c,
        attn_sink=torch.randn(heads, generator=g),
        scale=512**-0.5,
    )


def inverse_rope(g: torch.Generator) -> dict:
    return dict(
        o=torch.randn(5, 3, 512, generator=g).bfloat16(),
        positions=torch.randint(0, 40, (5,), generator=g),
        cos_sin_cache=rope_table(g, 40),
        rope_dim=64,
    )


def save_states(g: torch.Generator, width: int = 1024, ratio: int = 4, block: int = 4) -> dict:
    tokens = 9
    both = torch.randn(tokens, 2 * width, generator=g)
    slot = slots(g, tokens, 4 * block - 1)
    slot[4] = -1
    pool = torch.full((4, block * 2 * width + 32), torch.nan)
    return dict(
        kv=both[:, :width],
        score=both[:, width:],
        ape=torch.randn(ratio, width, generator=g),
        positions=torch.randint(0, 40, (tokens,), generator=g),
        state_cache=pool[:, : block * 2 * width].unflatten(1, (block, 2 * width)),
        slot_mapping=slot,
    )


def compress(g: torch.Generator, dim: int, ratio: int, tokens: int = 14) -> dict:
    """Tokens at consecutive positions over scattered state slots; the earliest window is cut by -1."""
    overlap = 2 if ratio == 4 else 1
    window, state_block, kv_block = overlap * ratio, 4, 3
    rows = tokens + window
    pool = torch.full((-(-rows // state_block), state_block * 2 * overlap * dim + 16), torch.nan)
    state = pool[:, : state_block * 2 * overlap * dim].unflatten(1, (state_block, 2 * overlap * dim))
    state.copy_(torch.randn(state.shape, generator=g))
    for channel in range(0, 2 * overlap * dim // 2, dim):
        state[..., channel : channel + 4] *= 3e-5  # subnormal codes
    first = ratio * 3 - 1
    gather = torch.stack([slots(g, window, rows) for _ in range(tokens)])
    gather[0, : window - 2] = -1
    kv_slot = slots(g, tokens, (tokens // kv_block + 1) * kv_block - 1)
    kv_slot[ratio % tokens] = -1
    row_bytes = 584 if dim == 512 else 132
    return dict(
        state_cache=state,
        gather_slots=gather,
        positions=first + torch.arange(tokens),
        kv_slot_mapping=kv_slot,
        rms_norm_weight=torch.rand(dim, generator=g) + 0.5,
        rms_norm_eps=1e-6,
        cos_sin_cache=rope_table(g, first + tokens + 1),
        kv_cache_2d=pages(tokens // kv_block + 1, kv_block * row_bytes),
        kv_cache_block_size=kv_block,
        compress_ratio=ratio,
    )


def indexer_q(g: torch.Generator, tokens: int = 5, heads: int = 6) -> dict:
    q = torch.randn(tokens, heads, 128, generator=g) * torch.logspace(-3, 1, heads).view(1, -1, 1)
    q[0, 0] = 0
    return dict(
        positions=torch.randint(0, 40, (tokens,), generator=g),
        index_q=q,
        index_q_cos_sin_cache=rope_table(g, 40),
        index_q_fp8=torch.full((tokens, heads, 128), torch.nan).to(torch.float8_e4m3fn),
        index_weights=torch.randn(tokens, heads, generator=g),
        index_weights_softmax_scale=128**-0.5,
        index_weights_head_scale=heads**-0.5,
        index_weights_out=torch.full((tokens, heads), torch.nan),
    )


def mqa_logits(g: torch.Generator, shared: bool, heads: int = 5, block: int = 4) -> dict:
    """``shared``: two requests of several tokens; otherwise one token a request, with rubbish behind its pages."""
    lengths = torch.tensor([0, 3, 4, 5, 9, 1, 8]) if shared else torch.tensor([9, 0, 4, 5])
    count = 12
    cache = pages(count, block * 132)
    cache[:, : block * 128] = torch.randint(0, 127, (count, block * 128), generator=g).to(torch.uint8)
    scale = torch.exp2(torch.randint(-6, 3, (count, block), generator=g).float())
    cache[:, block * 128 :] = scale.view(torch.uint8)
    order = slots(g, 12, 12).view(4, 3).to(torch.int32)
    table = order[[0, 0, 0, 0, 0, 1, 1]] if shared else order.clone()
    if not shared:
        table[1] = -7
        table[2, 1:] = 10_000
    return dict(
        q_fp8=torch.randn(len(lengths), heads, 128, generator=g).to(torch.float8_e4m3fn),
        kvcache_fp8=cache,
        weight=torch.randn(len(lengths), heads, generator=g),
        seq_lens=lengths.to(torch.int32),
        page_table=table.contiguous(),
        block_size=block,
        max_seq_len=11,
    )


def topk(g: torch.Generator, ties: bool, columns: int = 900) -> dict:
    lengths = torch.tensor([0, 3, 511, 512, 513, 700, columns], dtype=torch.int32)
    scores = torch.randn(len(lengths), columns, generator=g)
    if ties:
        scores = (scores * 2).round() / 2
    for row, length in enumerate(lengths.tolist()):
        scores[row, length:] = torch.nan if row % 2 else 1e9  # never to be read
    return dict(
        scores=scores,
        seq_lens=lengths,
        page_tables=torch.stack([slots(g, 15, 64) for _ in lengths]).to(torch.int32),
        out_page_indices=torch.full((len(lengths), 512), 77, dtype=torch.int32),
        page_size=64,
        out_raw_indices=torch.full((len(lengths), 512), 77, dtype=torch.int32),
    )


def biased(g: torch.Generator, experts: int = 64, scoring: str = "sqrtsoftplus", renormalize: bool = True) -> dict:
    gate = torch.randn(7, experts, generator=g) * 4
    gate[0, 5], gate[1, 6] = 30.0, -30.0
    return dict(
        hidden_states=gate,
        gating_output=gate,
        correction_bias=torch.randn(experts, generator=g) * 2,
        topk=6,
        renormalize=renormalize,
        scoring_func=scoring,
        num_fused_shared_experts=0,
        routed_scaling_factor=1.5,
        apply_routed_scaling_factor_on_output=True,
    )


def hashed(g: torch.Generator, experts: int = 64, scoring: str = "sqrtsoftplus") -> dict:
    table = torch.stack([slots(g, 6, experts) for _ in range(7)]).to(torch.int32)
    return dict(
        gating_output=torch.randn(7, experts, generator=g) * 4,
        tid2eid=table,
        topk=6,
        scoring_func=scoring,
        num_fused_shared_experts=0,
        num_experts=experts,
        routed_scaling_factor=1.5,
    )


def hyper_pre(g: torch.Generator, tokens: int = 5, dim: int = 96) -> dict:
    return dict(
        x=torch.randn(tokens, 4, dim, generator=g).bfloat16(),
        hc_fn=torch.randn(24, 4 * dim, generator=g) * 0.2,
        hc_scale=torch.tensor([0.7, 1.3, 2.1]),
        hc_base=torch.randn(24, generator=g),
        hc_mult=4,
        sinkhorn_iters=20,
        rms_eps=1e-6,
        hc_eps=1e-3,
    )


def hyper_post(g: torch.Generator, tokens: int = 5, dim: int = 96) -> dict:
    return dict(
        x=torch.randn(tokens, dim, generator=g).bfloat16(),
        residual=torch.randn(tokens, 4, dim, generator=g).bfloat16(),
        post=torch.rand(tokens, 4, generator=g),
        comb=torch.rand(tokens, 4, 4, generator=g),
    )


def hyper_head(g: torch.Generator, tokens: int = 5, dim: int = 96) -> dict:
    return dict(
        x=torch.randn(tokens, 4, dim, generator=g).bfloat16(),
        hc_fn=torch.randn(4, 4 * dim, generator=g) * 0.2,
        hc_scale=torch.tensor([0.7]),
        hc_base=torch.randn(4, generator=g),
        hc_eps=1e-3,
        norm_eps=1e-6,
    )


def scaled_mm(g: torch.Generator, m: int = 3, n: int = 160, k: int = 256, block_n: int = 128) -> dict:
    groups = (-(-n // block_n), -(-k // 128))
    return dict(
        mat1=torch.randn(m, k, generator=g).bfloat16(),
        mat2=torch.randn(n, k, generator=g).to(torch.float8_e4m3fn),
        scales2=torch.exp2(torch.randint(-4, 3, groups, generator=g).float()),
        block_size=[block_n, 128],
        bias=torch.randn(n, generator=g),
        out_dtype=torch.bfloat16,
        is_vnni=False,
    )


def batched_mm(g: torch.Generator) -> dict:
    return dict(
        out=torch.full((2, 5, 64), torch.nan, dtype=torch.bfloat16),
        mat1=torch.randn(2, 5, 96, generator=g).bfloat16(),
        mat2=torch.randn(2, 64, 96, generator=g).bfloat16(),
        is_vnni=False,
        scale=None,
    )
