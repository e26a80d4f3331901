"""Serves the snapshot over HTTP: page, JSON, metrics, and the two answers for probes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .collector import Collector
from .judge import ENDED_STATE, PROGRESSING
from .metrics import exposition
from .phases import READY

_PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
# A snapshot older than this means that this service itself is stuck.
_STALE_S = 30.0

Answer = tuple[int, str, bytes]


class Server(ThreadingHTTPServer):
    """Answers GET and HEAD for the paths of docs/startup.md from ``collector``'s newest snapshot."""

    daemon_threads = True

    def __init__(self, host: str, port: int, collector: Collector) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._collector = collector
        page, metrics = _PAGE.read_bytes(), exposition(lambda: collector.snapshot)
        self.answers: dict[str, Callable[[], Answer]] = {
            "/": lambda: (200, "text/html; charset=utf-8", page),
            "/startup": self._startup,
            "/metrics": lambda: (200, "text/plain; version=0.0.4; charset=utf-8", metrics()),
            "/startupz": self._startupz,
            "/livez": self._livez,
        }
        super().__init__((host, port), _Handler)

    def _startup(self) -> Answer:
        return 200, "application/json", json.dumps(self._collector.snapshot.as_json()).encode()

    def _startupz(self) -> Answer:
        verdict = self._collector.snapshot.verdict
        return self._stuck() or _plain(verdict.code, f"{verdict.state}: {verdict.reason}")

    def _livez(self) -> Answer:
        """200 for everything that needs no restart: a kubelet takes 503 and 500 alike as failure."""
        verdict = self._collector.snapshot.verdict
        code = 200 if verdict.state in (READY, PROGRESSING, ENDED_STATE) else verdict.code
        return self._stuck() or _plain(code, f"{verdict.state}: {verdict.reason}")

    def _stuck(self) -> Answer | None:
        age = time.monotonic() - self._collector.snapshot.monotonic
        return (
            _plain(500, f"the status service has not looked at the ranks for {age:.0f} s") if age > _STALE_S else None
        )


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "startup-status"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        answer = self.server.answers.get(self.path.partition("?")[0])
        if answer is None:
            self._send(*_plain(HTTPStatus.NOT_FOUND, f"not found; there are {' '.join(self.server.answers)}"))
        else:
            self._send(*answer())

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Leave the log to the start-up: probes ask every few seconds."""

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _plain(code: int, text: str) -> Answer:
    return code, "text/plain; charset=utf-8", f"{text}\n".encode()
