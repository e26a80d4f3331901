"""PyTorch forms of the six Triton kernels that build DeepSeek-V4's attention metadata.

vLLM's dispatcher calls a replacement with the launch arguments under the kernel's own parameter names, but not with the
launch grid: where the grid alone says how many programs run, the shapes of the buffers say it here. Pointers arrive
as tensors. Under a name in ``REPLACEMENTS`` a function fills every element that the kernel of that name fills.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def token_request_mapping(
    query_start_loc: torch.Tensor, output: torch.Tensor, num_reqs: int, num_mapped: int, num_tokens: int, **launch: int
) -> None:
    """output[t] = request of token t for t < num_mapped, 0 up to num_tokens. query_start_loc int [num_reqs + 1]."""
    token = torch.arange(num_tokens, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1 : num_reqs + 1].contiguous(), token, right=True)
    request.clamp_(max=num_reqs - 1).masked_fill_(token >= num_mapped, 0)
    output[:num_tokens] = request


def swa_indices_and_lens(
    swa_indices_ptr: torch.Tensor,
    swa_indices_stride: int,
    swa_lens_ptr: torch.Tensor,
    window_size: int,
    index_width: int,
    left_visible_ptr: torch.Tensor,
    right_visible_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    token_to_req_indices_ptr: torch.Tensor,
    is_valid_token_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    replay_start_ptr: torch.Tensor,
    token_offset: int,
    HAS_IMAGE: bool,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slots of each token's sliding window, oldest first, then -1, and their number; padded tokens get -1 and 0.

    Row r describes token ``token_offset + r``. A decode launch covers the decode tokens only, its buffers the whole
    batch: the rows of the prefill tokens behind them are filled too, and every reader cuts them off.
    """
    rows = min(swa_indices_ptr.shape[0], is_valid_token_ptr.shape[0] - token_offset)
    token = torch.arange(token_offset, token_offset + rows)
    valid = is_valid_token_ptr[token]
    request = token_to_req_indices_ptr[token].to(torch.int64).masked_fill_(~valid, 0)
    position = _position(query_start_loc_ptr, seq_lens_ptr, token, request)
    left = left_visible_ptr[token].to(torch.int64) if HAS_IMAGE else 0
    right = right_visible_ptr[token].to(torch.int64) if HAS_IMAGE else 0
    reach = window_size - 1
    start = position - reach - (torch.clamp(left - reach, min=0) if HAS_IMAGE else 0)
    start = torch.maximum(start.clamp_(min=0), replay_start_ptr[request].to(torch.int64))
    length = (position + right + 1 - start).masked_fill_(~valid, 0)
    swa_lens_ptr[:rows] = length
    offset = torch.arange(index_width)
    inside = offset < length.unsqueeze(1)
    place = (start.unsqueeze(1) + offset).masked_fill_(~inside, 0)
    slot = _slot(block_table_ptr, request.unsqueeze(1), place, block_size)
    swa_indices_ptr[:rows].view(rows, -1)[:, :index_width] = slot.masked_fill_(~inside, -1)


def prefill_gather_lens(
    prefill_gather_lens_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    replay_start_ptr: torch.Tensor,
    num_prefills: int,
    num_decodes: int,
    window_size: int,
    BLOCK_SIZE: int,
) -> None:
    """For each prefill request: its query length plus the part of its context that the window still reaches."""
    part = slice(num_decodes, num_decodes + num_prefills)
    query_len = query_start_loc_ptr.diff()[part]
    visible = (seq_lens_ptr[part] - query_len - replay_start_ptr[part]).clamp(min=0)
    prefill_gather_lens_ptr[:num_prefills] = query_len + visible.clamp(max=window_size - 1)


