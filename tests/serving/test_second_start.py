"""Two starts of the image's entrypoint with vLLM's CPU build: the first compiles, the second must not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.startup_cases import Service, service

from .support import NAME, REPOSITORY, free_port, post
from .watched import TIMEOUT_S, follow

FLAGS = "--tokenizer-mode deepseek_v4 --max-model-len 256 --max-num-seqs 2 --max-num-batched-tokens 128"
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@contextlib.contextmanager
def entrypoint(model: Path, directory: Path, name: str) -> Iterator[tuple[Service, str, Path]]:
    """The entrypoint on ``model`` with caches in ``directory``/cache; yields status service, URL and log."""
    port, status, log = free_port(), directory / f"{name}-status", directory / f"{name}.log"
    command = [sys.executable, "scripts/entrypoint.py", str(model), "--served-model-name", NAME, "--port", str(port)]
    command += ["--distributed-executor-backend", EXECUTOR, *FLAGS.split()]
    variables = {"MEGA_MOE_CACHE_DIR": str(directory / "cache"), "MEGA_MOE_STATUS_DIR": str(status)}
    variables |= {"MEGA_MOE_PREFLIGHT": "off", "MEGA_MOE_WARM_UP": "strict", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url, options = f"http://127.0.0.1:{port}", ("--log-every", "5", "--health-url", f"http://127.0.0.1:{port}/health")
    with log.open("wb") as stream, service(status, directory / f"{name}-watch.log", *options) as watcher:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | variables
        )
        try:
            yield watcher, url, log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def files(answer: dict[str, Any], *stages: str) -> dict[str, int]:
    (server,) = answer["servers"]
    told = [server["compiled"].get(stage, {}) for stage in stages]
    return {name: count["files"] for stage in told for name, count in stage.items()}


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_second_start_compiles_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        with entrypoint(checkpoint, tmp_path, name) as (watcher, url, log):
            answers = follow(watcher, lambda answer: answer["code"] != 503)
            ready = answers[-1]
            assert ready["state"] == "ready", (ready["reason"], log.read_text()[-3000:])
            warming = [answer for answer in answers if "warm-up requests: " in answer["reason"]]
            assert warming and all(answer["health"]["code"] != 200 for answer in warming[:-1])
            warm_up = ready["servers"][0]["warm_up"]
            assert warm_up["sent"] == warm_up["of"] and warm_up["error"] is None
            body = {"model": NAME, "prompt": "hello", "max_tokens": 2, "temperature": 0}
            assert post(f"{url}/v1/completions", body)["choices"]
            if name == "first":
                assert "own kernels" in files(ready, "start"), (
                    "nothing was compiled: the second start would prove nothing"
                )
                assert not files(ready, "warm_up"), "the CPU build compiles nothing by shape"
            else:
                assert files(ready, "start", "warm_up") == {}, json.dumps(ready["servers"])
                assert "compiled this start: nothing" in watcher.log()
