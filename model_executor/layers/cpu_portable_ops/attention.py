"""Multi-query attention over selected slots of two ``fp8_ds_mla`` caches, with the steps just before and after it."""

from __future__ import annotations

import torch

from . import mla_cache
from .chunking import slices
from .rope import rotate

# Tokens of one dense step: neighbours share their window and most of their compressed rows.
_DENSE_TOKENS = 128
# A dense step scores every row that any of its tokens selects. Beyond this ratio of distinct rows to rows selected per
# token, scoring each token's own rows is cheaper in spite of the slower batched product.
_DENSE_RATIO = 4


def fused_qnorm_rope_kv_insert_cpu(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    swa_kv_cache_2d: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
) -> torch.Tensor:
    """Normalise and rotate the query; rotate, quantise and store the key.

    q [T, H, 512], kv [>=N, 512], both bfloat16 (or float16); positions int64 [T]; slot_mapping int64 [N], negative =
    not stored; cos_sin_cache float32 [max_position, 64]. Returns [T, q_head_padded, 512] in q's type, padding heads
    zero. The window cache is written in place.
    """
    tokens, heads, dim = q.shape
    if dim != mla_cache.HEAD_DIM:
        raise ValueError(f"fused_qnorm_rope_kv_insert_cpu: q must have head_dim {mla_cache.HEAD_DIM}, got {dim}")
    nope = mla_cache.NOPE_DIM
    out = q.new_zeros(tokens, q_head_padded, dim)
    for part in slices(tokens, heads * dim * 16):
        x = q[part].float()
        x *= torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        out[part, :heads, :nope] = x[..., :nope]
        out[part, :heads, nope:] = rotate(x[..., nope:], positions[part], cos_sin_cache)
    for part in slices(slot_mapping.shape[0], dim * 32):
        rows = torch.nonzero(slot_mapping[part] >= 0).squeeze(1) + part.start
        if rows.numel() == 0:
            continue
        key = kv[rows]
        rope = rotate(key[:, nope:].float(), positions[rows], cos_sin_cache).bfloat16()
        mla_cache.write(
            swa_kv_cache_2d, slot_mapping[rows], cache_block_size, key[:, :nope].bfloat16(), rope, flush_subnormals=True
        )
    return out


def inverse_gptj_rope_o_proj_cpu(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_dim: int
) -> torch.Tensor:
    """Undo the rotation of the last ``rope_dim`` values: o [T, H, D] -> float32 [T, H, D]."""
    out = o.to(torch.float32, copy=True)
    for part in slices(o.shape[0], o.shape[1] * rope_dim * 16):
        out[part, :, -rope_dim:] = rotate(out[part, :, -rope_dim:], positions[part], cos_sin_cache, inverse=True)
    return out


def flash_mla_with_kvcache_cpu(
    out: torch.Tensor,
    q: torch.Tensor,
    window_cache_2d: torch.Tensor,
    window_slots: torch.Tensor,
    window_block_size: int,
    compressed_cache_2d: torch.Tensor,
    compressed_slots: torch.Tensor,
    compressed_block_size: int,
    attn_sink: torch.Tensor,
    scale: float,
) -> None:
    """Attention of each token over its own slots; keys are the values.

    q, out bfloat16 [T, H, 512]; *_slots int64 [T, K], ignored where negative or past the cache; *_cache_2d uint8 pages;
    attn_sink float32 [H], the logit of a virtual key with value zero. Tokens without a valid slot give zeros.
    """
    if q.dim() != 3 or q.shape[2] != mla_cache.HEAD_DIM or out.shape != q.shape:
        raise ValueError(
            f"flash_mla_with_kvcache_cpu: q and out must be [tokens, heads, {mla_cache.HEAD_DIM}], "
            f"got {tuple(q.shape)} and {tuple(out.shape)}"
        )
    tokens, heads, _ = q.shape
    caches = ((window_cache_2d, window_slots, window_block_size),)
    if compressed_slots.shape[1]:
        caches += ((compressed_cache_2d, compressed_slots, compressed_block_size),)
    width = sum(slots.shape[1] for _, slots, _ in caches)
    for part in slices(tokens, 8 * heads * width, _DENSE_TOKENS):
        query = q[part].float()
        query *= scale
        selected = [(cache, _mask(cache, slots[part], block), block) for cache, slots, block in caches]
        if part.stop - part.start == 1:
            _attend_one(out[part], query, selected, attn_sink)
        elif not _attend_dense(out[part], query, selected, width, attn_sink):
            _attend_gathered(out[part], query, selected, width, attn_sink)


