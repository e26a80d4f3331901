"""GPUs, driver and links, from nvidia-smi: nothing here starts CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

from .finding import FAIL, NOTE, OK, SKIPPED, Finding

# Compute capabilities that the kernels are built for, and the lowest driver of each CUDA major version
# (CUDA Toolkit release notes, "CUDA minor version compatibility").
SUPPORTED = {"9.0": "Hopper", "10.0": "Blackwell", "10.3": "Blackwell Ultra"}
LOWEST_DRIVER = {12: 525, 13: 580}
_TIMEOUT_S = 60


class Gpu(NamedTuple):
    """One GPU; memory in bytes."""

    name: str
    capability: str
    memory: int
    free: int
    driver: str


def query() -> tuple[list[Gpu], str]:
    """The GPUs that nvidia-smi lists, or none and why."""
    if shutil.which("nvidia-smi") is None:
        return [], "nvidia-smi is not installed"
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    try:
        result = _smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    if result.returncode:
        return [], f"nvidia-smi failed: {(result.stdout + result.stderr).strip().splitlines()[-1:]}"
    rows = [[value.strip() for value in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
    try:
        return [Gpu(row[0], row[1], int(row[2]) << 20, int(row[3]) << 20, row[4]) for row in rows], ""
    except (IndexError, ValueError):
        return [], f"nvidia-smi printed {result.stdout.strip()[:200]!r}"


def check(gpus: list[Gpu], why_none: str, ranks: int, cuda: str | None) -> list[Finding]:
    """Judge count, architecture, driver and links for ``ranks`` ranks and a PyTorch built for ``cuda`` (None: CPU)."""
    if cuda is None:
        seen = f"{len(gpus)} GPU(s)" if gpus else f"no GPU ({why_none})"
        level = NOTE if gpus else SKIPPED
        return [Finding("GPU", level, f"{seen}; PyTorch is a CPU build: this serves on the CPU")]
    if not gpus:
        remedy = "run the container with GPUs (--gpus all, or nvidia.com/gpu), or install the CPU build"
        return [Finding("GPU", FAIL, f"none: {why_none}", remedy)]
    findings = [_count(gpus, ranks), _architecture(gpus), _driver(gpus[0].driver, cuda)]
    busy = [index for index, gpu in enumerate(gpus[:ranks]) if gpu.free < 0.95 * gpu.memory]
    if busy:
        text = f"GPU {', '.join(map(str, busy))} in use by others"
        findings.append(Finding("GPU memory free", NOTE, text, "end the processes that nvidia-smi lists"))
    return findings + ([_links(ranks)] if ranks > 1 else [])


def _count(gpus: list[Gpu], ranks: int) -> Finding:
    if len(gpus) < ranks:
        remedy = f"give the container {ranks} GPUs, or serve with fewer ranks"
        return Finding("GPU count", FAIL, f"{len(gpus)} for {ranks} ranks", remedy)
    return Finding("GPU count", OK, f"{len(gpus)} for {ranks} rank(s)")


def _architecture(gpus: list[Gpu]) -> Finding:
    kinds = sorted({(gpu.name, gpu.capability) for gpu in gpus})
    text = ", ".join(f"{name} ({capability})" for name, capability in kinds)
    if any(capability not in SUPPORTED for _, capability in kinds):
        wanted = ", ".join(f"{capability} {name}" for capability, name in SUPPORTED.items())
        return Finding("GPU architecture", FAIL, text, f"the kernels are built for {wanted}")
    return Finding("GPU architecture", OK if len(kinds) == 1 else NOTE, text, "" if len(kinds) == 1 else "mixed GPUs")


def _driver(driver: str, cuda: str) -> Finding:
    lowest = LOWEST_DRIVER.get(int(cuda.split(".")[0]))
    text = f"{driver}, PyTorch is built for CUDA {cuda}"
    major = driver.split(".")[0]
    if lowest is None or not major.isdecimal():
        return Finding("driver", NOTE, text, "this pair is not known here")
    if int(major) < lowest:
        return Finding("driver", FAIL, text, f"install driver {lowest} or newer on the host")
    return Finding("driver", OK, text)


def _links(ranks: int) -> Finding:
    try:
        output = _smi("topo", "-m").stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("NVLink", NOTE, f"nvidia-smi topo -m: {error}")
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()]
    matrix = [words[1 : 1 + ranks] for words in lines if words[:1] and re.fullmatch(r"GPU\d+", words[0])]
    matrix = [row for row in matrix if "X" in row][:ranks]
    if len(matrix) < ranks:
        return Finding("NVLink", NOTE, "nvidia-smi topo -m shows no matrix")
    slow = sum(entry != "X" and not entry.startswith("NV") for row in matrix for entry in row) // 2
    if slow:
        return Finding("NVLink", NOTE, f"{slow} pair(s) of GPUs without NVLink", "expect slow collectives")
    return Finding("NVLink", OK, f"all {ranks} GPUs linked to each other")


def _smi(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S)
