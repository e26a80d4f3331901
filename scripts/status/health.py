"""Asks the server's own /health from a thread, so that an answer that hangs holds up nothing else."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request

from .judge import Health

_PERIOD_S = 2.0
_TIMEOUT_S = 5.0


class HealthPoll:
    """The newest answer of ``url``; call to get it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._newest = Health(url, None, "not asked yet", time.monotonic())
        threading.Thread(target=self._poll, name="health", daemon=True).start()

    def __call__(self) -> Health:
        return self._newest

    def _poll(self) -> None:
        while True:
            code, error = _ask(self._url)
            bad_since = self._newest.bad_since
            if code == 200 or self._newest.code == 200:
                bad_since = time.monotonic()
            self._newest = Health(self._url, code, error, bad_since)
            time.sleep(_PERIOD_S)


def _ask(url: str) -> tuple[int | None, str]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError as error:
        return None, str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return None, str(error) or type(error).__name__
