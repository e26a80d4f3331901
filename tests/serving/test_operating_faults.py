"""Faults around a serving process: what the status, the exit status and the client see. docs/operations.md tells it."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from . import checkpoints
from .support import NAME, post
from .watched import TIMEOUT_S, Watched, follow, follow_to_ready, watched_server

SMALL_DISK = 'mount -t tmpfs -o size=64k none "$0" && exec "$@"'


def small_disk(directory: Path) -> list[str]:
    """Command that puts a disk of 64 KiB at ``directory``, for the command after it alone; skips where it may not."""
    directory.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(directory)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and user namespaces")
    return command


def failed(server: Watched) -> str:
    """Why the server failed, once the status says so; the exit status must say so too."""
    last = follow(server.watcher, lambda answer: answer["state"] not in ("progressing", "ready"))[-1]
    assert (last["state"], last["code"]) == ("failed", 500), last["reason"]
    assert server.process.wait(120) != 0
    return last["reason"]


@pytest.mark.timeout(TIMEOUT_S)
def test_a_shard_with_a_tensor_missing_is_refused_and_the_status_says_why(checkpoint: Path, tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.5.w3.input_scale"
    damaged = checkpoints.edited(checkpoint, tmp_path / "missing", lambda tensors: tensors.pop(name, None))
    with watched_server(damaged, tmp_path) as server:
        assert name in failed(server)


@pytest.mark.timeout(TIMEOUT_S)
def test_a_shard_with_a_flipped_scale_fails_in_preparation_and_the_status_says_where(
    checkpoint: Path, tmp_path: Path
) -> None:
    damaged = checkpoints.edited(checkpoint, tmp_path / "nan", checkpoints.lose_a_block_scale)
    with watched_server(damaged, tmp_path) as server:
        reason = failed(server)
    assert "rank 0" in reason and "NaN block scale" in reason and "w2.weight_scale" in reason


@pytest.mark.timeout(TIMEOUT_S)
def test_a_full_cache_volume_stops_the_start_and_is_named(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {"NVFP4_MEGAMOE_CACHE": str(cache), "NVFP4_CPU_KERNEL": "compiled"}
    with watched_server(checkpoint, tmp_path, environment=environment, prefix=small_disk(cache)) as server:
        failed(server)
        log = server.log.read_text()
    assert "No space left on device" in log and str(cache) in log


@pytest.mark.timeout(TIMEOUT_S)
def test_a_kernel_library_that_is_missing_stops_the_start_and_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """As on a GPU host whose library was removed: with the backend asked for by name there is no silent other one."""
    environment = {
        "NVFP4_MEGAMOE_CACHE": str(tmp_path / "empty"),
        "NVFP4_CPU_KERNEL": "compiled",
        "CXX": "no-such-compiler",
    }
    with watched_server(checkpoint, tmp_path, "--moe-backend", "nvfp4_megamoe", environment=environment) as server:
        failed(server)
        log = server.log.read_text()
    assert "no-such-compiler is not on the PATH" in log and "apt-get install g++" in log


class Stream(threading.Thread):
    """A streamed completion of ``tokens`` tokens: how many came, and how it ended."""

    def __init__(self, base_url: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.base_url, self.tokens = base_url, tokens
        self.received, self.finished, self.reason, self.error = 0, False, None, ""

    def run(self) -> None:
        body = {"model": NAME, "prompt": "hello", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection(self.base_url.removeprefix("http://"), timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: [DONE]"):
                    self.finished = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[len(b"data: ") :])
                    self.error += json.dumps(event["error"]) if "error" in event else ""
                    choices = event.get("choices", [])
                    self.received += sum(1 for choice in choices if choice.get("text") is not None)
                    self.reason = next((c["finish_reason"] for c in choices if c["finish_reason"]), self.reason)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error += f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def wait_for_tokens(self) -> None:
        end = time.monotonic() + 60
        while self.received < 3:
            assert self.is_alive() and time.monotonic() < end, self.error
            time.sleep(0.01)


@pytest.mark.timeout(TIMEOUT_S)
def test_sigterm_with_a_shutdown_timeout_lets_requests_finish_and_takes_no_more(
    checkpoint: Path, tmp_path: Path
) -> None:
    with watched_server(checkpoint, tmp_path, "--shutdown-timeout", "60") as server:
        follow_to_ready(server.watcher)
        stream = Stream(server.base_url, tokens=400)
        stream.start()
        stream.wait_for_tokens()
        server.process.send_signal(signal.SIGTERM)
        assert server.watcher.get_until("/startupz", 503)
        refused = False
        while stream.is_alive() and not refused:
            try:
                post(f"{server.base_url}/v1/completions", {"model": NAME, "prompt": "late", "max_tokens": 1}, timeout=5)
            except OSError:
                refused = True
        stream.join(60)
        assert stream.finished and stream.reason == "length", (stream.received, stream.reason, stream.error)
        assert refused, "a request after SIGTERM was still served"
        assert server.process.wait(60) == 0
        assert json.loads(server.watcher.get("/startup")[1])["state"] == "stopped"


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("timeout", ["0", "2"])
def test_sigterm_cuts_off_what_does_not_finish_in_time_and_the_client_can_tell(
    checkpoint: Path, tmp_path: Path, timeout: str
) -> None:
    with watched_server(checkpoint, tmp_path, "--shutdown-timeout", timeout) as server:
        follow_to_ready(server.watcher)
        stream = Stream(server.base_url, tokens=3000)
        stream.start()
        stream.wait_for_tokens()
        server.process.send_signal(signal.SIGTERM)
        stream.join(60)
        assert not stream.is_alive(), "the client still waits"
        # Which one depends on whether the engine gets to answer before it is killed, and the server to pass it on.
        told = stream.reason == "abort" or stream.error or not stream.finished
        assert told and stream.reason != "length", vars(stream)
        assert server.process.wait(60) == 0
        assert json.loads(server.watcher.get("/startup")[1])["state"] == "stopped"
    ending = stream.reason or stream.error or "the end of the stream"
    print(f"--shutdown-timeout {timeout}: {stream.received} tokens came, then {ending}")
