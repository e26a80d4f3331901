"""Routing, dense products and hyper-connections of the portable CPU operators, against float64."""

from __future__ import annotations

import pytest
import torch

from . import portable_cases as cases
from . import portable_reference as ref
from .portable_reference import BF16, close

# isort: split
from cpu_portable_ops import hyper_connection, linear, routing


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_biased_routing(scoring: str, renormalize: bool):
    case = cases.biased(cases.generator(), 64, scoring, renormalize)
    weights, ids = routing.biased_topk_cpu(**case)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    for t in range(7):
        score = [ref.score(v, scoring) for v in case["gating_output"][t].tolist()]
        bias = case["correction_bias"].tolist()
        best = sorted(range(64), key=lambda e: -(score[e] + bias[e]))[:6]
        assert ids[t].tolist() == best
        factor = 1.5 / sum(score[e] for e in best) if renormalize else 1.0
        close(weights[t], [score[e] * factor for e in best])
    with pytest.raises(ValueError, match="scoring_func"):
        routing.biased_topk_cpu(**case | {"scoring_func": "tanh"})
    with pytest.raises(ValueError, match="shared experts"):
        routing.biased_topk_cpu(**case | {"num_fused_shared_experts": 1})


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_hash_routing(scoring: str):
    case = cases.hashed(cases.generator(), 64, scoring)
    weights, ids = routing.hash_topk_cpu(**case)
    assert torch.equal(ids, case["tid2eid"])
    gate = case["gating_output"].double()
    for t in range(7):
        if scoring == "softmax":
            close(weights[t], gate[t].softmax(0)[ids[t].long()])
            continue
        score = [ref.score(float(gate[t, e]), scoring) for e in ids[t].tolist()]
        close(weights[t], [s / sum(score) * 1.5 for s in score])
    with pytest.raises(ValueError, match="tid2eid"):
        routing.hash_topk_cpu(**case | {"topk": 5})


@pytest.mark.parametrize("m,n,k,block_n", [(3, 160, 256, 128), (1, 5000, 128, 128), (4, 96, 200, 64), (2, 96, 256, 96)])
def test_block_scaled_linear(m: int, n: int, k: int, block_n: int):
    case = cases.scaled_mm(cases.generator(), m, n, k, block_n)
    case["out_dtype"] = torch.float32
    out = linear.fp8_scaled_mm_cpu(**case)
    weight = torch.empty(n, k, dtype=torch.float64)
    for r in range(n):
        for block in range(-(-k // 128)):
            part = slice(128 * block, 128 * block + 128)
            weight[r, part] = case["mat2"][r, part].double() * case["scales2"][r // block_n, block].double()
    expected = case["mat1"].double() @ weight.T
    close(out, expected + case["bias"], 1e-5, 1e-4)
    packed = case | {"mat2": linear.convert_weight_packed(case["mat2"]), "is_vnni": True, "bias": None}
    close(linear.fp8_scaled_mm_cpu(**packed), expected, 1e-5, 1e-4)
    assert linear.fp8_scaled_mm_cpu(**case | {"out_dtype": torch.bfloat16}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="scales"):
        linear.fp8_scaled_mm_cpu(**case | {"scales2": case["scales2"].bfloat16()})


def test_batched_and_packed_products():
    case = cases.batched_mm(cases.generator())
    packed = linear.convert_weight_packed(case["mat2"])
    assert packed.data_ptr() != case["mat2"].data_ptr()
    linear.bmm_cpu(**case | {"mat2": packed, "is_vnni": True})
    expected = torch.bmm(case["mat1"].double(), case["mat2"].double().transpose(1, 2))
    close(case["out"], expected, BF16, 1e-5)
    e4m3 = case["mat2"].to(torch.float8_e4m3fn)
    linear.bmm_cpu(**case | {"mat2": e4m3, "scale": torch.tensor(0.5)})
    close(case["out"], torch.bmm(case["mat1"].double(), e4m3.double().transpose(1, 2)) / 2, BF16, 1e-5)
    out, bias = torch.full((5, 64), torch.nan), torch.arange(64.0)
    linear.weight_packed_linear(out, case["mat1"][0], packed[0], bias, True)
    close(out, expected[0] + bias, 1e-5, 1e-4)
    with pytest.raises(ValueError, match="convert_weight_packed"):
        linear.convert_weight_packed(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="scale"):
        linear.bmm_cpu(**case | {"scale": torch.tensor(0.5)})


def test_hyper_connection_pre():
    case = cases.hyper_pre(cases.generator())
    y, post, comb = hyper_connection.hc_pre_fused_cpu(**case)
    scale, base = case["hc_scale"].tolist(), case["hc_base"].tolist()
    for t in range(5):
        x = case["x"][t].double()
        root = float(x.square().mean() + case["rms_eps"]) ** -0.5
        mixes = (case["hc_fn"].double() @ x.flatten() * root).tolist()
        value = [mixes[i] * scale[min(i // 4, 2)] + base[i] for i in range(24)]
        gate = [ref.score(v, "sigmoid") for v in value]
        close(y[t], sum((gate[s] + case["hc_eps"]) * x[s] for s in range(4)), BF16, 1e-5)
        close(post[t], [2 * v for v in gate[4:8]])
        close(comb[t], ref.sinkhorn([value[8 + 4 * r : 12 + 4 * r] for r in range(4)], 20, case["hc_eps"]), 1e-4)


def test_hyper_connection_post_and_head():
    case = cases.hyper_post(cases.generator())
    out = hyper_connection.hc_post_fused_cpu(**case)
    for t in range(5):
        for s in range(4):
            expected = float(case["post"][t, s]) * case["x"][t].double()
            expected += sum(float(case["comb"][t, r, s]) * case["residual"][t, r].double() for r in range(4))
            close(out[t, s], expected, BF16, 1e-5)
    case = cases.hyper_head(cases.generator())
    out = hyper_connection.hc_head_fused_cpu(**case)
    for t in range(5):
        x = case["x"][t].double()
        mixes = case["hc_fn"].double() @ x.flatten() * float(x.square().mean() + case["norm_eps"]) ** -0.5
        gate = (mixes * 0.7 + case["hc_base"]).sigmoid() + case["hc_eps"]
        close(out[t], (gate.unsqueeze(1) * x).sum(0), BF16, 1e-5)
