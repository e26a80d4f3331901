"""Compare rows of a result with the oracle's."""

from __future__ import annotations

import torch

from nvfp4_megamoe.numerics import metrics
from nvfp4_megamoe.selftest.limits import Limits
from nvfp4_megamoe.selftest.report import Measurement
from nvfp4_megamoe.selftest.tipping import Reference

CALC_DIFF, NORM, ROW, COLUMN, PROBE = "calc_diff", "norm ratio - 1", "worst row", "worst column", "probe"


def judge_rows(
    subject: str,
    out: torch.Tensor,
    expected: Reference,
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
        out: [n, H], the backend's. expected: n rows of H values, the oracle's.
        limits: of such rows, before what may tip over in them. precision, tokens: of the batch.
        columns: judge output channels one by one, which takes at least 16 different tokens: under a few, some channel
            is near zero by chance.
    """
    size = metrics.norms(expected.rows)[:, None]
    a, b = out.double() / size, expected.rows / size
    row, row_error, row_limit = _worst_row(a, b, limits, expected.moved)
    limits = limits.with_tipping(expected.moved)
    found = [
        (CALC_DIFF, metrics.calc_diff(a, b), limits.calc_diff, ""),
        (NORM, abs(metrics.norm_ratio(a, b) - 1), limits.norm, ""),
        (ROW, row_error, row_limit, f"its token {row}"),
    ]
    if columns:
        column, error = metrics.worst_row(a.T, b.T)
        found.append((COLUMN, error, limits.column, f"output channel {column}"))
    return [Measurement(subject, metric, value, limit, precision, tokens, at) for metric, value, limit, at in found]


def judge_probes(
    names: list[str], out: torch.Tensor, expected: Reference, limits: Limits, precision: str, tokens: int
) -> Measurement:
    """Measure one probe for each expert; reports the one nearest to its limit.

    Args:
        names: of the experts. out: [E, n], the backend's in the probes' channels. expected: E rows of n values.
        limits, precision, tokens: as in :func:`judge_rows`.
    """
    row, error, limit = _worst_row(out, expected.rows, limits, expected.moved)
    return Measurement(names[row], PROBE, error, limit, precision, tokens)


def _worst_row(a: torch.Tensor, b: torch.Tensor, limits: Limits, moved: torch.Tensor) -> tuple[int, float, float]:
    """The row nearest to its own limit: index, relative L2, limit."""
    allowed = limits.rows(moved)
    index, parts = metrics.worst_row(b + (a - b) / allowed[:, None], b)
    limit = float(allowed[index])
    return index, parts * limit, limit
