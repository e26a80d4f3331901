from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_megamoe.numerics import ue4m3

ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
POSITIVE = st.floats(min_value=0, max_value=1e6, allow_nan=False)


def closed_form(byte: int) -> float:
    """Value from the fields: bias 7, three mantissa bits, subnormal at exponent 0, 0x7F and 0xFF NaN."""
    if byte & 0x7F == 0x7F:
        return math.nan
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1.0 if byte & 0x80 else 1.0)


VALUES = [closed_form(byte) for byte in range(0x7F)]


def nearest_even(x: float) -> int:
    """The byte of the nearest value, of the two nearest the even byte, by exhaustive search."""
    return min(range(0x7F), key=lambda byte: (abs(VALUES[byte] - x), byte & 1))


def test_all_bytes_match_the_format():
    expected = torch.tensor([closed_form(byte) for byte in range(256)], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for scale in (ALL_BYTES, ALL_BYTES.view(torch.float8_e4m3fn)):
            got = ue4m3.decode(scale, dtype)
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(got)[:0x7F], torch.signbit(expected)[:0x7F])


def test_bits_are_reinterpreted_not_cast():
    with pytest.raises(ValueError, match=r"not torch.float32"):
        ue4m3.decode(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_value_survives_a_round_trip(dtype):
    assert torch.equal(ue4m3.encode(torch.tensor(VALUES, dtype=dtype)).view(torch.uint8), ALL_BYTES[:0x7F])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tie_goes_to_the_even_byte(dtype):
    values = torch.tensor(VALUES, dtype=dtype)
    ties = (values[1:] + values[:-1]) / 2
    inf = torch.tensor(math.inf, dtype=dtype)
    lower = torch.arange(0x7E)
    expect = {"below": lower, "tie": lower + lower % 2, "above": lower + 1}
    inputs = {"below": torch.nextafter(ties, -inf), "tie": ties, "above": torch.nextafter(ties, inf)}
    for kind, x in inputs.items():
        assert torch.equal(ue4m3.encode(x).view(torch.uint8).long(), expect[kind]), kind


def test_saturation_sign_and_nonfinite():
    x = torch.tensor([448.0, 464.0, 465.0, 1e30, math.inf, -1.0, -math.inf, -0.0, 0.0, 2.0**-10, 2.0**-11, math.nan])
    for dtype in (torch.float32, torch.float64):
        bits = ue4m3.encode(x.to(dtype)).view(torch.uint8).tolist()
        assert bits == [0x7E] * 5 + [0] * 6 + [0x7F]


@given(POSITIVE)
def test_encode_is_round_to_nearest_even(x):
    assert int(ue4m3.encode(torch.tensor(x, dtype=torch.float64)).view(torch.uint8)) == nearest_even(min(x, 448.0))
    narrow = torch.tensor(x, dtype=torch.float32)
    assert int(ue4m3.encode(narrow).view(torch.uint8)) == nearest_even(min(float(narrow), 448.0))


@given(POSITIVE, POSITIVE)
def test_encode_is_monotone_and_idempotent(x, y):
    scale = ue4m3.encode(torch.tensor(sorted((x, y))))
    low, high = ue4m3.decode(scale).tolist()
    assert low <= high
    assert torch.equal(ue4m3.encode(ue4m3.decode(scale)).view(torch.uint8), scale.view(torch.uint8))
