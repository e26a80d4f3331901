"""Start the demo server as a user would, and read prompt log-probabilities from it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "deepseek-v4-tiny"
START_TIMEOUT_S = 300


class Server(NamedTuple):
    """A running server: where it answers, its log so far, and how long it took to become ready."""

    base_url: str
    log: Path
    ready_seconds: float


def free_port() -> int:
    """Return a TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(
    model: Path, log: Path, *vllm_arguments: str, ranks: int = 1, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve ``model`` with scripts/serve_cpu.py until the block ends.

    Raises:
        AssertionError: the server did not become ready; the end of its log is in the message.
    """
    port = free_port()
    command = [
        sys.executable,
        "scripts/serve_cpu.py",
        "--model",
        str(model),
        "--port",
        str(port),
        "--ranks",
        str(ranks),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--", *vllm_arguments],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        started = time.monotonic()
        while "[serve] ready after" not in log.read_text(errors="replace"):
            tail = log.read_text(errors="replace")[-4000:]
            assert process.poll() is None, f"the server ended with status {process.returncode}:\n{tail}"
            assert time.monotonic() - started < START_TIMEOUT_S, f"not ready after {START_TIMEOUT_S} s:\n{tail}"
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}", log, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def prompt_tokens(count: int) -> list[int]:
    """Return a fixed, non-repeating prompt of ``count`` ordinary tokens of the demo vocabulary."""
    return [7 + (index * 37 + index // 11) % 490 for index in range(count)]


def post(url: str, body: dict[str, object], timeout: float = 300) -> dict:
    """POST ``body`` as JSON and return the JSON answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def prompt_logprobs(server: Server, tokens: list[int]) -> list[float]:
    """Return the log-probability of each token but the first, given those before it, as the server sees them."""
    body = {"model": NAME, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    choice = post(f"{server.base_url}/v1/completions", body)["choices"][0]
    entries = choice["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens[1:], strict=True)]


def mean_difference(first: list[float], second: list[float]) -> float:
    """Return the mean absolute difference of two lists of log-probabilities."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)
