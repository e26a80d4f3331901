"""One shard, read past the page cache where that holds nothing of it, with every fault named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from nvfp4_megamoe.checkpoint.buffers import ALIGNMENT
from nvfp4_megamoe.checkpoint.page_cache import is_cached
from nvfp4_megamoe.errors import CheckpointError

_REQUEST_BYTES = 8 << 20
_NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


class Identity(NamedTuple):
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int


class Fetched(NamedTuple):
    """Bytes that came from the disk and from the system's page cache, alignment included."""

    disk_bytes: int
    cached_bytes: int


def identify(path: Path, descriptor: int | None = None) -> Identity:
    """The identity of the file at ``path``, or of the one that is open.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    try:
        status = os.stat(path) if descriptor is None else os.fstat(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class ShardFile:
    """A shard open for reading, by several threads at once.

    Pages that the system holds in memory are copied from there; the others are read from the disk past the page cache
    (O_DIRECT): that takes no memory and next to no processor time, so the disk and not the processor sets the pace.
    Where direct reads are impossible, ``buffered_because`` says why and all goes through the page cache.
    """

    def __init__(self, path: Path, identity: Identity, direct: bool = True) -> None:
        """Open the file.

        Args:
            identity: of the file whose header was read.
            direct: whether to read past the page cache.

        Raises:
            CheckpointError: it cannot be opened, or is not that file any more.
        """
        self.path = path
        self.buffered_because = None if direct else "it was asked for"
        self._identity = identity
        self._descriptor: int | None = None
        self._direct: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            self.check_unchanged()
            if direct:
                self._open_direct()
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            self.close()
            raise

    def read(self, buffer: memoryview, start: int, end: int) -> Fetched:
        """Read bytes ``start`` to ``end`` of the file into ``buffer``, from its beginning.

        Args:
            buffer: aligned memory of at least ``end - start`` bytes, rounded up to the alignment.
            start: aligned.

        Returns:
            What came from where.

        Raises:
            CheckpointError: the file ends before ``end``, or the system cannot read it.
        """
        offset, disk, cached = start, 0, 0
        try:
            while offset < end:
                length = min(_REQUEST_BYTES, end - offset)
                got = self._request(buffer[offset - start :], offset, length)
                disk, cached = disk + got.disk_bytes, cached + got.cached_bytes
                offset += min(length, got.disk_bytes + got.cached_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {end} cannot be read: {error.strerror}. Look for faults of the disk "
                "or the network file system in the kernel's log, then copy or download the file again."
            ) from error
        return Fetched(disk, cached)

    def check_unchanged(self) -> None:
        """Compare the open file and the one at its path with the identity given.

        Raises:
            CheckpointError: it was written to or replaced since.
        """
        for found in (identify(self.path, self._descriptor), identify(self.path)):
            if found != self._identity:
                raise CheckpointError(
                    f"{self.path} changed while it was being loaded: expected inode {self._identity.inode}, "
                    f"{self._identity.size} bytes, found inode {found.inode}, {found.size} bytes, modified "
                    f"{(found.modified_ns - self._identity.modified_ns) / 1e9:+.3f} s. Let the download or copy "
                    "finish, then start again."
                )

    def close(self) -> None:
        """Close the file; it may be closed already."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._direct = None

    def _open_direct(self) -> None:
        try:
            self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NO_DIRECT_IO:
                raise _unreadable(self.path, error) from error
            self.buffered_because = "its file system has no direct I/O"

    def _request(self, buffer: memoryview, offset: int, length: int) -> Fetched:
        """Read up to ``length`` bytes at ``offset``, or up to the alignment behind them: the next is aligned."""
        if self.buffered_because is not None:
            got = os.preadv(self._descriptor, [buffer[:length]], offset)
            self._require(got > 0, offset, got)
            return Fetched(got, 0)
        if is_cached(self._descriptor, offset, length):
            got = 0
            while got < length:
                part = os.preadv(self._descriptor, [buffer[got:length]], offset + got)
                self._require(part > 0, offset, got)
                got += part
            return Fetched(0, got)
        try:
            got = os.preadv(self._direct, [buffer[: -(-length // ALIGNMENT) * ALIGNMENT]], offset)
        except OSError as error:
            if error.errno not in _NO_DIRECT_IO:
                raise
            # The descriptor stays open: another thread may be about to read from it.
            self.buffered_because = f"its file system refuses direct I/O ({error.strerror})"
            return self._request(buffer, offset, length)
        self._require(got >= length or (got > 0 and got % ALIGNMENT == 0), offset, got)
        return Fetched(got, 0)

    def _require(self, enough: bool, offset: int, got: int) -> None:
        if not enough:
            raise CheckpointError(
                f"{self.path} ends at byte {offset + got}; expected {self._identity.size} bytes. The file was "
                "truncated while it was being loaded: download or copy it again."
            )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a readable shard, found: {error.strerror}. Download the missing file, or correct the path "
        "or its permissions."
    )
