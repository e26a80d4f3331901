"""scripts/wait_for_group.py: whom it asks, that it waits for the last one, and what it says when it cannot."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from .render import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import wait_for_group


class _Handler(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def service() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_members() -> None:
    set_variables = {"LWS_LEADER_ADDRESS": "deepseek-v4-1.deepseek-v4.space", "LWS_GROUP_SIZE": "3"}
    assert wait_for_group.members(set_variables) == [
        "deepseek-v4-1.deepseek-v4.space",
        "deepseek-v4-1-1.deepseek-v4.space",
        "deepseek-v4-1-2.deepseek-v4.space",
    ]


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "LWS_LEADER_ADDRESS is ''"),
        ({"LWS_LEADER_ADDRESS": "leader", "LWS_GROUP_SIZE": "2"}, "LWS_LEADER_ADDRESS is 'leader'"),
        ({"LWS_LEADER_ADDRESS": "a.b"}, "LWS_GROUP_SIZE is ''"),
        ({"LWS_LEADER_ADDRESS": "a.b", "LWS_GROUP_SIZE": "0"}, "LWS_GROUP_SIZE is '0'"),
    ],
)
def test_missing_variables_are_named(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE"):
        monkeypatch.delenv(each, raising=False)
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    assert wait_for_group.main([]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("code", [200, 500])
def test_any_answer_counts(
    service: http.server.ThreadingHTTPServer, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "code", code)
    assert wait_for_group.answers("127.0.0.1", service.server_address[1])


def test_waits_for_the_last_pod(
    service: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = service.server_address[1]
    monkeypatch.setattr(wait_for_group, "members", lambda environment: ["127.0.0.1", "127.0.0.2"])
    patience = ["--port", str(port), "--interval", "0.05", "--timeout"]
    assert wait_for_group.main([*patience, "0.2"]) == 1
    assert "no answer from 127.0.0.2" in capsys.readouterr().err

    late = http.server.ThreadingHTTPServer(("127.0.0.2", port), _Handler, bind_and_activate=False)
    late.server_bind()

    def begin() -> None:
        late.server_activate()
        late.serve_forever()

    timer = threading.Timer(0.3, begin)
    timer.start()
    try:
        assert wait_for_group.main([*patience, "20"]) == 0
    finally:
        timer.join(0.5)
        late.shutdown()
        late.server_close()
    out = capsys.readouterr().out
    assert "1 of 2 pods answer after 0 s; not 127.0.0.2" in out and "all 2 pods answer" in out


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not wait_for_group.answers("127.0.0.1", free.getsockname()[1])
    assert not wait_for_group.answers("no-such-pod.invalid", 8001)
