"""Keeps /health from answering 200 while whoever started the server still has to do something before users come.

``MEGA_MOE_HEALTH_HOLD``  a file; while it exists, /health answers 503. scripts/entrypoint.py makes it before the server
starts and removes it when the warm-up requests have been answered.
"""

from __future__ import annotations

import os

REASON = "the server is up; its warm-up requests have not been answered yet"


def held() -> bool:
    """Whether the file exists; without the variable nothing is held."""
    path = os.environ.get("MEGA_MOE_HEALTH_HOLD")
    return bool(path) and os.path.exists(path)
