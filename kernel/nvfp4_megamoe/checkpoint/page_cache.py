"""Which pages of a file the system holds in memory: cachestat(2), Linux 6.5 and later."""

from __future__ import annotations

import ctypes
import errno
import os

PAGE = os.sysconf("SC_PAGE_SIZE")
_CACHESTAT = 451  # the same number on every architecture
_CANNOT_TELL = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


_libc = ctypes.CDLL(None, use_errno=True)


def is_cached(descriptor: int, offset: int, length: int) -> bool:
    """Whether every page of ``length`` bytes at ``offset`` is in memory; does not bring any in.

    False where the kernel cannot tell or does not want to: it tells the owner of a file and those who may write it.

    Raises:
        OSError: ``descriptor`` is no open file.
    """
    stat = _Stat()
    arguments = (ctypes.byref(_Range(offset, length)), ctypes.byref(stat), ctypes.c_uint(0))
    if _libc.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_uint(descriptor), *arguments):
        code = ctypes.get_errno()
        if code in _CANNOT_TELL:
            return False
        raise OSError(code, os.strerror(code))
    return stat.cached >= (offset + length - 1) // PAGE - offset // PAGE + 1
