"""Durable writes, hashes and bytecode caches."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import PatchError


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Image:
    """What a file is to be: the hash of its content, permission bits, modification time in ns."""

    sha: str
    mode: int
    mtime_ns: int


def read(path: Path) -> bytes | None:
    """Content of a regular file, None if nothing is there. Raises PatchError for anything else there."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise PatchError(
                f"{path} is not a regular file. Install vLLM as copied files "
                "(pip's way; with uv: --link-mode=copy), then run again."
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror}") from error


def digest(path: Path) -> str | None:
    """Hash of a regular file, None if nothing is there."""
    data = read(path)
    return None if data is None else sha256(data)


def image_of(path: Path, data: bytes) -> Image:
    """Image of an existing file whose content is `data`."""
    info = os.stat(path)
    return Image(sha256(data), stat.S_IMODE(info.st_mode), info.st_mtime_ns)


def fresh_mtime(other_ns: int | None) -> int:
    """Now, in ns, but not in the second of `other_ns`: Python trusts a .pyc that knows its source's second and size."""
    now = time.time_ns()
    if other_ns is not None and other_ns // 10**9 == now // 10**9:
        return now + 10**9
    return now


def write_durable(path: Path, data: bytes, mode: int = 0o644, mtime_ns: int | None = None) -> None:
    """Write and fsync one file. Not atomic: callers write to a temporary name and rename."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        if mtime_ns is not None:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically and durably."""
    temporary = path.with_name(path.name + ".tmp")
    write_durable(temporary, (json.dumps(value, indent=1) + "\n").encode())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def purge_bytecode(source: Path) -> None:
    """Remove the cached bytecode of a Python source, and the cache folder if that leaves it empty."""
    if source.suffix != ".py":
        return
    cache = source.parent / "__pycache__"
    # A cache of another owner may resist; Python ignores it all the same, for the source's new time or absence.
    with contextlib.suppress(OSError):
        for name in glob.glob(f"{glob.escape(source.stem)}.*.pyc", root_dir=cache):
            os.unlink(cache / name)
        os.rmdir(cache)


def remove_if_empty(directory: Path) -> None:
    """Remove a directory unless something is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(directory)
