from __future__ import annotations

import math

import pytest
import torch
from nvfp4_megamoe.numerics import metrics

ALL = (metrics.calc_diff, metrics.relative_l2, metrics.norm_ratio, lambda a, b: metrics.worst_row(a, b)[1])


def test_equal_tensors(rng):
    a = torch.randn((5, 7), generator=rng)
    assert [metric(a, a) for metric in ALL] == [0.0, 0.0, 1.0, 0.0]


def test_closed_forms():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 8.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert metrics.calc_diff(a, b) == pytest.approx(1 - 2 * 41 / (73 + 25))
    assert metrics.relative_l2(a, b) == pytest.approx(4 / 5)
    assert metrics.norm_ratio(a, b) == pytest.approx(math.sqrt(73) / 5)
    assert metrics.worst_row(a, b) == (1, pytest.approx(1.0))
    assert metrics.calc_diff(a, -a) == 2.0


def test_rows_are_those_of_the_last_dimension(rng):
    b = torch.randn((2, 3, 8), generator=rng)
    a = b.clone()
    a[1, 2] *= 1.5
    assert metrics.worst_row(a, b) == (5, pytest.approx(0.5))


def test_zero_references():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert [metric(zero, zero) for metric in ALL] == [0.0, 0.0, 1.0, 0.0]
    assert metrics.relative_l2(one, zero) == metrics.norm_ratio(one, zero) == math.inf
    assert metrics.worst_row(one, zero)[1] == math.inf
    assert metrics.calc_diff(one, zero) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nonfinite_numbers_pass_no_threshold(bad, side):
    pair = [torch.ones(3, 4), torch.ones(3, 4)]
    pair[side][1, 2] = bad
    assert [metric(*pair) for metric in ALL] == [math.inf] * 4
    assert metrics.worst_row(*pair)[0] == 1


def test_computed_in_float64():
    b = torch.full((1, 4), 1e30)
    assert metrics.relative_l2(b * 2, b) == pytest.approx(1.0)
    tiny = torch.full((1, 4), 1e-30)
    assert metrics.calc_diff(tiny * 2, tiny) == pytest.approx(1 / 5)


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r"\(3,\), \(3, 1\)"):
        metrics.calc_diff(torch.ones(3), torch.ones(3, 1))
