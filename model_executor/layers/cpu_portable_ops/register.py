"""Registration of the operators under the names and schemas of vLLM's compiled library.

Call ``register_missing_ops`` after the compiled library is loaded, so that its own operators win, and before
``vllm._custom_ops`` asks which operators exist: that module then declares the shapes (fakes) of these ones too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import attention, compressor, hyper_connection, indexer, linear, routing

_COMPRESS_ARGUMENTS = (
    "(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping, Tensor rms_norm_weight, "
    "float rms_norm_eps, Tensor cos_sin_cache, Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) "
    "-> ()"
)

# Schemas of the vLLM release that patches/ names; a call that does not match one fails at the dispatcher.
OPERATORS: dict[Callable, str] = {
    attention.fused_qnorm_rope_kv_insert_cpu: (
        "(Tensor q, Tensor kv, Tensor positions, Tensor(a!) swa_kv_cache_2d, Tensor slot_mapping, "
        "Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size) -> Tensor"
    ),
    attention.flash_mla_with_kvcache_cpu: (
        "(Tensor(a!) out, Tensor q, Tensor window_cache_2d, Tensor window_slots, int window_block_size, "
        "Tensor compressed_cache_2d, Tensor compressed_slots, int compressed_block_size, Tensor attn_sink, "
        "float scale) -> ()"
    ),
    attention.inverse_gptj_rope_o_proj_cpu: (
        "(Tensor o, Tensor positions, Tensor cos_sin_cache, int rope_dim) -> Tensor"
    ),
    compressor.save_partial_states_cpu: (
        "(Tensor kv, Tensor score, Tensor ape, Tensor positions, Tensor(a!) state_cache, Tensor slot_mapping) -> ()"
    ),
    compressor.compress_norm_rope_store_cpu: _COMPRESS_ARGUMENTS,
    compressor.compress_norm_rope_store_indexer_cpu: _COMPRESS_ARGUMENTS,
    indexer.fused_indexer_q_rope_quant_cpu: (
        "(Tensor positions, Tensor index_q, Tensor index_q_cos_sin_cache, Tensor(a!) index_q_fp8, "
        "Tensor index_weights, float index_weights_softmax_scale, float index_weights_head_scale, "
        "Tensor(b!) index_weights_out) -> ()"
    ),
    indexer.fp8_paged_mqa_logits_cpu: (
        "(Tensor q_fp8, Tensor kvcache_fp8, Tensor weight, Tensor seq_lens, Tensor page_table, int block_size, "
        "int max_seq_len) -> Tensor"
    ),
    indexer.topk_transform_512_cpu: (
        "(Tensor scores, Tensor seq_lens, Tensor page_tables, Tensor(a!) out_page_indices, int page_size, "
        "Tensor(b!)? out_raw_indices) -> ()"
    ),
    routing.biased_topk_cpu: (
        "(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int topk, bool renormalize, "
        "str scoring_func, int num_fused_shared_experts, float? routed_scaling_factor, "
        "bool apply_routed_scaling_factor_on_output) -> (Tensor, Tensor)"
    ),
    routing.hash_topk_cpu: (
        "(Tensor gating_output, Tensor tid2eid, int topk, str scoring_func, int num_fused_shared_experts, "
        "int num_experts, float routed_scaling_factor) -> (Tensor, Tensor)"
    ),
    hyper_connection.hc_pre_fused_cpu: (
        "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, int sinkhorn_iters, float rms_eps, "
        "float hc_eps) -> (Tensor, Tensor, Tensor)"
    ),
    hyper_connection.hc_post_fused_cpu: "(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor",
    hyper_connection.hc_head_fused_cpu: (
        "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, float hc_eps, float norm_eps) -> Tensor"
    ),
    linear.convert_weight_packed: "(Tensor! weight) -> Tensor",
    linear.weight_packed_linear: (
        "(Tensor(a0!) out, Tensor(a1) mat1, Tensor(a2) mat2, Tensor(a3)? bias, bool is_vnni) -> ()"
    ),
    linear.bmm_cpu: "(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()",
    linear.fp8_scaled_mm_cpu: (
        "(Tensor(a0!) mat1, Tensor(a1!) mat2, Tensor(a2!) scales2, SymInt[] block_size, Tensor? bias, "
        "ScalarType out_dtype, bool is_vnni) -> Tensor"
    ),
}

# A torch.library.Library unregisters its operators when it is collected.
_libraries: list[torch.library.Library] = []


def register_missing_ops(namespace: str = "_C") -> list[str]:
    """Provide every operator that ``torch.ops.<namespace>`` lacks; returns their names (none on a second call)."""
    present = getattr(torch.ops, namespace)
    missing = {function: schema for function, schema in OPERATORS.items() if not hasattr(present, function.__name__)}
    if missing:
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        for function, schema in missing.items():
            library.define(function.__name__ + schema)
            library.impl(function.__name__, function, "CPU")
    return [function.__name__ for function in missing]
