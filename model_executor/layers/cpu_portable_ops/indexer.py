"""Sparse indexer: quantise its queries, score the paged keys, keep the best 512 positions."""

from __future__ import annotations

import itertools

import torch

from . import fp8
from .chunking import slices
from .compressor import INDEXER_AMAX_FLOOR, INDEXER_DIM, indexer_pages
from .rope import rotate

TOPK = 512
# Tokens that share keys are scored in blocks whose float32 scores stay in cache.
_SCORE_BYTES = 8 << 20


def fused_indexer_q_rope_quant_cpu(
    positions: torch.Tensor,
    index_q: torch.Tensor,
    index_q_cos_sin_cache: torch.Tensor,
    index_q_fp8: torch.Tensor,
    index_weights: torch.Tensor,
    index_weights_softmax_scale: float,
    index_weights_head_scale: float,
    index_weights_out: torch.Tensor,
) -> None:
    """Rotate the last dimensions of each head, quantise it to E4M3, and fold its scale into the head's weight.

    index_q float32 [T, H, D]; index_q_fp8 float8_e4m3fn [T, H, D] and index_weights_out float32 [T, H], written.
    weights_out = weights * scale * softmax_scale * head_scale.
    """
    rope = index_q_cos_sin_cache.shape[1]
    for part in slices(index_q.shape[0], index_q.shape[1] * index_q.shape[2] * 16):
        head = index_q[part].clone()
        rotated = rotate(head[..., -rope:], positions[part], index_q_cos_sin_cache)
        head[..., -rope:] = rotated.bfloat16()
        amax = head.abs().amax(-1, keepdim=True).clamp_(min=INDEXER_AMAX_FLOOR)
        scale = fp8.exponent_to_scale(fp8.power_of_two_exponent(amax, 0.0))
        index_q_fp8[part] = fp8.encode_e4m3(head.div_(scale))
        weights = index_weights[part] * scale.squeeze(-1)
        index_weights_out[part] = weights.mul_(index_weights_softmax_scale).mul_(index_weights_head_scale)


