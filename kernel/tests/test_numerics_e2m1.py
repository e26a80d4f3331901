from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_megamoe.numerics import e2m1

ALL_CODES = torch.arange(16, dtype=torch.uint8)
FLOATS = st.floats(width=32, allow_nan=False)


def closed_form(code: int) -> float:
    """Value from the fields of the format: exponent bias 1, one mantissa bit, subnormal at exponent 0."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells -0 from 0."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def test_all_codes_match_the_format():
    expected = torch.tensor([closed_form(code) for code in range(16)])
    expected[8] = -0.0
    assert same(e2m1.E2M1_VALUES, expected)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert same(e2m1.decode(ALL_CODES, dtype), expected.to(dtype))
        assert torch.equal(e2m1.encode(expected.to(dtype)), ALL_CODES)


@pytest.mark.parametrize(
    ("tie", "value"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_ties_go_to_even_and_their_neighbours_do_not(tie, value):
    for sign in (1.0, -1.0):
        x = torch.tensor(sign * tie, dtype=torch.float32)
        below, above = torch.nextafter(x, x * 0), torch.nextafter(x, x * math.inf)
        codes = e2m1.encode(torch.stack((below, x, above)))
        got = e2m1.decode(codes).abs().tolist()
        lower = max(v for v in e2m1.E2M1_VALUES.tolist() if v < tie)
        upper = min(v for v in e2m1.E2M1_VALUES.tolist() if v > tie)
        assert got == [lower, value, upper]
        assert ((codes & 8) != 0).tolist() == [sign < 0] * 3


def test_saturation_zero_and_nonfinite():
    x = torch.tensor([6.0, 6.1, 1e30, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, math.nan])
    assert e2m1.encode(x)[:-1].tolist() == [7, 7, 7, 7, 15, 0, 8, 0, 8]
    assert int(e2m1.encode(x)[-1]) & 7 == 7


def test_float64_is_not_rounded_to_float32_first():
    just_above = torch.tensor(0.25, dtype=torch.float64) + 2.0**-40
    assert e2m1.encode(just_above) == 1 and e2m1.encode(just_above.float()) == 0


@given(FLOATS)
def test_encode_gives_a_nearest_value(x):
    distances = [abs(abs(x) - closed_form(code)) for code in range(8)]
    assert distances[int(e2m1.encode(torch.tensor(x))) & 7] == min(distances)


@given(FLOATS, FLOATS)
def test_encode_is_monotone(x, y):
    low, high = e2m1.decode(e2m1.encode(torch.tensor(sorted((x, y))))).tolist()
    assert low <= high


@given(FLOATS)
def test_encode_is_odd_and_idempotent(x):
    code = e2m1.encode(torch.tensor(x))
    assert e2m1.encode(e2m1.decode(code)) == code
    assert e2m1.encode(torch.tensor(-x)) == code ^ 8


def test_packing_puts_the_even_index_in_the_low_nibble():
    assert e2m1.pack(torch.tensor([0x3, 0xA], dtype=torch.uint8)).tolist() == [0xA3]
    assert e2m1.unpack(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]


def test_packing_is_a_bijection(rng):
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.pack(e2m1.unpack(every_byte)), every_byte)
    for dtype in (torch.float64, torch.float32):
        pairs = e2m1.decode_packed(every_byte.view(4, 64), dtype)
        assert same(pairs, e2m1.decode(e2m1.unpack(every_byte.view(4, 64)), dtype))
    codes = torch.randint(16, (3, 5, 32), generator=rng, dtype=torch.uint8)
    assert e2m1.pack(codes).shape == (3, 5, 16)
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)
    with pytest.raises(ValueError, match="even, not 7"):
        e2m1.pack(codes[..., :7])
