"""KV compressor: keep per-token partial states, then pool a window of them into one cached row.

A state page holds, for each token, ``[values (W), scores (W)]`` in float32. With overlap W is twice the head dimension:
the first half serves the token as a member of the previous window's overlap, the second half its own window.
"""

from __future__ import annotations

import torch

from . import fp8, mla_cache
from .chunking import slices
from .rope import rotate

INDEXER_DIM = 128
INDEXER_SCALE_BYTES = 4
INDEXER_AMAX_FLOOR = 1e-4


def save_partial_states_cpu(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    positions: torch.Tensor,
    state_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store ``kv`` and ``score + ape[position % ratio]`` (float32 [T, W]) at each token's slot; negative slots skip.

    ape float32 [ratio, W]; state_cache float32 [pages, block, 2W], written in place; slot_mapping int64 [T].
    """
    width = kv.shape[1]
    if state_cache.dim() != 3 or state_cache.shape[2] != 2 * width:
        raise ValueError(
            f"save_partial_states_cpu: state_cache must be [pages, block, {2 * width}], got {tuple(state_cache.shape)}"
        )
    rows = torch.nonzero(slot_mapping >= 0).squeeze(1)
    block = state_cache.shape[1]
    slots = slot_mapping[rows]
    page, offset = slots // block, slots % block
    state_cache[..., :width][page, offset] = kv[rows]
    state_cache[..., width:][page, offset] = score[rows] + ape[positions[rows] % ape.shape[0]]


def compress_norm_rope_store_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """Compress windows that end at ``position + 1`` divisible by the ratio into ``fp8_ds_mla`` rows.

    gather_slots int64 [T, window] of state slots, -1 = absent; kv_slot_mapping int64 [T], negative = not stored;
    rms_norm_weight float32 [512]; cos_sin_cache float32 [max_position, 64]; kv_cache_2d uint8 pages, written in place.
    """
    nope = mla_cache.NOPE_DIM
    for rows in _ending(positions, kv_slot_mapping, compress_ratio, gather_slots.shape[1], mla_cache.HEAD_DIM):
        pooled = _pool(state_cache, gather_slots[rows], compress_ratio, mla_cache.HEAD_DIM)
        normed = _rms_norm(pooled, rms_norm_weight, rms_norm_eps)
        rope = rotate(normed[:, nope:], _window_start(positions[rows], compress_ratio), cos_sin_cache)
        mla_cache.write(
            kv_cache_2d,
            kv_slot_mapping[rows],
            kv_cache_block_size,
            normed[:, :nope].bfloat16(),
            rope.bfloat16(),
            flush_subnormals=False,
        )


def compress_norm_rope_store_indexer_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """As ``compress_norm_rope_store_cpu`` for the indexer's keys: 128 E4M3 values and one float32 power of two a row.

    A page of B rows holds B x 128 codes followed by B float32 scales.
    """
    block = kv_cache_block_size
    codes, scales = indexer_pages(kv_cache_2d, block)
    for rows in _ending(positions, kv_slot_mapping, compress_ratio, gather_slots.shape[1], INDEXER_DIM):
        pooled = _pool(state_cache, gather_slots[rows], compress_ratio, INDEXER_DIM)
        normed = _rms_norm(pooled, rms_norm_weight, rms_norm_eps)
        half = cos_sin_cache.shape[1]
        normed[:, -half:] = rotate(normed[:, -half:], _window_start(positions[rows], compress_ratio), cos_sin_cache)
        key = normed.bfloat16().float()
        amax = key.abs().amax(-1, keepdim=True).clamp_(min=INDEXER_AMAX_FLOOR)
        scale = fp8.exponent_to_scale(fp8.power_of_two_exponent(amax, 0.0))
        slots = kv_slot_mapping[rows]
        page, offset = slots // block, slots % block
        codes[page, offset] = fp8.encode_e4m3(key / scale).view(torch.uint8)
        scales[page, offset] = scale.view(torch.uint8)


def indexer_pages(cache_2d: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the indexer's page tensor (uint8 [P, bytes]): codes [P, B, 128], scale bytes [P, B, 4]."""
    data = block_size * INDEXER_DIM
    end = data + block_size * INDEXER_SCALE_BYTES
    if cache_2d.shape[1] < end:
        raise ValueError(
            f"indexer page: expected at least {end} bytes for {block_size} rows, got {cache_2d.shape[1]}; "
            "the cache was not allocated for 128 E4M3 values and a float32 scale a row"
        )
    return (
        cache_2d[:, :data].unflatten(1, (block_size, INDEXER_DIM)),
        cache_2d[:, data:end].unflatten(1, (block_size, INDEXER_SCALE_BYTES)),
    )


def _ending(positions: torch.Tensor, slots: torch.Tensor, ratio: int, window: int, dim: int):
    """Indices of the tokens that end a window and have a slot, in parts of bounded scratch."""
    rows = torch.nonzero(((positions + 1) % ratio == 0) & (slots >= 0)).squeeze(1)
    for part in slices(rows.shape[0], window * dim * 16):
        yield rows[part]


def _window_start(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    return positions // ratio * ratio


def _pool(state_cache: torch.Tensor, gather_slots: torch.Tensor, ratio: int, dim: int) -> torch.Tensor:
    """Average of the window's values, each channel weighted by its own softmax of scores: float32 [N, dim]."""
    block = state_cache.shape[1]
    halves = state_cache.unflatten(2, (2, state_cache.shape[2] // 2))
    valid = gather_slots >= 0
    slots = gather_slots.clamp(min=0)
    # With overlap the window is two ratios long, and its newer half reads the second set of channels.
    parts = [halves[..., :dim][slots[:, :ratio] // block, slots[:, :ratio] % block]]
    if slots.shape[1] > ratio:
        parts.append(halves[..., dim : 2 * dim][slots[:, ratio:] // block, slots[:, ratio:] % block])
    state = torch.cat(parts, dim=1)
    value, score = state[:, :, 0], state[:, :, 1]
    score = score.masked_fill(~valid.unsqueeze(-1), -torch.inf)
    value = value.masked_fill(~valid.unsqueeze(-1), 0.0)
    return (score.softmax(1) * value).sum(1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
