"""The portable CPU operators against vLLM's compiled ones, on a host that has both (AVX512_BF16).

Integer outputs and cache bytes must agree but for rounding ties; products agree to the rounding of their operands.
The native reader of E4M3 cache rows approximates zeros and subnormals, so the attention inputs hold normal codes only.
"""

from __future__ import annotations

from importlib import util

import pytest
import torch

from . import portable_cases as cases

# isort: split
from cpu_portable_ops import attention, compressor, hyper_connection, indexer, linear, routing

if util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: there are no native operators", allow_module_level=True)
if not torch.cpu._is_avx512_bf16_supported():
    pytest.skip("this CPU lacks AVX512_BF16: vLLM has no native operators for it", allow_module_level=True)

BF16 = 2.0**-7  # one unit in the last place of bfloat16, relative


@pytest.fixture(scope="module", autouse=True)
def native():
    import vllm._custom_ops  # noqa: F401  loads the library

    return torch.ops._C


def run(function, case: dict) -> tuple[dict, list]:
    """Call with copies that keep strides; returns the copies (outputs among them) and the results."""
    copies = {}
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            pool = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            pool.copy_(value)
            value = pool
        copies[name] = value
    result = function(*copies.values())
    return copies, [] if result is None else list(result) if isinstance(result, tuple) else [result]


def both(native, function, case: dict) -> tuple[tuple[dict, list], tuple[dict, list]]:
    return run(function, case), run(getattr(native, function.__name__), case)


def close(one, other, relative: float = 1e-5, absolute: float = 1e-5) -> None:
    torch.testing.assert_close(one.float(), other.float(), rtol=relative, atol=absolute, equal_nan=True)


def same_bytes(one: torch.Tensor, other: torch.Tensor, share: float = 2e-3) -> None:
    one, other = one.view(torch.uint8), other.view(torch.uint8)
    step = (one.int() - other.int()).abs()
    assert float((step > 0).float().mean()) <= share, f"{int((step > 0).sum())} of {step.numel()} bytes differ"


def test_query_norm_and_window_insert(native):
    (mine, [q]), (theirs, [q2]) = both(
        native, attention.fused_qnorm_rope_kv_insert_cpu, cases.qnorm_insert(cases.generator())
    )
    close(q, q2, BF16)
    same_bytes(mine["swa_kv_cache_2d"], theirs["swa_kv_cache_2d"])


@pytest.mark.parametrize("tokens,compressed,spread", [(1, 5, False), (20, 5, False), (20, 0, False), (9, 5, True)])
def test_sparse_attention(native, tokens: int, compressed: int, spread: bool):
    case = cases.flash_mla(cases.generator(), tokens, compressed=compressed, spread=spread)
    (mine, _), (theirs, _) = both(native, attention.flash_mla_with_kvcache_cpu, case)
    # The native kernel rounds softmax weights to bfloat16 before the second product.
    close(mine["out"], theirs["out"], 4 * BF16, 2e-2)


def test_inverse_rotation(native):
    (_, [mine]), (_, [theirs]) = both(
        native, attention.inverse_gptj_rope_o_proj_cpu, cases.inverse_rope(cases.generator())
    )
    close(mine, theirs)


@pytest.mark.parametrize("width,ratio", [(1024, 4), (512, 128), (256, 4)])
def test_partial_states(native, width: int, ratio: int):
    case = cases.save_states(cases.generator(), width, ratio)
    (mine, _), (theirs, _) = both(native, compressor.save_partial_states_cpu, case)
    close(mine["state_cache"], theirs["state_cache"], 0, 0)


@pytest.mark.parametrize("dim,ratio,tokens", [(512, 4, 14), (512, 128, 300), (128, 4, 30)])
def test_compressed_rows(native, dim: int, ratio: int, tokens: int):
    name = "compress_norm_rope_store_cpu" if dim == 512 else "compress_norm_rope_store_indexer_cpu"
    case = cases.compress(cases.generator(), dim, ratio, tokens)
    (mine, _), (theirs, _) = both(native, getattr(compressor, name), case)
    same_bytes(mine["kv_cache_2d"], theirs["kv_cache_2d"], 5e-3)


def test_indexer_query(native):
    case = cases.indexer_q(cases.generator())
    (mine, _), (theirs, _) = both(native, indexer.fused_indexer_q_rope_quant_cpu, case)
    same_bytes(mine["index_q_fp8"], theirs["index_q_fp8"])
    close(mine["index_weights_out"], theirs["index_weights_out"])


@pytest.mark.parametrize("shared", [True, False])
def test_indexer_logits(native, shared: bool):
    case = cases.mqa_logits(cases.generator(), shared)
    (_, [mine]), (_, [theirs]) = both(native, indexer.fp8_paged_mqa_logits_cpu, case)
    for row, length in enumerate(case["seq_lens"].tolist()):
        close(mine[row, :length], theirs[row, :length], 1e-4, 1e-2)


def test_best_512(native):
    (mine, _), (theirs, _) = both(native, indexer.topk_transform_512_cpu, cases.topk(cases.generator(), False))
    for name in ("out_raw_indices", "out_page_indices"):
        assert torch.equal(mine[name].sort(1).values, theirs[name].sort(1).values)


def test_best_512_of_equal_scores(native):
    """Which of equal scores are taken is free; the scores that are taken are not."""
    (mine, _), (theirs, _) = both(native, indexer.topk_transform_512_cpu, cases.topk(cases.generator(), True))
    taken = []
    for result in (mine, theirs):
        index = result["out_raw_indices"].long()
        scores = result["scores"].gather(1, index.clamp(min=0))
        taken.append(scores.masked_fill(index < 0, -torch.inf).sort(1).values)
    assert torch.equal(*taken)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_biased_routing(native, scoring: str):
    case = cases.biased(cases.generator(), 64, scoring)
    (_, [weights, ids]), (_, [weights2, ids2]) = both(native, routing.biased_topk_cpu, case)
    assert torch.equal(ids, ids2)
    close(weights, weights2, 1e-3)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_hash_routing(native, scoring: str):
    case = cases.hashed(cases.generator(), 64, scoring)
    (_, [weights, ids]), (_, [weights2, ids2]) = both(native, routing.hash_topk_cpu, case)
    assert torch.equal(ids, ids2)
    close(weights, weights2, 1e-3)


@pytest.mark.parametrize("function", ["hc_pre_fused_cpu", "hc_post_fused_cpu", "hc_head_fused_cpu"])
def test_hyper_connections(native, function: str):
    case = getattr(cases, {"pre": "hyper_pre", "post": "hyper_post", "head": "hyper_head"}[function.split("_")[1]])
    (_, mine), (_, theirs) = both(native, getattr(hyper_connection, function), case(cases.generator()))
    for one, other in zip(mine, theirs, strict=True):
        close(one, other, BF16 if one.dtype == torch.bfloat16 else 1e-4, 1e-4)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_block_scaled_linear(native, m: int):
    (_, [mine]), (_, [theirs]) = both(native, linear.fp8_scaled_mm_cpu, cases.scaled_mm(cases.generator(), m))
    # Sums of 256 terms, about 50 in size: what cancels to nearly zero keeps the terms' absolute error.
    close(mine, theirs, 2 * BF16, 0.25)
    assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) <= 4e-3


def test_batched_product(native):
    (mine, _), (theirs, _) = both(native, linear.bmm_cpu, cases.batched_mm(cases.generator()))
    close(mine["out"], theirs["out"], BF16, 1e-2)