def _mask(cache: torch.Tensor, slots: torch.Tensor, block: int) -> torch.Tensor:
    """Slots with every invalid one as -1."""
    return torch.where(slots < cache.shape[0] * block, slots, -1).clamp_(min=-1)


def _weights(scores: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
    """Softmax of scores [T, H, N] with the sink in the denominator; rows of -inf give zeros. In place."""
    sink = attn_sink.view(1, -1, 1)
    # Finite even where a row has neither a valid slot nor a finite sink: such a row is zero, not NaN.
    top = torch.maximum(scores.amax(-1, keepdim=True), sink).clamp_(min=-1e30)
    weights = scores.sub_(top).exp_()
    return weights.div_(weights.sum(-1, keepdim=True).add_(torch.exp(sink - top)).clamp_(min=1e-30))


def _attend_one(out: torch.Tensor, query: torch.Tensor, selected: list, attn_sink: torch.Tensor) -> None:
    """One token: its rows in the order of its slots."""
    key = _read_all([(cache, slots[slots >= 0], block) for cache, slots, block in selected])
    if key.shape[0] == 0:
        out.zero_()
        return
    weights = _weights((query[0] @ key.T).unsqueeze(0), attn_sink)
    out[0] = weights[0] @ key


def _read_all(selected: list) -> torch.Tensor:
    """Rows of all caches, one after the other: float32 [N, 512]."""
    key = torch.empty(sum(slots.shape[0] for _, slots, _ in selected), mla_cache.HEAD_DIM)
    start = 0
    for cache, slots, block in selected:
        mla_cache.read(cache, slots, block, out=key[start : start + slots.shape[0]])
        start += slots.shape[0]
    return key


def _distinct(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending distinct slots, and each slot's place among them."""
    low, high = (int(bound) for bound in slots.aminmax())
    if high - low > 8 * slots.numel():
        return torch.unique(slots, return_inverse=True)
    shifted = slots - low
    present = torch.zeros(high - low + 1, dtype=torch.bool)
    present[shifted.flatten()] = True
    return present.nonzero().squeeze(1).add_(low), (present.cumsum(0) - 1)[shifted]


def _attend_dense(out: torch.Tensor, query: torch.Tensor, selected: list, width: int, attn_sink: torch.Tensor) -> bool:
    """Score every token against every row that any token selects; False when that would be wasteful."""
    tokens, heads, dim = query.shape
    keys, counts = [], []
    distinct = [_distinct(slots) for _, slots, _ in selected]
    if sum(rows.shape[0] for rows, _ in distinct) > _DENSE_RATIO * width:
        return False
    for (cache, _, block), (rows, inverse) in zip(selected, distinct, strict=True):
        count = query.new_zeros(tokens, rows.shape[0])
        count.scatter_add_(1, inverse, query.new_ones(()).expand(inverse.shape))
        first = int(rows[0] < 0)
        keys.append((cache, rows[first:], block))
        counts.append(count[:, first:])
    key = _read_all(keys)
    # log(count) gives a slot its multiplicity, and minus infinity where a token does not select it.
    bias = torch.cat(counts, dim=1).log_()
    if key.shape[0] == 0:
        out.zero_()
        return True
    scores = (query.view(tokens * heads, dim) @ key.T).view(tokens, heads, -1)
    weights = _weights(scores.add_(bias.unsqueeze(1)), attn_sink)
    out.copy_((weights.view(tokens * heads, -1) @ key).view(tokens, heads, dim))
    return True


def _attend_gathered(
    out: torch.Tensor, query: torch.Tensor, selected: list, width: int, attn_sink: torch.Tensor
) -> None:
    """Score every token against a copy of its own rows."""
    tokens, heads, dim = query.shape
    for part in slices(tokens, 4 * width * (2 * dim + heads)):
        keys, valid = [], []
        for cache, slots, block in selected:
            slots = slots[part]
            keep = slots >= 0
            rows = mla_cache.read(cache, slots[keep], block)
            key = rows.new_zeros(*slots.shape, dim)
            key[keep] = rows
            keys.append(key)
            valid.append(keep)
        key, keep = torch.cat(keys, dim=1), torch.cat(valid, dim=1)
        scores = torch.bmm(query[part], key.transpose(1, 2))
        weights = _weights(scores.masked_fill_(~keep.unsqueeze(1), -torch.inf), attn_sink)
        out[part] = torch.bmm(weights, key).to(out.dtype)
