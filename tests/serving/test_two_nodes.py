"""Two entrypoints with the flags of the multi-node overlay's pods, as if on two nodes: one server, one rank each."""

from __future__ import annotations

import contextlib
import signal
import urllib.error
from pathlib import Path

import pytest

from .support import NAME, Server, free_port, mean_difference, post, prompt_logprobs, prompt_tokens
from .test_logprobs import TOLERANCE
from .watched import TIMEOUT_S, entrypoint, follow_to_ready


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_leader_and_worker_serve_as_one(checkpoint: Path, expected: dict[int, list[float]], tmp_path: Path) -> None:
    port = free_port()
    same = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--tokenizer-mode", "deepseek_v4"]
    same += [
        "--max-model-len",
        "4096",
        "--max-num-seqs",
        "16",
        "--no-enable-prefix-caching",
        "--shutdown-timeout",
        "20",
    ]
    same += ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--enable-expert-parallel"]
    same += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())]
    health = ("--health-url", f"http://127.0.0.1:{port}/health")
    with (
        entrypoint(checkpoint, tmp_path / "worker", *same, "--headless", "--data-parallel-start-rank=1") as worker,
        entrypoint(checkpoint, tmp_path / "leader", *same, status_options=health) as leader,
    ):
        for _, watcher, _ in (leader, worker):
            follow_to_ready(watcher)
        server = Server(f"http://127.0.0.1:{port}", leader[2], 0.0)
        for _ in range(4):  # in turns to the two engines
            assert mean_difference(prompt_logprobs(server, prompt_tokens(300)), expected[300]) <= TOLERANCE
        for process, _, log in (leader, worker):
            assert process.poll() is None
            assert "Local/global number of experts: 32/64" in log.read_text()
        assert "[EP Rank 1/2]" in worker[2].read_text() and "[EP Rank 0/2]" in leader[2].read_text()

        worker[0].send_signal(signal.SIGTERM)
        assert worker[0].wait(90) == 0, worker[2].read_text()[-3000:]
        # A group without one of its ranks cannot answer; the leader must end, so that the group is started again.
        body = {"model": NAME, "prompt": prompt_tokens(20), "max_tokens": 4}
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            post(f"{server.base_url}/v1/completions", body, timeout=60)
        assert leader[0].wait(120) == 1, leader[2].read_text()[-3000:]
