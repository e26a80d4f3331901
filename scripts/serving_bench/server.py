"""One vLLM server as a child process: started with a given vLLM, watched until it is ready, and ended for sure."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve_cpu import RUN_SERVER

from serving_bench.probe import answers

NAME = "bench"
ERRORS_SHOWN = 12
_BACKEND = re.compile(r"Using '?([A-Z0-9_]+)'? NvFp4 MoE backend")
_OWN = re.compile(r"NVFP4 experts run on nvfp4_megamoe: backend (\w+), (\w+)")
_KV_GIB = re.compile(r"Available KV cache memory: ([0-9.]+) GiB")
_KV_TOKENS = re.compile(r"KV cache size: ([0-9,]+) tokens")
_COMPILED = re.compile(r"(Triton|TileLang|CuTeDSL) .*during inference: .*")


_started: list[subprocess.Popen[bytes]] = []


class ServerError(RuntimeError):
    """A server did not start or stopped answering; the message has the end of its log."""


@dataclass
class Server:
    """A running server.

    Attributes:
        label: what it is called in reports.
        command: full command line.
        environment: what is set beside this process's own environment.
        log: file with everything it prints.
        ready_seconds: from start to the first 200 of /health.
    """

    label: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    base_url: str
    ready_seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self, timeout_s: float) -> None:
        """Start it and wait until it is ready.

        Raises:
            ServerError: it ended, or was not ready after ``timeout_s``.
        """
        began = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(self.process)
        try:
            while not answers(f"{self.base_url}/health"):
                if self.process.poll() is not None:
                    raise ServerError(f"{self.label} ended with status {self.process.returncode}\n{self.why()}")
                if time.monotonic() - began > timeout_s:
                    raise ServerError(f"{self.label} was not ready after {timeout_s:.0f} s\n{self.why()}")
                time.sleep(0.25)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - began

    def stop(self, patience_s: float = 30.0) -> int | None:
        """End it: SIGTERM, then SIGKILL for the whole process group; return its status, None if it never started."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def why(self) -> str:
        """The lines of the log that name errors, and its end."""
        lines = self.text().splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return "\n".join([*errors[-ERRORS_SHOWN:], "--- end of the log:", *lines[-ERRORS_SHOWN:]])

    def facts(self) -> dict[str, object]:
        """What the log says: MoE backend, this project's kernels if they run, KV cache, compilations while serving."""
        text = self.text()
        backend, own = _BACKEND.search(text), _OWN.search(text)
        kv, tokens = _KV_GIB.findall(text), _KV_TOKENS.search(text)
        return {
            "ready_s": round(self.ready_seconds, 1),
            "moe_backend": backend and backend.group(1),
            "own_kernels": own and f"{own.group(1)} {own.group(2)}",
            "kv_cache_gib": float(kv[-1]) if kv else None,
            "kv_cache_tokens": int(tokens.group(1).replace(",", "")) if tokens else None,
            "compiled_while_serving": compilations(text),
        }


def end_servers_with_this_process() -> None:
    """Have SIGTERM and SIGINT end this process and every server that it started, whatever its threads wait for.

    A thread does it, which the signal reaches through a pipe: a handler in Python would wait for the main thread, which
    a signal between its last instruction and a blocking call does not wake.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)

    def end() -> None:
        signum = os.read(reading, 1)[0]
        for process in _started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)
    threading.Thread(target=end, name="end-servers", daemon=True).start()


def compilations(log: str) -> list[str]:
    """What vLLM's JIT monitor says was compiled or tuned after it was ready, each once."""
    return sorted({match.group(0).split(". This causes")[0] for match in _COMPILED.finditer(log)})


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server(
    label: str,
    model: Path,
    flags: Sequence[str],
    directory: Path,
    *,
    path: Sequence[Path | None] = (),
    gpus: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Server:
    """A server of ``model`` on a free port, not started.

    Args:
        label: in reports, and the name of its log in ``directory``.
        flags: of ``vllm serve``, beside model, name and address.
        path: folders to import from before all others, such as one with another ``vllm``; None stands for none.
        gpus: devices that it sees; None leaves them all.
        environment: further variables.
    """
    port = free_port()
    command = [sys.executable, "-c", RUN_SERVER, "--model", str(model), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    if first := [str(folder) for folder in path if folder is not None]:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [*first, os.environ.get("PYTHONPATH")]))
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    variables["MEGA_MOE_STATUS_DIR"] = str(directory / f"{label}-status")
    return Server(label, command, variables, directory / f"{label}.log", f"http://127.0.0.1:{port}")


def start_phases(directory: Path) -> dict[str, float]:
    """Seconds of each start-up phase, the slowest rank's, from the status files that a patched vLLM wrote."""
    phases: dict[str, float] = {}
    for path in sorted(directory.glob("*-rank*.json")):
        for phase in json.loads(path.read_text())["phases"]:
            phases[phase["name"]] = max(phases.get(phase["name"], 0.0), phase["seconds"])
    return {name: seconds for name, seconds in phases.items() if name not in ("ready", "stopping", "stopped")}
