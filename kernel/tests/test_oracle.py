from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from moe_cases import GEOMETRY, random_batch, random_map, random_weights
from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import dequantized, expert_stages, moe_oracle, quantize_activations, swiglu
from nvfp4_megamoe.numerics import e2m1, metrics, nvfp4

PRECISIONS = ("w4a16", "w4a8", "w4a4")
LIMIT = GEOMETRY.swiglu_limit
WIDE = MoEGeometry(num_experts=2, num_local_experts=2, top_k=1, hidden=1024, intermediate=512, swiglu_limit=10.0)


def weight(packed, scale, global_scale, row, column):
    """One weight from its bits, without the product's own codecs."""
    byte = int(packed[row, column // 2])
    code = byte >> 4 if column % 2 else byte & 15
    bits = int(scale.view(torch.uint8)[row, column // 16])
    exponent, mantissa = bits >> 3, bits & 7
    block = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    magnitude = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
    return (-magnitude if code & 8 else magnitude) * block * float(global_scale)


@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
def test_weights_are_those_of_the_bits(rng, projection):
    weights = random_weights(GEOMETRY, rng)
    got = dequantized(weights, 5, projection)
    packed, scale, global_scale, _ = (part[5] for part in weights.projection(projection).values())
    for _ in range(200):
        row, column = (int(torch.randint(n, (), generator=rng)) for n in got.shape)
        assert float(got[row, column]) == weight(packed, scale, global_scale, row, column)


def test_w4a16_is_the_plain_formula(rng):
    geometry = dataclasses.replace(GEOMETRY, num_local_experts=5)
    weights, expert_map = random_weights(geometry, rng), random_map(geometry, rng)
    x, ids, routing = random_batch(geometry, 7, rng)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(7):
        for k in range(geometry.top_k):
            local = int(expert_map[ids[token, k]])
            if local < 0:
                continue
            gate, up, down = (dequantized(weights, local, p) for p in ("w1", "w3", "w2"))
            xt = x[token].double()
            hidden = []
            for g, u in zip((gate @ xt).tolist(), (up @ xt).tolist(), strict=True):
                g, u = min(g, LIMIT), max(-LIMIT, min(u, LIMIT))
                hidden.append(g / (1 + math.exp(-g)) * u)
            expected[token] += float(routing[token, k]) * (down @ torch.tensor(hidden).bfloat16().double())
    got = moe_oracle(weights, x, ids, routing, expert_map, LIMIT, "w4a16")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
    assert metrics.relative_l2(got, expected) < 1e-3  # bfloat16 decisions that float32 and float64 take differently


def test_the_clamp_is_one_sided_for_gate_and_two_sided_for_up():
    gate_up = torch.tensor([[-20.0, 20.0, 1.0, 1.0, 1.0, 1.0, 20.0, -20.0]], dtype=torch.float64)
    silu = [g / (1 + math.exp(-g)) for g in (-20.0, 10.0, 1.0, 1.0)]
    expected = torch.tensor([[silu[0], silu[1], silu[2] * 10, silu[3] * -10]], dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate_up, 10.0), expected)
    assert float(swiglu(gate_up, None)[0, 2]) == pytest.approx(silu[2] * 20)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ranks_add_up_to_the_whole_layer(rng, precision):
    weights = random_weights(GEOMETRY, rng)
    batch = random_batch(GEOMETRY, 9, rng)
    whole = moe_oracle(weights, *batch, None, LIMIT, precision)
    parts = torch.zeros_like(whole)
    owner = torch.randint(3, (GEOMETRY.num_experts,), generator=rng)
    for rank in range(4):  # the last rank has no expert
        mine = (owner == rank).nonzero().flatten()
        expert_map = torch.full((GEOMETRY.num_experts,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        local = {f.name: getattr(weights, f.name)[mine] for f in dataclasses.fields(weights)}
        parts += moe_oracle(dataclasses.replace(weights, **local), *batch, expert_map, LIMIT, precision)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_edges(rng, precision):
    weights = random_weights(GEOMETRY, rng)
    x, ids, routing = random_batch(GEOMETRY, 6, rng)
    assert moe_oracle(weights, x[:0], ids[:0], routing[:0], None, LIMIT, precision).shape == (0, GEOMETRY.hidden)
    ids[2] = -1
    ids[3, 0] = GEOMETRY.num_experts
    out = moe_oracle(weights, x, ids, routing, None, LIMIT, precision)
    assert not out[2].any() and out[3].any() and out.isfinite().all()
    assert not moe_oracle(weights, torch.zeros_like(x), ids, routing, None, LIMIT, precision).any()


def test_activations_of_each_precision(rng):
    x = torch.randn((8, 256), generator=rng).bfloat16()
    x[3] = 0
    scale = torch.tensor(1 / 448)
    assert torch.equal(quantize_activations(x, scale, "w4a16"), x.double())
    epilogue = torch.randn((8, 256), generator=rng, dtype=torch.float64)
    assert torch.equal(quantize_activations(epilogue, scale, "w4a16"), epilogue.float().bfloat16().double())

    a8 = quantize_activations(x, scale, "w4a8")
    largest = x.abs().max(-1)
    token_scale = (largest.values.float() / 448).double()
    assert torch.equal(a8.abs().gather(1, largest.indices[:, None])[:, 0], 448 * token_scale)
    in_units = a8 / token_scale.clamp(min=1e-30)[:, None]
    assert torch.equal(in_units.float().to(torch.float8_e4m3fn).double(), in_units.float().double())
    assert not a8[3].any() and 0.02 < metrics.relative_l2(a8, x) < 0.03

    a4 = quantize_activations(x, scale, "w4a4")
    assert torch.equal(a4, nvfp4.dequantize(*nvfp4.quantize(x, scale), dtype=torch.float64))
    assert not a4[3].any()
    with pytest.raises(ValueError, match="w4a16, w4a8, w8a8 or w4a4"):
        quantize_activations(x, scale, "w4a7")


def test_w4a4_uses_the_input_scales_of_its_own_expert(rng):
    weights = random_weights(GEOMETRY, rng)
    x = random_batch(GEOMETRY, 16, rng).x
    before = expert_stages(weights, 2, x, LIMIT, "w4a4")
    scale = weights.w13_input_scale[2].max()
    assert torch.equal(before.x, nvfp4.dequantize(*nvfp4.quantize(x, scale), dtype=torch.float64))
    intermediate = nvfp4.quantize(before.activated.float(), weights.w2_input_scale[2])
    assert torch.equal(before.intermediate, nvfp4.dequantize(*intermediate, dtype=torch.float64))
    weights.w13_input_scale[3] = weights.w2_input_scale[3] = 1.0
    assert torch.equal(expert_stages(weights, 2, x, LIMIT, "w4a4").out, before.out)
    weights.w2_input_scale[2] = 1.0  # every block scale rounds to a multiple of 2**-9: coarse, and so seen
    assert not torch.equal(expert_stages(weights, 2, x, LIMIT, "w4a4").out, before.out)


def test_stages_follow_from_one_another(rng):
    weights = random_weights(GEOMETRY, rng)
    s = expert_stages(weights, 1, random_batch(GEOMETRY, 4, rng).x, LIMIT, "w4a8")
    both = torch.cat([dequantized(weights, 1, "w1"), dequantized(weights, 1, "w3")])
    torch.testing.assert_close(s.gate_up, s.x @ both.T)
    assert torch.equal(s.activated, swiglu(s.gate_up, LIMIT))
    torch.testing.assert_close(s.out, s.intermediate @ dequantized(weights, 1, "w2").T)
    assert all(stage.dtype == torch.float64 for stage in s)


def test_the_noise_of_each_precision_is_within_its_budget(rng):
    """Gaussian data, one expert, against exact activations: about 0.046 for FP8 and 0.16 for NVFP4."""
    weights = random_weights(WIDE, rng)
    x = torch.randn((64, WIDE.hidden), generator=rng).bfloat16()
    _, _, activated, _, exact = expert_stages(weights, 0, x, LIMIT, "w4a16")
    weights.w13_input_scale.fill_(nvfp4.global_scale_of(x))
    weights.w2_input_scale.fill_(nvfp4.global_scale_of(activated))
    error = {p: metrics.relative_l2(expert_stages(weights, 0, x, LIMIT, p).out, exact) for p in PRECISIONS}
    assert 0.035 < error["w4a8"] < 0.06 and 0.13 < error["w4a4"] < 0.2, error


def test_all_codes_reach_the_product():
    """Each of the 16 codes as a weight of its own, through a whole expert."""
    geometry = MoEGeometry(num_experts=1, num_local_experts=1, top_k=1, hidden=16, intermediate=16, swiglu_limit=None)
    weights = random_weights(geometry, torch.Generator().manual_seed(0))
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    weights.w2[0] = e2m1.pack(codes)
    weights.w2_scale.fill_(2.0)
    weights.w2_global.fill_(0.25)
    torch.testing.assert_close(dequantized(weights, 0, "w2")[3], e2m1.E2M1_VALUES.double() / 2)


def test_w8a8_rounds_weights_with_their_block_scale(rng):
    weights = random_weights(GEOMETRY, rng)
    exact, rounded = dequantized(weights, 2, "w3"), dequantized(weights, 2, "w3", "w8a8")
    assert 0.01 < metrics.relative_l2(rounded, exact) < 0.03 and (rounded - exact).abs().le(exact.abs() / 16).all()
    packed = weights.projection("w3")["weight"][2]
    codes = torch.stack((packed & 7, (packed >> 4) & 7), -1).flatten(-2)
    powers_of_two = torch.isin(codes, torch.tensor([1, 2, 4, 6]))
    assert torch.equal(rounded[powers_of_two], exact[powers_of_two]) and not torch.equal(rounded, exact)
    x = torch.randn((5, GEOMETRY.hidden), generator=rng).bfloat16()
    stages = expert_stages(weights, 2, x, None, ("w4a16", "w8a8"))
    assert torch.equal(stages.gate_up, expert_stages(weights, 2, x, None, "w4a16").gate_up)
    expected = quantize_activations(stages.activated, torch.ones(()), "w8a8")
    assert torch.equal(stages.intermediate, expected)
    assert torch.equal(expected, quantize_activations(stages.activated.bfloat16(), torch.ones(()), "w4a8"))


@pytest.mark.parametrize("precision", ["w4a16", "w8a8", ("w4a8", "w4a16")])
def test_rows_at_a_time_give_what_the_whole_projection_gives(rng, monkeypatch, precision):
    weights = random_weights(dataclasses.replace(GEOMETRY, hidden=96, intermediate=48), rng)
    x = torch.randn(5, 96, generator=rng).bfloat16()
    whole = expert_stages(weights, 1, x, 7.0, precision)
    monkeypatch.setitem(oracle._BYTES_AT_ONCE, "cpu", 7 * 96 * 8)  # 7 does not divide 48 or 96
    assert oracle.rows_at_once(weights.w13[1]) == 7
    for name, by_rows in expert_stages(weights, 1, x, 7.0, precision)._asdict().items():
        torch.testing.assert_close(by_rows, getattr(whole, name), rtol=1e-12, atol=1e-12)
