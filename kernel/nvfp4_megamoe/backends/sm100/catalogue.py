"""The compiled kernels by name, and how each is compiled. Needs nvidia-cutlass-dsl, no GPU and no driver."""

from __future__ import annotations

import atexit
import functools
import os
import re
import tempfile

from nvfp4_megamoe.backends.sm100.layout import FEW_SLOTS
from nvfp4_megamoe.backends.sm100.objects import KernelObject
from nvfp4_megamoe.backends.sm100.plan import CLUSTER

ARCH = "sm_100a"
NAMES = (
    "plan_one",
    "plan_cluster",
    "quantize_rows",
    "gemm1_n128",
    "gemm1_n256",
    "gemm1_pair",
    "gemm2_n128",
    "gemm2_n128_add",
    "gemm2_pair",
    "gemm2_pair_add",
    *(f"gemm1_few{slots}" for slots in FEW_SLOTS),
    *(f"gemm2_few{slots}{mode}" for mode in ("", "_add") for slots in FEW_SLOTS),
    "sum_slots",
)
# Arguments of the host entry: q address, i int32, f float32. The last int32 of each is a launch size alone.
_ARGUMENTS = {
    "plan": "qqqqqqqqqqiiiiiiii",
    "quantize": "qqqqqii",
    "gemm1": "qqqqqqqqqqqqiiifi",
    "gemm2": "qqqqqqqqqqqqiiifi",
    "sum": "qqqiii",
}


def arguments(name: str) -> str:
    """Argument kinds of a kernel's host entry."""
    return _ARGUMENTS[name.partition("_")[0]]


@functools.cache
def _chosen() -> list[str]:
    """The process's architecture, once there is one."""
    return []


def set_environment(architecture: str = ARCH) -> None:
    """Target and dump directory of the kernel language, to be set before its first import.

    It hands PTX and cubin over through files whose names variants share: every process needs a directory of its own.

    Raises:
        RuntimeError: the process compiles for another architecture already.
    """
    if _chosen():
        if _chosen() != [architecture]:
            raise RuntimeError(f"this process compiles for {_chosen()[0]}: use another for {architecture}")
        return
    _chosen().append(architecture)
    directory = tempfile.TemporaryDirectory(prefix="sm100-compile-")
    atexit.register(directory.cleanup)
    os.environ["CUTE_DSL_ARCH"] = architecture
    os.environ["CUTE_DSL_DUMP_DIR"] = directory.name


def compile_kernel(name: str, options: str = "--keep-ptx --keep-cubin --opt-level 3", architecture: str = ARCH):
    """Compile one kernel; shapes are run-time arguments, so one object serves every geometry.

    Raises:
        KeyError: no such kernel.
        RuntimeError: see :func:`set_environment`.
    """
    set_environment(architecture)
    from cutlass import Float32, Int32, Int64, cute
    from cutlass.cute.runtime import make_fake_stream

    kinds = {"q": Int64, "i": Int32, "f": Float32}
    placeholders = [kinds[kind](1) for kind in arguments(name)]
    return cute.compile(source(name), *placeholders, make_fake_stream(), options=options)


def source(name: str):
    """The kernel language's object of that name."""
    from nvfp4_megamoe.backends.sm100.finalize import SumSlots
    from nvfp4_megamoe.backends.sm100.gemm import GroupedGemm
    from nvfp4_megamoe.backends.sm100.gemm_few import FewGemm
    from nvfp4_megamoe.backends.sm100.plan_kernel import MakePlan
    from nvfp4_megamoe.backends.sm100.quantize import QuantizeRows

    if match := re.fullmatch(r"gemm(?P<which>[12])_(?P<tile>n128|n256|pair)(?P<add>_add)?", name):
        tile_n = 128 if match["tile"] == "n128" else 256
        return GroupedGemm(match["which"] == "1", tile_n, bool(match["add"]), match["tile"] == "pair")
    if match := re.fullmatch(r"gemm(?P<which>[12])_few(?P<slots>\d+)(?P<add>_add)?", name):
        return FewGemm(match["which"] == "1", int(match["slots"]), bool(match["add"]))
    if name.startswith("plan_"):
        return MakePlan({"plan_one": 1, "plan_cluster": CLUSTER}[name])
    return {"quantize_rows": QuantizeRows, "sum_slots": SumSlots}[name]()


def stages(name: str) -> int:
    """Pipeline stages of shared memory, 0 where there is no pipeline."""
    return getattr(source(name), "stages", 0)


def describe(name: str, ptx: str, registers: int) -> KernelObject:
    """What a launch of the compiled kernel must say."""
    kernel = source(name)
    symbol = re.search(r"\.entry\s+([\w$]+)", ptx)[1]
    parameters = re.findall(r"\.param\s+\.(u64|u32|f32|b32|b64)\s", ptx[: ptx.index("{")])
    kinds = "".join({"u64": "q", "b64": "q", "f32": "f"}.get(kind, "i") for kind in parameters)
    cluster = getattr(kernel, "cluster", 1)
    threads = int(re.search(r"\.reqntid\s+(\d+)", ptx)[1])
    return KernelObject(name, symbol, threads, getattr(kernel, "shared_bytes", 0), cluster, registers, kinds)
