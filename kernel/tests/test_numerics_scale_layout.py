from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvfp4_megamoe.numerics import scale_layout

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 20))


def offset(m: int, k: int, columns: int) -> int:
    """Where the layout's definition puts scale (m, k), ``columns`` being padded."""
    return ((m // 128) * (columns // 4) + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


@settings(max_examples=30)
@given(SHAPES)
def test_every_scale_lies_where_the_definition_says(shape):
    rows, columns = shape
    padded_rows, padded_columns = scale_layout.padded_shape(rows, columns)
    scale = torch.randint(1, 256, shape, dtype=torch.int32).to(torch.uint8)
    expected = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8)
    index = torch.tensor([[offset(m, k, padded_columns) for k in range(columns)] for m in range(rows)])
    expected[index] = scale
    assert index.unique().numel() == rows * columns
    flat = scale_layout.swizzle(scale)
    assert torch.equal(flat, expected)
    assert torch.equal(scale_layout.unswizzle(flat, rows, columns), scale)


def test_whole_tiles_are_a_bijection_both_ways(rng):
    flat = torch.randint(256, (256 * 8,), generator=rng, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(scale_layout.swizzle(scale_layout.unswizzle(flat, 256, 8)), flat)


def test_leading_dimensions_and_dtype_are_kept(rng):
    scale = torch.rand((2, 3, 130, 5), generator=rng).to(torch.float8_e4m3fn)
    flat = scale_layout.swizzle(scale)
    assert flat.dtype == torch.float8_e4m3fn and flat.shape == (2, 3, 256 * 8) and flat.is_contiguous()
    alone = scale_layout.swizzle(scale[1, 2])
    assert torch.equal(flat[1, 2].view(torch.uint8), alone.view(torch.uint8))
    assert torch.equal(scale_layout.unswizzle(flat, 130, 5).view(torch.uint8), scale.view(torch.uint8))


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="takes 512 bytes"):
        scale_layout.unswizzle(torch.zeros(256, dtype=torch.uint8), 100, 4)


def test_equal_to_vllm(rng):
    emulation = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    for rows, columns in ((128, 4), (129, 20), (7168, 64)):
        flat = scale_layout.swizzle(torch.rand((rows, columns), generator=rng).to(torch.float8_e4m3fn))
        theirs = emulation.convert_swizzled_to_linear(flat, rows, columns * 16, 16)
        ours = scale_layout.unswizzle(flat, rows, columns)
        assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))
