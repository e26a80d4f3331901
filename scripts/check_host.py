#!/usr/bin/env python3
"""Say, before anything is installed, whether this machine can serve the CPU demo and how fast a path it gets.

Standard library only: it runs on the system's Python, before the virtual environment exists.
Exit status: 0 usable, 1 a requirement is missing (each line says what to do).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

PYTHON = (3, 11)
DISK_GB = 5
MEMORY_GB = 6


class Check(NamedTuple):
    """One line of the report; ``level`` is ok, note (usable, but the user should know) or fail."""

    name: str
    level: str
    message: str


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> set[str]:
    """Return the instruction-set flags that the kernel reports for the first processor."""
    for line in Path(cpuinfo).read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def check_cpu(machine: str, flags: set[str]) -> Check:
    """Judge the processor: vLLM's CPU build needs AVX2, its DeepSeek-V4 operators AVX512_BF16."""
    if machine != "x86_64":
        return Check("processor", "fail", f"{machine}: vLLM's CPU build is used on x86-64 only; use such a machine")
    if missing := {"avx2", "fma", "f16c"} - flags:
        return Check(
            "processor",
            "fail",
            f"lacks {', '.join(sorted(missing)).upper()}, which vLLM's CPU build needs",
        )
    if "avx512_bf16" in flags:
        return Check("processor", "ok", "AVX512_BF16: vLLM's native DeepSeek-V4 operators")
    return Check(
        "processor",
        "note",
        "no AVX512_BF16: vLLM builds its DeepSeek-V4 operators only for CPUs that have it (Intel Cooper Lake and "
        "Sapphire Rapids or newer, AMD Zen 4 or newer), so this project's portable PyTorch operators stand in: "
        "same results, slower",
    )


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """The pinned packages and the virtual environment need Python 3.11 with venv."""
    wanted = ".".join(map(str, PYTHON))
    if version != PYTHON:
        found = ".".join(map(str, version))
        return Check("python", "fail", f"{found}: install python{wanted}, or `make PYTHON=/path/to/python{wanted}`")
    if importlib.util.find_spec("ensurepip") is None:
        return Check("python", "fail", f"venv is missing: apt-get install python{wanted}-venv")
    return Check("python", "ok", platform.python_version())


def check_libnuma() -> Check:
    """vLLM's extension links against libnuma."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return Check("libnuma", "fail", "libnuma.so.1 is missing: apt-get install libnuma1")
    return Check("libnuma", "ok", "found")


def check_compiler() -> Check:
    """A compiler makes the CPU kernel fast; without it a pure torch path serves."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return Check("compiler", "note", "no g++: the slower torch path serves; apt-get install g++ for the kernel")
    return Check("compiler", "ok", compiler)


def check_disk(path: Path) -> Check:
    """Room for the virtual environment."""
    free = shutil.disk_usage(path).free / 1e9
    if free < DISK_GB:
        return Check("disk", "fail", f"{free:.1f} GB free in {path}, {DISK_GB} GB needed: free some")
    return Check("disk", "ok", f"{free:.0f} GB free")


def check_memory() -> Check:
    """Room for the server's three processes."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if available < MEMORY_GB:
        return Check("memory", "fail", f"{available:.1f} GB, {MEMORY_GB} GB needed: use a larger machine")
    return Check("memory", "ok", f"{available:.0f} GB")


def main() -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=Path("."), help="where the environment will be installed")
    path = parser.parse_args().path
    checks = [
        check_cpu(platform.machine(), cpu_flags()),
        check_python(),
        check_libnuma(),
        check_compiler(),
        check_disk(path),
        check_memory(),
    ]
    for check in checks:
        print(f"{check.name:<10} {check.level:<5} {check.message}")
    if any(check.level == "fail" for check in checks):
        print("This machine cannot serve the demo yet: mend the lines marked fail and run the command again.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
