"""Compiles the kernels: ``python -m nvfp4_megamoe.backends.sm100.build``. Needs no GPU and no driver.

Shapes are run-time arguments: the same objects serve V4-Pro, V4-Flash and every other geometry of whole images. The
build fails if one of these two has no kernel, if a kernel spills or uses local memory, if registers or shared memory
pass the limits of the architecture, if a GEMM's machine code lacks the block-scaled instruction ``UTCOMMA ... 4X``, or
if one of its asynchronous instructions sits in a loop that elects threads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from nvfp4_megamoe.backends.sm100 import catalogue, objects, sass
from nvfp4_megamoe.backends.sm100.backend import shape_problem
from nvfp4_megamoe.backends.sm100.objects import REGISTERS, SHARED_LIMIT, KernelObject

# Local experts on one of eight ranks, hidden and intermediate size: what the objects must serve.
GEOMETRIES = {"DeepSeek-V4-Pro": (48, 7168, 3072), "DeepSeek-V4-Flash": (32, 4096, 2048)}
_TOOLS_HINT = "install the CUDA toolkit or the triton package (its wheel has both), or set CUOBJDUMP and NVDISASM"


class BuildError(RuntimeError):
    """A tool is missing or a kernel breaks a rule; the message says which."""


@dataclass(frozen=True)
class Machine:
    """What the machine code of one kernel uses; ``stage``: instructions of each role for a pipeline stage."""

    registers: int
    stack: int
    local: int
    spills: int
    multiplications: int
    elections: int = 0
    stage: dict[str, float] = field(default_factory=dict)


def find_tool(name: str) -> str:
    """Path of ``cuobjdump`` or ``nvdisasm``: the environment, PATH, the CUDA toolkit, NVIDIA's or triton's package."""
    candidates = [os.environ.get(name.upper()), name, f"/usr/local/cuda/bin/{name}"]
    folders = ("nvidia/cu13/bin", "triton/backends/nvidia/bin")
    candidates += [str(Path(path, folder, name)) for path in sys.path for folder in folders]
    for candidate in candidates:
        if candidate and (found := shutil.which(candidate)):
            return found
    raise BuildError(f"{name} was not found: {_TOOLS_HINT}")


def inspect(cubin: Path) -> Machine:
    """Resources and instructions of a cubin with one kernel."""
    usage = _output([find_tool("cuobjdump"), "--dump-resource-usage", cubin])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    if len(numbers) != 3:
        raise BuildError(f"cuobjdump reports no resource usage for {cubin.name}: {usage[:200]}")
    code = _output([find_tool("nvdisasm"), "-c", cubin])
    spills = len(re.findall(r"\b(?:STL|LDL)(?:\.\w+)*\s", code))
    multiplications = len(re.findall(r"\bUTCOMMA(?:\.\w+)*\.4X\b", code))
    return Machine(
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
        spills,
        multiplications,
        sass.elections(code),
        sass.instructions_a_stage(code),
    )


def _output(command: list) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{command[0]} failed: {result.stderr.strip()[:500]}")
    return result.stdout


def problems(name: str, item: KernelObject, machine: Machine) -> list[str]:
    """Rules that a kernel breaks."""
    found = []
    if machine.spills or machine.stack or machine.local:
        found.append(f"spills ({machine.spills} instructions, {machine.stack} stack, {machine.local} local bytes)")
    if machine.registers * item.threads > REGISTERS:
        found.append(f"{machine.registers} registers by {item.threads} threads pass {REGISTERS}")
    if item.shared_bytes > SHARED_LIMIT:
        found.append(f"{item.shared_bytes} bytes of shared memory pass {SHARED_LIMIT}")
    if name.startswith("gemm") and not machine.multiplications:
        found.append("no UTCOMMA ... 4X instruction")
    if machine.elections:
        found.append(f"{machine.elections} loops elect a thread for one asynchronous instruction")
    return [f"{name}: {text}" for text in found]


def build(target: Path, names: tuple[str, ...] = catalogue.NAMES) -> list[tuple[KernelObject, Machine, float, int]]:
    """Compile ``names`` into ``target``; returns kernel, machine code facts, seconds and bytes of each.

    Raises:
        BuildError: a rule is broken; nothing is left that a later run could load.
    """
    unserved = {name: problem for name, shape in GEOMETRIES.items() if (problem := shape_problem(*shape))}
    if unserved:
        raise BuildError("; ".join(f"{name}: {problem}" for name, problem in unserved.items()))
    target.mkdir(parents=True, exist_ok=True)
    (target / objects.MANIFEST).unlink(missing_ok=True)
    report, broken = [], []
    for name in names:
        start = time.perf_counter()
        compiled = catalogue.compile_kernel(name)
        seconds = time.perf_counter() - start
        cubin = target / f"{name}.cubin"
        cubin.write_bytes(compiled.__cubin__)
        machine = inspect(cubin)
        item = catalogue.describe(name, compiled.__ptx__, machine.registers)
        broken += problems(name, item, machine)
        if item.threads != getattr(catalogue.source(name), "threads", item.threads):
            broken.append(f"{name}: the object has {item.threads} threads, another variant's")
        report.append((item, machine, seconds, cubin.stat().st_size))
    if broken:
        raise BuildError("; ".join(broken))
    objects.write(target, [item for item, *_ in report], versions())
    return report


def versions() -> dict[str, str]:
    """Versions that made the objects."""
    return {"nvidia-cutlass-dsl": importlib.metadata.version("nvidia-cutlass-dsl"), "architecture": catalogue.ARCH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=objects.directory(), help="directory of the objects")
    args = parser.parse_args()
    try:
        report = build(args.output)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(
        "kernel | compile s | cubin bytes | threads | registers | spills | shared bytes | stages | UTCOMMA 4X"
        " | instructions a stage"
    )
    for item, machine, seconds, size in report:
        stages = catalogue.stages(item.name)
        fields = (item.name, f"{seconds:.1f}", size, item.threads, item.registers, machine.spills, item.shared_bytes)
        roles = ", ".join(f"{role} {number:.0f}" for role, number in machine.stage.items())
        print(" | ".join(str(value) for value in (*fields, stages, machine.multiplications, roles)))
    seconds, size = sum(item[2] for item in report), sum(item[3] for item in report)
    print(f"{len(report)} kernels, {seconds:.1f} s, {size} bytes; they serve")
    for name, (experts, hidden, inter) in GEOMETRIES.items():
        print(f"  {name}: {experts} experts a rank, hidden {hidden}, intermediate {inter}")
    print("  and every other hidden and intermediate size in multiples of 256")
    print(", ".join(f"{name} {value}" for name, value in versions().items()))


if __name__ == "__main__":
    main()
