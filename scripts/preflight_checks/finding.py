"""What a check found."""

from __future__ import annotations

from typing import NamedTuple

OK, NOTE, FAIL, SKIPPED = "ok", "note", "FAIL", "skipped"
GIB = 1 << 30


class Finding(NamedTuple):
    """One line of the report. ``level``: ok, note (it serves, but the user should know), FAIL, skipped."""

    check: str
    level: str
    found: str
    remedy: str = ""


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 or not size else f"{size / (1 << 20):,.1f} MiB"
