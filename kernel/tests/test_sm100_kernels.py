"""The SM100 kernels, compiled for sm_100a and executed on the PTX model, against the W4A4 oracle."""

from __future__ import annotations

import pytest
import torch
from nvfp4_megamoe.numerics import metrics, nvfp4
from ptx_model.layer_cases import (
    codes_equal,
    expected_output,
    gemm1,
    gemm2,
    make_case,
    oracle_images,
    quantize,
    sum_slots,
)
from ptx_model.testing import full, needs_compiler

pytestmark = needs_compiler
RAGGED = [37, 0, 130, 5]
PAIRED = [3, 0, 300, 140]


@pytest.mark.parametrize("one_scale", [True, False])
def test_quantize_rows_equals_the_reference_bit_for_bit(one_scale):
    case = make_case([3, 0, 5], 512, 256, one_scale)
    case.x[0, :16] = 0
    case.x[1] *= 1e-4
    case.x[2] *= 1e4
    codes, scale = quantize(case)
    for row, (token, expert) in enumerate(case.plan.source.tolist()):
        if token < 0:
            assert not codes[row].any()
            continue
        expected = nvfp4.quantize(case.x[token], case.weights.w13_input_scale[expert].amax())
        assert torch.equal(scale[row], expected.block_scale.view(torch.uint8))
        assert torch.equal(codes[row], expected.packed)


@pytest.mark.parametrize(
    ("counts", "hidden", "inter", "tile", "blocks", "one_scale"),
    [
        pytest.param(RAGGED, 512, 256, "n128", 3, False, id="ragged-n128"),
        pytest.param([3, 140], 512, 256, "n256", 2, True, id="ragged-n256"),
        pytest.param(PAIRED, 512, 256, "pair", 4, False, id="ragged-pair"),
        pytest.param([9], 7168, 128, "n128", 2, False, id="k7168-n128"),
        pytest.param([0, 0], 512, 256, "n128", 2, False, id="no-slot"),
        *(pytest.param(RAGGED, 7168, 256, "n128", 3, i % 2 > 0, id=f"full-n128-{i}", marks=full) for i in range(5)),
        *(pytest.param(RAGGED, 7168, 256, "n256", 3, i % 2 > 0, id=f"full-n256-{i}", marks=full) for i in range(5)),
        *(
            pytest.param([37, 0, 300, 5], 7168, 256, "pair", 4, i % 2 > 0, id=f"full-pair-{i}", marks=full)
            for i in range(5)
        ),
    ],
)
def test_gemm1_codes(counts, hidden, inter, tile, blocks, one_scale):
    case = make_case(counts, hidden, max(inter, 256), one_scale)
    out, out_scale, _ = gemm1(case, *quantize(case), f"gemm1_{tile}", blocks)
    if sum(counts):
        assert codes_equal(case, out, out_scale) >= 0.9999
    else:
        assert (out == 0xA5).all()


@pytest.mark.parametrize(
    ("counts", "hidden", "inter", "mode"),
    [
        pytest.param(RAGGED, 256, 512, "", id="ragged"),
        pytest.param(RAGGED, 256, 512, "_add", id="ragged-add"),
        pytest.param([9], 256, 3072, "", id="k3072"),
        *(pytest.param(RAGGED, 512, 3072, "", id=f"full-{i}", marks=full) for i in range(5)),
        *(pytest.param(RAGGED, 512, 3072, "_add", id=f"full-add-{i}", marks=full) for i in range(5)),
    ],
)
def test_gemm2_rows(counts, hidden, inter, mode):
    case = make_case(counts, hidden, inter, one_scale=False)
    rows = gemm2(case, *oracle_images(case), f"gemm2_n128{mode}", 3)
    y = rows if mode else sum_slots(case, rows)
    assert metrics.relative_l2(y, expected_output(case)) <= 5e-3


def test_two_stage_sum_gives_the_same_bits_in_any_order_of_events():
    case = make_case([20, 30], 256, 256, one_scale=False)
    images = oracle_images(case)
    outs = [sum_slots(case, gemm2(case, *images, "gemm2_n128", 2, seed=seed)) for seed in (1, 2)]
    assert torch.equal(*outs)
