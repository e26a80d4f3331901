"""Memory bound shared by the operators: how many items of a long batch are processed at once."""

from __future__ import annotations

from collections.abc import Iterator

SCRATCH_BYTES = 64 << 20


def slices(total: int, bytes_per_item: int, limit: int | None = None) -> Iterator[slice]:
    """Cover ``range(total)`` with slices whose scratch stays under ``SCRATCH_BYTES`` (at least one item each)."""
    step = max(1, SCRATCH_BYTES // max(1, bytes_per_item))
    if limit is not None:
        step = min(step, limit)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