def compressed_slot_mapping(
    compressed_slot_mapping_ptr: torch.Tensor,
    slot_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    COMPRESS_RATIO: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slot of the compressed state that each token completes; PAD_ID for tokens that complete none or are padding."""
    token, request = _tokens(query_start_loc_ptr[: block_table_ptr.shape[0] + 1])
    if token.numel() == 0:
        return
    position = _position(query_start_loc_ptr, seq_lens_ptr, token, request)
    valid = ((position + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[token] != PAD_ID)
    local = position // (cp_interleave * dcp_world_size) * cp_interleave + position % cp_interleave
    place = (local // COMPRESS_RATIO).masked_fill_(~valid, 0)
    slot = _slot(block_table_ptr, request, place, block_size)
    compressed_slot_mapping_ptr[token] = slot.masked_fill_(~valid, PAD_ID)


def prepare_uniform_decode(
    seq_lens_ptr: torch.Tensor,
    decode_seq_lens_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    expanded_block_table_ptr: torch.Tensor,
    expanded_bt_stride: int,
    decode_lens_ptr: torch.Tensor,
    max_decode_len: int,
    BLOCK_SIZE: int,
) -> None:
    """Turn requests of ``max_decode_len`` tokens into requests of one: lengths, block table rows, and ones."""
    index = torch.arange(seq_lens_ptr.shape[0] * max_decode_len)
    request = index // max_decode_len
    length = seq_lens_ptr[request] - max_decode_len + index % max_decode_len + 1
    decode_seq_lens_ptr[: index.shape[0]] = length.clamp_(min=0)
    width = min(expanded_block_table_ptr.shape[1], block_table_ptr.shape[1])
    expanded_block_table_ptr[: index.shape[0], :width] = block_table_ptr[request, :width]
    decode_lens_ptr[: index.shape[0]] = 1


def build_prefill_chunk_metadata(
    query_start_loc_ptr: torch.Tensor,
    uncompressed_seq_lens_ptr: torch.Tensor,
    cu_compressed_seq_lens_ptr: torch.Tensor,
    row_start_cu_compressed_seq_lens_ptr: torch.Tensor,
    token_to_seq_ptr: torch.Tensor,
    cu_compressed_seq_len_ks_ptr: torch.Tensor,
    cu_compressed_seq_len_ke_ptr: torch.Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    BLOCK_SIZE: int,
    COMPRESS_RATIO: int,
) -> None:
    """First and last compressed row that each query token of the slice may read, and each row's request."""
    token, request = _tokens(query_start_loc_ptr)
    inside = (token >= query_slice_start) & (token < query_slice_stop)
    token, request = token[inside], request[inside]
    length = (_position(query_start_loc_ptr, uncompressed_seq_lens_ptr, token, request) + 1) // COMPRESS_RATIO
    if DCP_WORLD > 1:
        base = length // DCP_INTERLEAVE // DCP_WORLD * DCP_INTERLEAVE
        rest = length - base * DCP_WORLD - DCP_RANK * DCP_INTERLEAVE
        length = base + rest.clamp_(0, DCP_INTERLEAVE)
    row_start = row_start_cu_compressed_seq_lens_ptr[request].to(torch.int64)
    cu_compressed_seq_len_ks_ptr[token - query_slice_start] = row_start.to(cu_compressed_seq_len_ks_ptr.dtype)
    cu_compressed_seq_len_ke_ptr[token - query_slice_start] = (row_start + length).to(
        cu_compressed_seq_len_ke_ptr.dtype
    )
    requests = query_start_loc_ptr.shape[0] - 1
    row, owner = _tokens(cu_compressed_seq_lens_ptr[: requests + 1])
    token_to_seq_ptr[row] = owner.to(token_to_seq_ptr.dtype)


REPLACEMENTS: dict[str, Callable[..., None]] = {
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
    "vllm.v1.attention.backends.mla.sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": swa_indices_and_lens,
    "vllm.v1.attention.backends.mla.sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_gather_lens,
    "vllm.v1.attention.backends.mla.compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
    "vllm.v1.attention.backends.mla.indexer.PrepareUniformDecodeKernel.kernel": prepare_uniform_decode,
    "vllm.v1.attention.backends.mla.indexer.BuildPrefillChunkMetadataKernel.kernel": build_prefill_chunk_metadata,
}


def register_metadata_kernels() -> None:
    """Replace the six kernels through vLLM's own dispatcher. For hosts without a Triton that runs on the CPU."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(REPLACEMENTS)


def _tokens(start_loc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every index from start_loc[0] to start_loc[-1], and the segment that it belongs to: int64."""
    lengths = start_loc.to(torch.int64).diff()
    segment = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths)
    return torch.arange(segment.shape[0]) + start_loc[0], segment


def _position(
    start_loc: torch.Tensor, seq_lens: torch.Tensor, token: torch.Tensor, request: torch.Tensor
) -> torch.Tensor:
    """Position of each token in its request, int64: the query tokens are the request's last."""
    return token + (seq_lens[request] - start_loc[request + 1]).to(torch.int64)


def _slot(block_table: torch.Tensor, request: torch.Tensor, place: torch.Tensor, block_size: int) -> torch.Tensor:
    return block_table[request, place // block_size].to(torch.int64) * block_size + place % block_size
