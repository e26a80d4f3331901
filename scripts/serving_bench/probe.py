"""Whether a server answers, and the headers that its API asks for. Needs Python alone."""

from __future__ import annotations

import urllib.error
import urllib.request


def headers(key: str | None) -> dict[str, str]:
    """The headers of a request; ``key`` is the API's, None if it asks for none."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def answers(url: str, key: str | None = None) -> bool:
    """Whether GET ``url`` gives 200."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers(key)), timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
