"""Compare rows of a result with the oracle's."""

from __future__ import annotations

import torch

from nvfp4_megamoe.numerics import metrics
from nvfp4_megamoe.selftest.limits import Limits
from nvfp4_megamoe.selftest.report import Measurement

CALC_DIFF, NORM, ROW, COLUMN, PROBE = "calc_diff", "norm ratio - 1", "worst row", "worst column", "probe"


def judge_rows(
    subject: str,
    out: torch.Tensor,
    expected: torch.Tensor,
    limits: Limits,
    precision: str,
    tokens: int,
    *,
    columns: bool,
) -> list[Measurement]:
    """Measure some tokens of one batch.

    Every row is first divided by the norm of its reference, so that large tokens do not hide small ones.

    Args:
        subject: whose tokens they are.
        out: [n, H], the backend's. expected: float64 [n, H], the oracle's.
        limits, precision, tokens: of the batch, for the measurements.
        columns: judge output channels one by one, which takes at least 16 different tokens: under a few, some channel
            is near zero by chance.
    """
    size = expected.norm(dim=1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    a, b = out.double() / size, expected / size
    row, row_error = metrics.worst_row(a, b)
    found = [
        (CALC_DIFF, metrics.calc_diff(a, b), limits.calc_diff, ""),
        (NORM, abs(metrics.norm_ratio(a, b) - 1), limits.norm, ""),
        (ROW, row_error, limits.row, f"its token {row}"),
    ]
    if columns:
        column, error = metrics.worst_row(a.T, b.T)
        found.append((COLUMN, error, limits.column, f"output channel {column}"))
    return [Measurement(subject, metric, value, limit, precision, tokens, at) for metric, value, limit, at in found]


def judge_probes(
    names: list[str], out: torch.Tensor, expected: torch.Tensor, limits: Limits, precision: str, tokens: int
) -> Measurement:
    """Measure one probe for each expert; reports the worst.

    Args:
        names: of the experts. out: [E, n], the backend's in the probes' channels. expected: float64 [E, n].
        limits, precision, tokens: as in :func:`judge_rows`.
    """
    row, error = metrics.worst_row(out, expected)
    return Measurement(names[row], PROBE, error, limits.row, precision, tokens)
