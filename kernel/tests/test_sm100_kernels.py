"""The SM100 kernels, compiled for sm_100a and executed on the PTX model, against the W4A4 oracle."""

from __future__ import annotations

import pytest
import torch
from nvfp4_megamoe.numerics import metrics, nvfp4
from ptx_model.configurations import FULL, GEMM2_LIMIT, REDUCED
from ptx_model.layer_cases import (
    agreement_of,
    expected_output,
    gemm1,
    gemm2,
    make_case,
    oracle_images,
    quantize,
    sum_slots,
)
from ptx_model.testing import fresh_seed, full, needs_compiler

pytestmark = needs_compiler


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


@pytest.mark.parametrize("configuration", REDUCED, ids=lambda c: f"{c.kernel}-{c.name}")
def test_gemm(configuration):
    found = configuration.run()
    assert found["passed"], found


@full
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("configuration", FULL, ids=lambda c: f"{c.kernel}-{c.name}")
def test_gemm_at_full_k(configuration, number):
    seed = fresh_seed()
    found = configuration.run(seed)
    assert found["passed"], found


@pytest.mark.parametrize("name", ["gemm1_n128", "gemm1_pair"])
def test_batch_without_a_slot_writes_nothing(name):
    case = make_case([0, 0], 512, 256, one_scale=False)
    out, *_ = gemm1(case, *quantize(case), name, 2)
    assert (out == 0xA5).all()


@pytest.mark.parametrize("name", ["gemm2_pair", "gemm2_pair_add"])
def test_second_block_without_slots_reads_an_image_that_is_there(name):
    """The last expert has an odd number of images, and nothing lies behind the last one."""
    case = make_case([150, 140, 1], 256, 256, one_scale=False)
    images = [image[:5].contiguous() for image in oracle_images(case)]
    rows, _ = gemm2(case, *images, name, 2)
    y = rows if name.endswith("add") else sum_slots(case, rows)
    assert metrics.relative_l2(y, expected_output(case)) <= GEMM2_LIMIT


def test_differences_are_explained_by_rounding_alone():
    """A much coarser exponential still has few differences; the agreement must not take them for ties."""
    case = make_case([130], 512, 512, one_scale=False)
    activations = quantize(case)
    out, out_scale, _ = gemm1(case, *activations, "gemm1_n128", 2)
    assert agreement_of(case, out, out_scale).right
    coarse, coarse_scale, _ = gemm1(case, *activations, "gemm1_n128", 2, approximation_ulps=1 << 14)
    assert agreement_of(case, coarse, coarse_scale).unexplained > 0
    out[0, 0, 5] ^= 0x11
    assert agreement_of(case, out, out_scale).unexplained > 0


def test_two_stage_sum_gives_the_same_bits_in_any_order_of_events():
    case = make_case([20, 30], 256, 256, one_scale=False)
    images = oracle_images(case)
    outs = [sum_slots(case, gemm2(case, *images, "gemm2_n128", 2, seed=seed)[0]) for seed in (1, 2)]
    assert torch.equal(*outs)
