"""Two starts of the image's entrypoint with vLLM's CPU build: the first compiles, the second must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .support import NAME, free_port, post
from .watched import TIMEOUT_S, entrypoint, follow

FLAGS = (
    "--tokenizer-mode deepseek_v4 --max-model-len 256 --max-num-seqs 2 --max-num-batched-tokens 128 "
    "--distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor"
)


def files(answer: dict[str, Any], *stages: str) -> dict[str, int]:
    (server,) = answer["servers"]
    told = [server["compiled"].get(stage, {}) for stage in stages]
    return {name: count["files"] for stage in told for name, count in stage.items()}


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_second_start_compiles_nothing(checkpoint: Path, tmp_path: Path) -> None:
    settings = {
        "MEGA_MOE_CACHE_DIR": str(tmp_path / "cache"),
        "MEGA_MOE_WARM_UP": "strict",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    for name in ("first", "second"):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        flags = ["--served-model-name", NAME, "--port", str(port), *FLAGS.split()]
        options = ("--log-every", "5", "--health-url", f"{url}/health")
        server = entrypoint(checkpoint, tmp_path / name, *flags, settings=settings, status_options=options)
        with server as (_, watcher, log):
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
