"""``config.json``, ``hf_quant_config.json`` and ``generation_config.json``."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint_maker.geometry import HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, TILE, Geometry
from checkpoint_maker.tokenizer import BOS_ID, EOS_ID

_PRODUCER = {"name": "modelopt", "version": "dsv4-nvfp4-experts"}
_NOT_NVFP4 = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
_GROUP = 16


def write(directory: Path, g: Geometry, fmt: str, dequantize: bool) -> None:
    """Write the configuration of a checkpoint in format ``fmt``; dequantized ones are plain models."""
    config = model_config(g)
    if fmt != "bf16" and not dequantize:
        config["expert_dtype"] = "fp8" if fmt == "fp8" else "fp4"
        config["quantization_config"] = quantization_config(g, fmt)
    _dump(directory / "config.json", config)
    if fmt == "nvfp4" and not dequantize:
        quantization = _modelopt(g) | {"exclude_modules": _NOT_NVFP4}
        _dump(directory / "hf_quant_config.json", {"producer": _PRODUCER, "quantization": quantization})
    _dump(
        directory / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
    )


def model_config(g: Geometry) -> dict:
    """Fields that vLLM and transformers read, without quantization."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "vocab_size": g.vocab,
        "hidden_size": g.hidden,
        "moe_intermediate_size": g.intermediate,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "q_lora_rank": g.q_lora_rank,
        "o_lora_rank": g.o_lora_rank,
        "o_groups": g.o_groups,
        "hidden_act": "silu",
        "swiglu_limit": g.swiglu_limit,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": g.max_positions,
        "sliding_window": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": max(1, g.max_positions // 16),
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "num_nextn_predict_layers": 0,
        # One entry more than there are layers, as published: that of the next-token prediction layer.
        "compress_ratios": [*g.compress_ratios, 0],
        "index_n_heads": g.index_heads,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_topk": g.index_topk,
        "hc_mult": HC_MULT,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "n_routed_experts": g.experts_count,
        "n_shared_experts": 1,
        "num_experts_per_tok": g.top_k,
        "norm_topk_prob": True,
        "routed_scaling_factor": g.routed_scaling_factor,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "num_hash_layers": g.hash_layers,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def quantization_config(g: Geometry, fmt: str) -> dict:
    """``quantization_config`` of ``config.json``: FP8 blocks for linear layers and, for NVFP4, ModelOpt's fields."""
    base = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [TILE, TILE],
    }
    if fmt != "fp8":
        base["scale_fmt"] = "ue8m0"
    if fmt != "nvfp4":
        return base
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _GROUP}
    group = {"input_activations": four_bits, "weights": four_bits, "targets": ["Linear"]}
    return base | {
        "moe_quant_algo": "NVFP4",
        "producer": _PRODUCER,
        **_modelopt(g),
        "config_groups": {"group_0": group},
        "ignore": _NOT_NVFP4,
    }


def _modelopt(g: Geometry) -> dict:
    layer = {"quant_algo": "NVFP4", "group_size": _GROUP}
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": _GROUP,
        "quantized_layers": {f"layers.{index}.ffn.experts": layer for index in range(g.layers)},
    }


def _dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
