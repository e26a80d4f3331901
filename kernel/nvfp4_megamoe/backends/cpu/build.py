"""Compile the CPU kernel for this machine: ``python -m nvfp4_megamoe.backends.cpu.build``.

The library lies in ``$NVFP4_MEGAMOE_CACHE`` (default ``~/.cache/nvfp4_megamoe``) under a name that holds a hash of the
sources, the flags, torch's version and the CPU's feature flags; a library for another machine or version is never
loaded. It is compiled in a directory of its own and renamed into place, so a process never sees a part of it; of
processes that start at once one compiles and the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from nvfp4_megamoe.errors import UnsupportedError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512"),
    *("-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"),
)
REQUIRED_CPU_FLAGS = ("avx2", "fma", "f16c")
_INSTALL = "Install a C++ compiler (Debian, Ubuntu: apt-get install g++) or point CXX at one."


def cache_directory() -> Path:
    """``$NVFP4_MEGAMOE_CACHE``, or ``~/.cache/nvfp4_megamoe``."""
    return Path(os.environ.get("NVFP4_MEGAMOE_CACHE") or Path.home() / ".cache" / "nvfp4_megamoe")


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """Feature flags of the CPU in the order of the alphabet; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    return next((tuple(sorted(line.split(":")[1].split())) for line in lines if line.startswith("flags")), ())


def library_path(flags: tuple[str, ...] = FLAGS) -> Path:
    """Where the library for this machine is, built or not."""
    digest = hashlib.sha256()
    for part in (*flags, torch.__version__, platform.machine(), *cpu_flags()):
        digest.update(part.encode() + b"\0")
    for file in sorted([*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_directory() / f"cpu-{digest.hexdigest()[:20]}.so"


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the kernel unless that is done already.

    Args:
        flags: for the compiler; tests build the variants of other CPUs.

    Returns:
        Path of the library.

    Raises:
        UnsupportedError: the CPU lacks the instructions, there is no compiler, or it fails.
    """
    target = library_path(flags)
    if target.exists():
        return target
    missing = [flag for flag in REQUIRED_CPU_FLAGS if flag not in cpu_flags()]
    if missing:
        raise UnsupportedError(f"The CPU kernel needs x86-64 with AVX2, FMA and F16C; this CPU lacks {missing}.")
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name)
    if compiler is None:
        raise UnsupportedError(f"The CPU kernel is not built and {name} is not on the PATH. {_INSTALL}")
    start = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as directory:
            if target.exists():
                return target
            logger.info("Compiling the CPU kernel, once for this machine")
            made, library = f"{directory}/kernel.o", f"{directory}/kernel.so"
            _run([compiler, *flags, "-c", str(SOURCE / "kernel.cpp"), "-o", made])
            # Linked without -fopenmp: the OpenMP symbols must resolve to the runtime that torch has loaded. A second
            # runtime would have its own threads, which nothing binds to cores.
            _run([compiler, "-shared", made, "-o", library])
            os.replace(library, target)
    except OSError as error:
        raise UnsupportedError(
            f"Cannot write the CPU kernel to {target.parent}: {error}. Set NVFP4_MEGAMOE_CACHE to a writable directory."
        ) from error
    logger.info("Built the CPU kernel in %.1f s: %s", time.monotonic() - start, target)
    return target


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out; they go on if this one dies."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: both compile, the later rename wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        tail = "\n".join(result.stderr.splitlines()[-20:])
        raise UnsupportedError(f"The CPU kernel does not compile ({' '.join(command)}):\n{tail}\n{_INSTALL}")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    done = library_path().exists()
    start = time.monotonic()
    path = build()
    print(f"{path} ({'up to date' if done else f'built in {time.monotonic() - start:.1f} s'})")


if __name__ == "__main__":
    main()
