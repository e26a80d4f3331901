"""Registration of the portable operators: only where absent, under vLLM's schemas."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
import torch

from . import portable_cases as cases

# isort: split
from cpu_portable_ops import register


def test_present_operators_are_kept_and_absent_ones_provided():
    native = torch.library.Library("portable_test_a", "DEF")
    native.define("bmm_cpu" + register.OPERATORS[register.linear.bmm_cpu])
    native.impl("bmm_cpu", lambda out, *_: [out.fill_(42), None][1], "CPU")
    provided = register.register_missing_ops("portable_test_a")
    assert set(provided) == {f.__name__ for f in register.OPERATORS} - {"bmm_cpu"}
    assert register.register_missing_ops("portable_test_a") == []
    case = cases.batched_mm(cases.generator())
    torch.ops.portable_test_a.bmm_cpu(*case.values())
    assert (case["out"] == 42).all()


def test_operators_run_through_the_dispatcher():
    register.register_missing_ops("portable_test_b")
    ops, g = torch.ops.portable_test_b, cases.generator()
    calls = {
        "fused_qnorm_rope_kv_insert_cpu": cases.qnorm_insert(g),
        "flash_mla_with_kvcache_cpu": cases.flash_mla(g),
        "inverse_gptj_rope_o_proj_cpu": cases.inverse_rope(g),
        "save_partial_states_cpu": cases.save_states(g),
        "compress_norm_rope_store_cpu": cases.compress(g, 512, 4),
        "compress_norm_rope_store_indexer_cpu": cases.compress(g, 128, 4),
        "fused_indexer_q_rope_quant_cpu": cases.indexer_q(g),
        "fp8_paged_mqa_logits_cpu": cases.mqa_logits(g, True),
        "topk_transform_512_cpu": cases.topk(g, False),
        "biased_topk_cpu": cases.biased(g),
        "hash_topk_cpu": cases.hashed(g),
        "hc_pre_fused_cpu": cases.hyper_pre(g),
        "hc_post_fused_cpu": cases.hyper_post(g),
        "hc_head_fused_cpu": cases.hyper_head(g),
        "fp8_scaled_mm_cpu": cases.scaled_mm(g),
        "bmm_cpu": cases.batched_mm(g),
    }
    with torch.inference_mode():
        for name, case in calls.items():
            case = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
            getattr(ops, name)(*case.values())
            getattr(ops, name)(**case)


@pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed: no library to read schemas from")
def test_schemas_are_those_of_the_compiled_library():
    library = Path(util.find_spec("vllm").origin).with_name("_C.abi3.so").read_bytes()
    for function, schema in register.OPERATORS.items():
        assert (function.__name__ + schema).encode() in library, f"{function.__name__}: schema differs from vLLM's"
