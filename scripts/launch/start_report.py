"""What the entrypoint tells the status service: ``server-<port>.json``, and a lock for as long as this process lives.

The file is replaced atomically at every change and every five seconds. docs/startup.md describes it; its reader is
scripts/status/server_files.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from status.server_files import FORMAT, STARTING

HEARTBEAT_S = 5.0


class StartReport:
    """Reports to ``directory``; None reports to nobody, and so does a directory that cannot be written, with a warning.

    Make it once in a process and directory: closing any descriptor of the lock file would release the lock.
    """

    def __init__(self, directory: Path | None, port: int) -> None:
        self._content: dict[str, Any] = {"format": FORMAT, "port": port, "host": socket.gethostname()}
        self._content |= {"pid": os.getpid(), "started": time.time(), "phase": STARTING, "warm_up": None}
        self._content |= {"compiled": None}
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._path: Path | None = None
        if directory is None:
            return
        path = directory / f"server-{port}.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            print(
                f"[entrypoint] warm-up and compilation are not reported: {path}: {error}", file=sys.stderr, flush=True
            )
            return
        self._path = path
        self.tell()

    def tell(self, **changes: Any) -> None:
        """Change what is told, and write it; a full directory does not stop the start."""
        with self._writing:
            self._content |= changes
            if self._path is None:
                return
            temporary = self._path.with_suffix(".tmp")
            with contextlib.suppress(OSError):
                temporary.write_text(json.dumps(self._content | {"heartbeat": time.time()}))
                os.replace(temporary, self._path)

    def beat(self) -> None:
        """Write every HEARTBEAT_S from a thread, so that a reader can tell a long request from a frozen entrypoint."""
        threading.Thread(target=self._beat, name="start-report", daemon=True).start()

    def close(self) -> None:
        """Stop writing."""
        self._ended.set()

    def refuse(self, why: str) -> None:
        """Leave word for the status service that this start has failed; the next start removes it."""
        if self._path is None:
            return
        run = os.environ.get("MEGA_MOE_RUN_ID") or self._path.stem
        with contextlib.suppress(OSError):
            self._path.with_name(f"{run}.refused").write_text(json.dumps({"format": FORMAT, "run": run, "why": why}))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self.tell()
