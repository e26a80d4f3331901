from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_megamoe.numerics import e2m1, metrics, nvfp4, ue4m3

SEEDS = st.integers(0, 2**31 - 1)


def random(shape, seed, spread=6.0):
    """Gaussian blocks whose sizes span ``spread`` powers of e: from full-range scales to denormal and zero ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).unflatten(-1, (-1, 16))
    return (x * torch.exp(spread * (torch.rand((*x.shape[:-1], 1), generator=g) - 1))).flatten(-2)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def representable(seed, shape=(4, 64)):
    """Codes with a 6 in each block, block scales of every magnitude but zero, and a global scale."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, shape, generator=g, dtype=torch.uint8)
    codes[..., ::16] = 7
    scale = torch.randint(1, 0x7F, (*shape[:-1], shape[-1] // 16), generator=g, dtype=torch.uint8)
    global_scale = torch.exp(8 * torch.randn((), generator=g))
    return e2m1.pack(codes), scale.view(torch.float8_e4m3fn), global_scale


@given(SEEDS)
def test_representable_tensors_survive_a_round_trip(seed):
    packed, scale, global_scale = representable(seed)
    again = nvfp4.quantize(nvfp4.dequantize(packed, scale, global_scale), global_scale)
    assert torch.equal(bits(again.block_scale), bits(scale))
    assert torch.equal(again.packed, packed)


@given(SEEDS)
def test_quantizing_twice_changes_nothing(seed):
    # A spread of 4 keeps block scales normal; a denormal scale may round so far that no code 6 is left in its block.
    first = nvfp4.quantize(random((8, 64), seed, spread=4.0))
    second = nvfp4.quantize(nvfp4.dequantize(*first), first.global_scale)
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(bits(first.block_scale), bits(second.block_scale))


@given(SEEDS)
def test_values_are_nearest_under_their_own_scale(seed):
    x = random((8, 64), seed)
    q = nvfp4.quantize(x)
    step = (q.block_scale.double() * q.global_scale.double()).unsqueeze(-1).unsqueeze(-1)
    grid = e2m1.E2M1_VALUES.double() * step
    target = x.double().unflatten(-1, (-1, 16)).unsqueeze(-1)
    best = (grid - target).abs().amin(-1)
    got = (nvfp4.dequantize(*q, dtype=torch.float64).unflatten(-1, (-1, 16)) - target.squeeze(-1)).abs()
    assert (got <= best + 1e-6 * step.squeeze(-1)).all()


@given(SEEDS)
def test_block_scales_are_nearest(seed):
    x = random((8, 64), seed)
    q = nvfp4.quantize(x)
    exact = x.double().unflatten(-1, (-1, 16)).abs().amax(-1) / 6 / q.global_scale.double()
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    best = (values - exact.unsqueeze(-1)).abs().amin(-1)
    assert ((q.block_scale.double() - exact).abs() <= best + 1e-6 * exact).all()


@given(SEEDS)
def test_quantize_is_odd_and_monotone_within_a_block(seed):
    x = random((1, 16), seed)
    q, mirrored = nvfp4.quantize(x), nvfp4.quantize(-x)
    assert torch.equal(q.packed ^ 0x88, mirrored.packed)
    ordered = nvfp4.dequantize(*q).flatten()[x.flatten().argsort()]
    assert (ordered.diff() >= 0).all()


def test_the_noise_of_a_gaussian_tensor_is_that_of_the_format(rng):
    x = torch.randn((256, 2048), generator=rng)
    y = nvfp4.dequantize(*nvfp4.quantize(x))
    assert 0.085 < metrics.relative_l2(y, x) < 0.105
    assert abs(metrics.norm_ratio(y, x) - 1) < 0.02
    q = nvfp4.quantize(x)
    faults = {
        "swapped nibbles": q._replace(packed=(q.packed << 4) | (q.packed >> 4)),
        "value-cast scales": q._replace(block_scale=bits(q.block_scale).float().to(torch.float8_e4m3fn)),
    }
    for name, wrong in faults.items():
        assert metrics.relative_l2(nvfp4.dequantize(*wrong), x) > 0.3, name


def test_zero_tensors_and_zero_blocks():
    for shape in ((4, 64), (0, 64), (4, 0)):
        q = nvfp4.quantize(torch.zeros(shape))
        assert float(q.global_scale) == 1.0
        assert not q.packed.any() and not bits(q.block_scale).any()
        assert torch.equal(nvfp4.dequantize(*q), torch.zeros(shape))
    x = torch.zeros(2, 32)
    x[0, :16] = 1.0
    x[1, 16:] = -1e-6  # its scale rounds to zero
    q = nvfp4.quantize(x)
    assert bits(q.block_scale).tolist() == [[0x7E, 0], [0, 0]]
    assert q.packed.tolist() == [[0x77] * 8 + [0] * 8, [0] * 16]
    assert nvfp4.dequantize(*q).isfinite().all()


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 1e-34, 1.0, 3e38])
def test_the_global_scale_is_a_positive_normal_number(amax):
    scale = nvfp4.global_scale_of(torch.tensor([0.0, -amax]))
    assert scale.dtype == torch.float32 and scale.shape == ()
    assert torch.finfo(torch.float32).tiny <= float(scale) <= 3e38
    if amax > 1e-34:
        assert float(scale) == pytest.approx(amax / 2688, rel=1e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(rng, size):
    x = (torch.rand((4, 64), generator=rng) * 2 - 1) * size
    for global_scale in (None, torch.tensor(1e-45), torch.tensor(1e-38), torch.tensor(0.0), torch.tensor(1.0)):
        q = nvfp4.quantize(x, global_scale)
        assert ue4m3.decode(q.block_scale).isfinite().all()
        assert not q.packed[(bits(q.block_scale) == 0).repeat_interleave(8, -1)].any()
        assert nvfp4.dequantize(*q, dtype=torch.float64).isfinite().all()


def test_saturation_at_a_small_global_scale(rng):
    x = torch.randn((4, 64), generator=rng)
    q = nvfp4.quantize(x, nvfp4.global_scale_of(x) / 64)
    assert (ue4m3.decode(q.block_scale) <= 448).all()
    assert nvfp4.dequantize(*q).abs().max() <= 6 * 448 * float(q.global_scale) * 1.0001


def test_a_bad_value_stays_in_its_block(rng):
    x = torch.randn((2, 32), generator=rng)
    clean = nvfp4.quantize(x)
    x[1, 20] = float("nan")
    q = nvfp4.quantize(x, clean.global_scale)
    assert bits(q.block_scale)[1, 1] == 0x7F
    assert torch.equal(q.packed[0], clean.packed[0]) and torch.equal(q.packed[1, :8], clean.packed[1, :8])


def test_global_scales_broadcast_over_leading_dimensions(rng):
    x = torch.randn((3, 4, 32), generator=rng)
    each = torch.tensor([0.5, 1.0, 2.0]) * 1e-3
    q = nvfp4.quantize(x, each)
    values = nvfp4.dequantize(*q)
    for e in range(3):
        alone = nvfp4.quantize(x[e], each[e])
        assert torch.equal(q.packed[e], alone.packed)
        assert torch.equal(values[e], nvfp4.dequantize(*alone))
    rows = each.reshape(3, 1).expand(3, 4).contiguous()
    assert torch.equal(nvfp4.dequantize(q.packed, q.block_scale, rows), values)


def test_float64_is_exact(rng):
    q = nvfp4.quantize(torch.randn((4, 64), generator=rng))
    got = nvfp4.dequantize(*q, dtype=torch.float64).flatten()
    for i, code in enumerate(e2m1.unpack(q.packed).flatten().tolist()):
        scale = float(q.block_scale.flatten()[i // 16])
        exact = Fraction(float(e2m1.E2M1_VALUES[code])) * Fraction(scale) * Fraction(float(q.global_scale))
        assert Fraction(float(got[i])) == exact


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        nvfp4.quantize(torch.ones(2, 24))
    with pytest.raises(ValueError, match="from the left"):
        nvfp4.quantize(torch.ones(2, 32), torch.ones(3))
    with pytest.raises(ValueError, match="from the left"):
        nvfp4.quantize(torch.ones(2, 32), torch.ones(2, 2))
    with pytest.raises(ValueError, match="one block scale for 8 packed bytes"):
        nvfp4.dequantize(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.uint8), torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_identical_to_vllm(rng, dtype):
    """vLLM's quantizer takes 1 / global scale; its values and scales, and its dequantizer's values, are ours."""
    vllm = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    for trial in range(20):
        seed = int(torch.randint(2**31 - 1, (), generator=rng))
        x = random((33, 256), seed, spread=[1.0, 6.0, 14.0][trial % 3]).to(dtype)
        q = nvfp4.quantize(x, nvfp4.global_scale_of(x) * [1.0, 3.7, 0.3][trial % 3])
        codes, scale = vllm.ref_nvfp4_quant(x, 1.0 / q.global_scale, 16)
        assert torch.equal(ue4m3.decode(q.block_scale), scale)
        assert torch.equal(e2m1.decode(e2m1.unpack(q.packed)), codes)
        live = (scale != 0).repeat_interleave(16, -1) & (x != 0)
        ours = e2m1.decode(e2m1.unpack(q.packed))
        assert torch.equal(bits(ours)[live], bits(codes)[live])  # the sign of zero too

        for out in (torch.float32, torch.bfloat16, torch.float16):
            theirs = vllm.dequantize_to_dtype(q.packed, q.block_scale, q.global_scale, out, 16, swizzle=False)
            assert torch.equal(bits(nvfp4.dequantize(*q, dtype=out)), bits(theirs))


def test_batched_dequantize_is_bit_identical_to_vllm(rng):
    vllm = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    packed = torch.randint(256, (5, 8, 32), generator=rng, dtype=torch.int32).to(torch.uint8)
    scale = torch.randint(0x7F, (5, 8, 4), generator=rng, dtype=torch.uint8).view(torch.float8_e4m3fn)
    each = torch.rand(5, generator=rng)
    theirs = vllm.dequantize_to_dtype(packed, scale, each, torch.float32, 16, swizzle=False)
    assert torch.equal(bits(nvfp4.dequantize(packed, scale, each)), bits(theirs))


def test_quantize_then_dequantize_is_vllms_emulation_to_the_last_place(rng):
    """vLLM's fused emulation divides by 1 / global scale, so its values may differ in the last bit of float32."""
    vllm = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    x = torch.randn((64, 256), generator=rng)
    exact = torch.tensor(2.0**-9)  # a power of two has an exact reciprocal: no last bit to differ in
    q = nvfp4.quantize(x, exact)
    assert torch.equal(bits(nvfp4.dequantize(*q)), bits(vllm.ref_nvfp4_quant_dequant(x, 1 / exact, 16)))
    q = nvfp4.quantize(x)
    theirs = vllm.ref_nvfp4_quant_dequant(x, 1 / q.global_scale, 16)
    torch.testing.assert_close(nvfp4.dequantize(*q), theirs, rtol=2.0**-22, atol=0)
    codes, scale = e2m1.decode(e2m1.unpack(q.packed)), ue4m3.decode(q.block_scale)
    same_order = codes.unflatten(-1, (-1, 16)) * (scale / (1 / q.global_scale)).unsqueeze(-1)
    assert torch.equal(bits(same_order.flatten(-2)), bits(theirs))
