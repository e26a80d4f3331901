"""One run at a time on one installation, across processes and containers that share it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import PatchError


@contextlib.contextmanager
def exclusive(work: Path, timeout_s: float = 300.0) -> Iterator[None]:
    """Hold `work`/lock (flock; the system releases it when the process dies), creating the folder if need be.

    On exit the folder is removed if nothing but the lock is in it. Raises PatchError if it cannot be created or is held
    by another process for longer than `timeout_s`.
    """
    fd = _acquire(work, time.monotonic() + timeout_s)
    try:
        yield
    finally:
        try:
            if os.listdir(work) == ["lock"]:
                os.unlink(work / "lock")
                os.rmdir(work)
        except OSError:
            pass  # another process is already waiting in it, or the folder is read-only: it stays
        os.close(fd)


def _acquire(work: Path, deadline: float) -> int:
    told = False
    while True:
        try:
            fd = _open(work)
        except FileNotFoundError:
            continue  # the holder removed the folder between our two steps
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have removed the file after we opened it: then this lock excludes nobody.
            if os.fstat(fd).st_ino == os.stat(work / "lock").st_ino:
                return fd
            os.close(fd)
            continue
        except FileNotFoundError:
            os.close(fd)
            continue
        except BlockingIOError:
            os.close(fd)
        if time.monotonic() > deadline:
            raise PatchError(
                f"another patch_vllm.py has held {work / 'lock'} for too long; see which process has it open"
            )
        if not told:
            print("patch_vllm: waiting for another run on the same installation", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.05)


def _open(work: Path) -> int:
    try:
        if not work.is_dir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(work, 0o755)
        try:
            return os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError:
            pass
        except OSError as error:
            if error.errno != errno.EROFS:  # a lock that exists can still be held for reading
                raise
        return os.open(work / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if not work.is_dir() or os.access(work, os.W_OK):
            raise
        raise _not_writable(work, "read-only") from None
    except OSError as error:
        raise _not_writable(work, error.strerror) from error


def _not_writable(work: Path, why: str) -> PatchError:
    return PatchError(
        f"{work.parent} is not writable ({why}). Run as a user who may write to it, on a writable file system."
    )
