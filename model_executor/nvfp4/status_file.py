"""One process's status file: replaced atomically, kept fresh by a thread, and locked for as long as the process lives.

Beside ``<run>-rank<N>.json`` lies ``<run>-rank<N>.lock``, which the process holds a POSIX record lock on. The kernel
releases it at any death, and F_GETLK shows that to a reader of the same directory even in another container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FORMAT = 1
HEARTBEAT_S = 5.0


class StatusFile:
    """Writes ``state()`` and who this process is to ``directory``.

    Raises:
        OSError: the directory cannot be written, or a living process already reports for this run and rank.
    """

    def __init__(self, directory: Path, run: str, rank: int, identity: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{run}-rank{rank}.json"
        self._identity = {"format": FORMAT, "run": run, "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._identity |= {"process_started": time.time()} | identity
        # Closing any descriptor of the lock file would release the lock: only this object ever opens it here.
        self._lock_file = open(self.path.with_suffix(".lock"), "w")  # noqa: SIM115
        fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_dead(directory, rank, keep=self.path)
        # Re-entrant: a signal handler may end the server, and report that, in the middle of a write.
        self._writing = threading.RLock()
        self._warned = False
        self._wake = threading.Event()
        self._jobs: list[Callable[[], None]] = []
        self._closed = False

    def run(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write now, and then every HEARTBEAT_S from a thread."""
        self._state = state
        self.write()
        threading.Thread(target=self._beat, name="startup-progress", daemon=True).start()

    def write(self) -> None:
        """Replace the file; a full or missing directory is warned of once and does not stop the rank."""
        if not self._writing.acquire(timeout=1.0):
            return
        try:
            temporary = self.path.with_suffix(".tmp")
            data = json.dumps(self._identity | {"heartbeat": time.time()} | self._state()).encode()
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
            os.replace(temporary, self.path)
        except OSError as error:
            if not self._warned:
                logger.warning("start-up progress cannot be written to %s: %s; start-up goes on", self.path, error)
            self._warned = True
        finally:
            self._writing.release()

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the heartbeat's thread, and write."""
        self._jobs.append(job)
        self._wake.set()

    def close(self) -> None:
        """Stop the thread and give up the lock; the file stays, as of now without a living owner."""
        self._closed = True
        self._wake.set()
        self._lock_file.close()

    def _beat(self) -> None:
        while not self._closed:
            if self._wake.wait(HEARTBEAT_S):
                self._wake.clear()
                while self._jobs and not self._closed:
                    self._jobs.pop(0)()
            if not self._closed:
                self.write()


def write_refusal(directory: Path, run: str, why: str) -> None:
    """Leave ``<run>.refused`` for the status service: this start ended before it had ranks.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f"{run}.refused.tmp"
    temporary.write_text(json.dumps({"format": FORMAT, "run": run, "host": socket.gethostname(), "why": why}))
    os.replace(temporary, directory / f"{run}.refused")


def withdraw_refusals(directory: Path) -> None:
    """Remove what earlier starts left with :func:`write_refusal`."""
    for path in directory.glob("*.refused"):
        path.unlink(missing_ok=True)


def _remove_dead(directory: Path, rank: int, keep: Path) -> None:
    """Delete what dead processes of earlier runs left for ``rank``."""
    for path in directory.glob(f"*-rank{rank}.json"):
        lock_path = path.with_suffix(".lock")
        if path == keep:
            continue
        with contextlib.suppress(OSError), open(lock_path, "r+") as lock_file:
            fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_suffix(".tmp").unlink(missing_ok=True)
            path.with_name(f"{path.name.removesuffix(f'-rank{rank}.json')}.ending").unlink(missing_ok=True)
            path.unlink()
            lock_path.unlink()