def fp8_paged_mqa_logits_cpu(
    q_fp8: torch.Tensor,
    kvcache_fp8: torch.Tensor,
    weight: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    block_size: int,
    max_seq_len: int,
) -> torch.Tensor:
    """``sum over heads of weight * relu(q . k)``, times the key's scale: float32 [B, max_seq_len].

    q_fp8 float8_e4m3fn [B, H, 128]; weight float32 [B, H]; seq_lens int [B]; page_table int [B, pages]; kvcache_fp8
    uint8 pages as written by ``compress_norm_rope_store_indexer_cpu``. Columns at or past a row's length are -inf.
    """
    batch, heads, dim = q_fp8.shape
    if dim != INDEXER_DIM:
        raise ValueError(f"fp8_paged_mqa_logits_cpu: expected head_dim {INDEXER_DIM}, got {dim}")
    logits = torch.full((batch, max_seq_len), -torch.inf)
    if batch == 0 or max_seq_len == 0:
        return logits
    longest = min(int(seq_lens.max()), max_seq_len)
    lengths = seq_lens.to(torch.int64).clamp(max=max_seq_len)
    pages = page_table[:, : -(-longest // block_size)]
    # Rows of one request are neighbours and carry the same page table row: they share their keys.
    starts = torch.ones(batch, dtype=torch.bool)
    if batch > 1:
        starts[1:] = (pages[1:] != pages[:-1]).any(1)
    bounds = torch.cat((starts.nonzero().squeeze(1), torch.tensor([batch]))).tolist()
    if len(bounds) > batch:
        for part in slices(batch, 4 * pages.shape[1] * block_size * (INDEXER_DIM + heads)):
            _score_each(logits[part], q_fp8[part], kvcache_fp8, weight[part], lengths[part], pages[part], block_size)
    else:
        for first, last in itertools.pairwise(bounds):
            rows = slice(first, last)
            _score_shared(logits[rows], q_fp8[rows], kvcache_fp8, weight[rows], lengths[rows], pages[first], block_size)
    column = torch.arange(max_seq_len)
    return logits.masked_fill_(column >= lengths.unsqueeze(1), -torch.inf)


def _score_shared(
    logits: torch.Tensor,
    q_fp8: torch.Tensor,
    cache_2d: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
) -> None:
    """Logits of queries that share one row of pages."""
    length = int(lengths.max())
    if length <= 0:
        return
    key, scale = _keys(cache_2d, pages[: -(-length // block_size)], block_size)
    key, scale = key[:length], scale[:length]
    heads = q_fp8.shape[1]
    for part in slices(q_fp8.shape[0], 0, max(1, _SCORE_BYTES // (4 * heads * length))):
        query = fp8.decode_e4m3(q_fp8[part])
        scores = torch.nn.functional.relu_(query.flatten(0, 1) @ key.T).view(-1, heads, length)
        logits[part, :length] = torch.bmm(weight[part].unsqueeze(1), scores).squeeze(1).mul_(scale)


def _score_each(
    logits: torch.Tensor,
    q_fp8: torch.Tensor,
    cache_2d: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
) -> None:
    """Logits of queries with a row of pages each. Pages past a row's length may be anything and are not followed."""
    used = torch.arange(pages.shape[1]) * block_size < lengths.unsqueeze(1)
    key, scale = _keys(cache_2d, pages.masked_fill(~used, 0), block_size)
    columns = min(key.shape[1], logits.shape[1])
    key, scale = key[:, :columns], scale[:, :columns]
    scores = torch.nn.functional.relu_(torch.bmm(fp8.decode_e4m3(q_fp8), key.transpose(1, 2)))
    logits[:, :columns] = torch.bmm(weight.unsqueeze(1), scores).squeeze(1).mul_(scale)


def _keys(cache_2d: torch.Tensor, pages: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled float32 keys [..., pages * block, 128] and their float32 scales [..., pages * block]."""
    codes, scales = indexer_pages(cache_2d, block_size)
    pages = pages.to(torch.int64)
    key = fp8.decode_e4m3(codes[pages].flatten(-3, -2))
    return key, scales[pages].view(torch.float32).flatten(-3)


def topk_transform_512_cpu(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_tables: torch.Tensor,
    out_page_indices: torch.Tensor,
    page_size: int,
    out_raw_indices: torch.Tensor | None = None,
) -> None:
    """Positions of the 512 best scores of each row, and the slots they live in.

    scores float32 [B, N], of which a row's first seq_lens[b] count; out_page_indices (slots) and out_raw_indices
    (positions) int32 [B, >=512], written in ascending position, then -1. Equal scores: the lower position wins.
    """
    batch, columns = scores.shape
    if out_page_indices.shape[1] < TOPK:
        raise ValueError(
            f"topk_transform_512_cpu: out_page_indices needs {TOPK} columns, has {out_page_indices.shape[1]}"
        )
    if batch == 0:
        return
    lengths = seq_lens.to(torch.int64).clamp(0, columns).unsqueeze(1)
    picked = torch.arange(TOPK).expand(batch, TOPK)
    picked = torch.where(picked < lengths, picked, -1)
    long_rows = torch.nonzero(lengths.squeeze(1) > TOPK).squeeze(1)
    for part in slices(long_rows.shape[0], columns * 32):
        rows = long_rows[part]
        picked[rows] = _best(scores[rows], lengths[rows])
    page = page_tables.gather(1, (picked // page_size).clamp_(min=0)).to(torch.int64)
    slots = torch.where(picked >= 0, page * page_size + picked % page_size, -1)
    out_page_indices[:, :TOPK] = slots
    if out_raw_indices is not None:
        out_raw_indices[:, :TOPK] = picked


def _best(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Ascending positions int64 [B, 512] of the best scores of rows longer than 512."""
    column = torch.arange(scores.shape[1])
    # A NaN score ranks last, as it does in a comparison-based heap; padding is past every valid column.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores.masked_fill_(column >= lengths, -torch.inf)
    threshold = scores.topk(TOPK, dim=1, sorted=False).values.amin(1, keepdim=True)
    better = scores > threshold
    tied = scores == threshold
    room = TOPK - better.sum(1, keepdim=True)
    better |= tied & (tied.cumsum(1) <= room)
    return better.nonzero()[:, 1].view(-1, TOPK)
