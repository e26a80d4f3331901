"""Compiles the kernels: ``python -m nvfp4_megamoe.backends.sm90.build``. Needs nvcc 12.4 or newer, no GPU, no torch.

The result is one shared library with a plain C interface (``csrc/api.cu``). Serving only loads it, it never compiles.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "libnvfp4_sm90.so"
ARCHITECTURE = "arch=compute_90a,code=sm_90a"
WIDTHS = (*range(8, 129, 8), *range(144, 257, 16))
MAX_SPILL = 16  # bytes: a few scalars around a tile; more would be in a main loop


class BuildError(RuntimeError):
    """nvcc is missing or failed; the message says what to do."""


def find_nvcc() -> str | None:
    """Path of nvcc: ``$NVCC``, then ``$PATH``, then ``$CUDA_HOME/bin``; None where there is none."""
    candidates = [os.environ.get("NVCC"), "nvcc"]
    candidates += [str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")] if "CUDA_HOME" in os.environ else []
    candidates += ["/usr/local/cuda/bin/nvcc"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def sources_digest() -> str:
    """Hash of everything that the library is made from; the library holds it, and loading compares it."""
    digest = hashlib.sha256(wgmma_header().encode())
    for file in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def wgmma_header(widths: tuple[int, ...] = WIDTHS) -> str:
    """C++ of ``Wgmma<N>::rs`` and ``WgmmaE4m3<N>::rs``: operand A in registers, float32 accumulators in place."""
    lines = ["#pragma once", "#include <cstdint>", "namespace sm90 {"]
    for name, shape, flags in (
        ("Wgmma", "k16.f32.bf16.bf16", "1, 1, 1, 0"),
        ("WgmmaE4m3", "k32.f32.e4m3.e4m3", "1, 1, 1"),
    ):
        lines += [f"template <int N> struct {name};"]
        for n in widths:
            lines += _wgmma_struct(f"m64n{n}{shape}", n // 2, flags, f"{name}<{n}>")
    return "\n".join([*lines, "}  // namespace sm90", ""])


def _wgmma_struct(instruction: str, count: int, flags: str, specialization: str) -> list[str]:
    regs = ", ".join(f"%{i}" for i in range(count))
    outs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return [
        f"template <> struct {specialization} {{",
        "    template <int M>",
        "    static __device__ __forceinline__ void rs("
        "float (&d)[M], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {",
        f'        asm volatile("wgmma.mma_async.sync.aligned.{instruction} {{{regs}}}, '
        f'{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, {flags};"',
        f"            : {outs}",
        '            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));',
        "    }",
        "};",
    ]


def compile_library(output: Path = LIBRARY) -> str:
    """Compile ``csrc/api.cu`` to ``output`` and return ptxas' resource report. Raises BuildError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc not found: install CUDA 12.4 or newer, or set NVCC to its path")
    with tempfile.TemporaryDirectory() as generated:
        (Path(generated) / "wgmma.cuh").write_text(wgmma_header())
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-gencode={ARCHITECTURE}", "-Xptxas", "-v", "-shared"]
        command += [f'-DNVFP4_SM90_SOURCES="{sources_digest()}"']
        command += ["-Xcompiler", "-fPIC", "-cudart", "static", "-I", generated, "-I", str(SOURCES)]
        partial = Path(generated) / output.name
        run = subprocess.run([*command, "-o", str(partial), str(SOURCES / "api.cu")], capture_output=True, text=True)
        if run.returncode != 0:
            raise BuildError(f"nvcc failed with {run.returncode}:\n{run.stderr}")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(partial, output)
    if problems := report_problems(run.stderr):
        raise BuildError("the compiler lost performance that the kernels rely on:\n" + "\n".join(problems))
    return run.stderr


def report_problems(report: str) -> list[str]:
    """Lines of ptxas' report that say wgmma was serialized, and kernels that spill more than MAX_SPILL bytes."""
    problems = [line.strip() for line in report.splitlines() if "Potential Performance Loss" in line]
    for name, use in kernel_resources(report).items():
        spilled = max(use.get("spill_stores", 0), use.get("spill_loads", 0))
        if spilled > MAX_SPILL:
            problems.append(f"{name} spills {spilled} bytes, at most {MAX_SPILL} are allowed")
    return problems


def kernel_resources(report: str) -> dict[str, dict[str, int]]:
    """Per kernel (mangled name) of ptxas' report: registers, stack, spill_stores, spill_loads (bytes)."""
    found: dict[str, dict[str, int]] = {}
    name = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match.group(1)
            found[name] = {}
        elif name and (
            match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            found[name].update(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(match.group(1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=LIBRARY)
    output = parser.parse_args().output
    try:
        report = compile_library(output)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for name, use in sorted(kernel_resources(report).items()):
        print(f"{use.get('registers', 0):4d} registers  {use.get('spill_stores', 0):4d} spilled bytes  {name}")
    print(f"wrote {output}, sources {sources_digest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
