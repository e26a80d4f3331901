#!/usr/bin/env python3
"""Serve a checkpoint on vLLM's CPU build and print how to talk to it once it answers.

Every argument after ``--`` goes to vLLM's OpenAI server. Stops the server on SIGINT and SIGTERM; exits with the
server's status if it ends by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from serving_bench.probe import answers

READY_TIMEOUT_S = 600
PROGRESS_EVERY_S = 10

# As `python -m` does, but __main__ stays empty: each process that vLLM spawns imports __main__ again, and importing the
# API server there takes seconds.
RUN_SERVER = 'import runpy; runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")'


def server_environment(processors: list[int], ranks: int) -> dict[str, str]:
    """Return the server's environment: every processor used, split evenly over the ranks, and no network."""
    if ranks == 1:
        # One rank computes inside the engine's process (see server_command), where vLLM cannot bind threads.
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(processors))}
    else:
        share = max(1, len(processors) // ranks)
        groups = [processors[rank * share : (rank + 1) * share] or processors[-1:] for rank in range(ranks)]
        # vLLM's own choice leaves one processor of a small machine idle.
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, group)) for group in groups)}
    defaults = {
        **threads,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Spin briefly at OpenMP barriers: vLLM runs more processes than a small machine has processors.
        "GOMP_SPINCOUNT": "10000",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**defaults, **os.environ}


def server_command(model: Path, host: str, port: int, name: str, ranks: int, extra: list[str]) -> list[str]:
    """Return the command line of vLLM's OpenAI server."""
    command = [sys.executable, "-c", RUN_SERVER, "--model", str(model)]
    command += ["--served-model-name", name, "--host", host, "--port", str(port), "--tokenizer-mode", "deepseek_v4"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "16"]
    if ranks > 1:
        command += ["--tensor-parallel-size", str(ranks), "--enable-expert-parallel"]
    else:
        # One process less to start: on two cores that is a quarter of the time to ready.
        command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    return command + extra


def usage(base_url: str, name: str) -> str:
    """Return the lines that a user can paste."""
    body = json.dumps({"model": name, "prompt": "hello world", "max_tokens": 16, "temperature": 0})
    return f"""
The server answers at {base_url} . Try, in another terminal:

  curl {base_url}/v1/completions -H 'Content-Type: application/json' \\
    -d '{body}'

  {sys.executable} - <<'PY'
  from openai import OpenAI
  client = OpenAI(base_url="{base_url}/v1", api_key="unused")
  chat = client.chat.completions.create(
      model="{name}", messages=[{{"role": "user", "content": "hello"}}], max_tokens=16)
  print(chat.choices[0].message.content)
  PY

(The demo checkpoint holds random weights: its text is noise, its numbers are checked by `make test`.)
Stop with Ctrl-C.
"""


def warm_up(base_url: str, name: str) -> None:
    """Send one request, so that what is compiled at first use is compiled before a user waits for it."""
    body = json.dumps({"model": name, "prompt": "hello", "max_tokens": 2, "temperature": 0}).encode()
    request = urllib.request.Request(f"{base_url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S) as response:
        response.read()


def wait_until_ready(server: subprocess.Popen[bytes], base_url: str, name: str) -> None:
    """Block until the server answers a completion, with a line at least every ten seconds.

    Raises:
        RuntimeError: the server ended or took longer than READY_TIMEOUT_S.
    """
    started = last = time.monotonic()
    while not answers(f"{base_url}/health"):
        if (status := server.poll()) is not None:
            raise RuntimeError(f"the server ended with status {status} before it was ready; its log above says why")
        now = time.monotonic()
        if now - started > READY_TIMEOUT_S:
            raise RuntimeError(f"not ready after {READY_TIMEOUT_S} s; the log above says what the server was doing")
        if now - last >= PROGRESS_EVERY_S:
            print(f"[serve] starting, {now - started:.0f} s", flush=True)
            last = now
        time.sleep(0.25)
    warm_up(base_url, name)
    print(f"[serve] ready after {time.monotonic() - started:.1f} s", flush=True)


def main() -> int:
    """Start the server, announce it, and wait for its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--name", default="deepseek-v4-tiny", help="model name in the API")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks, with expert parallelism above one")
    parser.add_argument("extra", nargs="*", help="further arguments for vLLM, after --")
    arguments = parser.parse_args()

    base_url = f"http://{arguments.host}:{arguments.port}"
    if answers(f"{base_url}/health"):
        print(f"{base_url} is already in use by another server: stop it or choose another --port", file=sys.stderr)
        return 2
    server = subprocess.Popen(
        server_command(
            arguments.model, arguments.host, arguments.port, arguments.name, arguments.ranks, arguments.extra
        ),
        env=server_environment(sorted(os.sched_getaffinity(0)), arguments.ranks),
        start_new_session=True,
    )

    def stop(signum: int, _frame: object) -> None:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        wait_until_ready(server, base_url, arguments.name)
    except (RuntimeError, OSError) as error:
        print(f"[serve] {error}", file=sys.stderr)
        stop(signal.SIGTERM, None)
        return server.wait() or 1
    print(usage(base_url, arguments.name), flush=True)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
