"""The Hopper kernels compile for sm_90a with wgmma pipelined and no spill worth the name; bad geometry is refused."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.backends.sm90 import backend, build
from nvfp4_megamoe.moe.geometry import MoEGeometry

GEOMETRY = MoEGeometry(num_experts=8, num_local_experts=8, top_k=2, hidden=512, intermediate=256, swiglu_limit=10.0)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ptxas' report of one decode and one prefill kernel and of the small kernels."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("sm90")
    (folder / "wgmma.cuh").write_text(build.wgmma_header())
    (folder / "some.cu").write_text(
        '#include "gemm.cuh"\n#include "repack.cuh"\n#include "route.cuh"\nusing namespace sm90;\n'
        "template __global__ void sm90::gemm_kernel<0, 0, 4, 2, 24, 24, 8>(const __grid_constant__ GemmParams);\n"
        "template __global__ void sm90::gemm_kernel<1, 0, 2, 2, 128, 128, 32>(const __grid_constant__ GemmParams);\n"
        "template __global__ void sm90::gemm_kernel<0, 1, 2, 2, 80, 80, 8>(const __grid_constant__ GemmParams);\n"
        "template __global__ void sm90::gemm_kernel<1, 1, 2, 1, 256, 256, 32>(const __grid_constant__ GemmParams);\n"
        "template __global__ void sm90::route_kernel<int>(const __grid_constant__ RouteParams);\n"
    )
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-gencode={build.ARCHITECTURE}",
        "-Xptxas",
        "-v",
        "-cubin",
        "-I",
        str(folder),
    ]
    command += ["-I", str(build.SOURCES), "-o", str(folder / "some.cubin"), str(folder / "some.cu")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_no_serialized_wgmma_and_no_spills(report: str) -> None:
    assert build.report_problems(report) == []
    use = build.kernel_resources(report)
    assert len([name for name in use if "gemm_kernel" in name]) == 4
    assert len([name for name in use if "repack" in name or "route" in name or "reduce" in name]) >= 3


def test_report_problems_are_found(report: str) -> None:
    serialized = "ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    assert build.report_problems(serialized + report)
    spilled = re.sub(r"\d+ bytes spill stores", "20 bytes spill stores", report)
    assert build.report_problems(spilled)


def test_every_variant_is_compiled() -> None:
    source = (build.SOURCES / "api.cu").read_text()
    for precision, variants in (("kBf16", backend.VARIANTS), ("kE4m3", backend.E4M3_VARIANTS)):
        cases = re.findall(rf"case (\d+): return launch_one<PHASE, {precision}", source)
        assert tuple(int(c) for c in cases) == variants


def test_variant_is_chosen_from_shapes() -> None:
    chosen = [backend.choose_variant(tokens, 6, 48) for tokens in (1, 8, 64, 128, 512, 2048, 16384)]
    assert chosen == sorted(chosen) and chosen[0] == 8 and chosen[-1] == 128
    assert all(v in backend.VARIANTS for v in chosen)
    chosen = [backend.choose_variant(tokens, 6, 48, e4m3=True) for tokens in (1, 512, 2048, 16384)]
    assert chosen == sorted(chosen) and chosen[-1] == backend.E4M3_VARIANTS[-1]
    assert all(v in backend.E4M3_VARIANTS for v in chosen)


def test_policies() -> None:
    def in_e4m3(policy: str | None, tokens: int) -> tuple[bool, bool]:
        return backend.Sm90Backend(GEOMETRY, policy).in_e4m3(tokens, GEOMETRY.num_experts)

    for tokens in (1, 64, 10**6):
        assert in_e4m3("exact", tokens) == in_e4m3("w4a16", tokens) == (False, False)
        assert in_e4m3("w4a8", tokens) == (True, True)
    assert in_e4m3("fast", 1) == in_e4m3("auto", 1) == in_e4m3(None, 1) == (False, False)
    assert in_e4m3("fast", 8192) == (True, True)
    assert in_e4m3("auto", 8192) == in_e4m3(None, 8192) == (False, True)


@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate", "word"),
    [(8, 512, 192, "multiples"), (8, 500, 256, "multiples"), (0, 512, 256, "local experts"), (600, 512, 256, "512")],
)
def test_unsupported_shapes_are_named(experts: int, hidden: int, intermediate: int, word: str) -> None:
    assert word in backend.shape_problem(experts, hidden, intermediate)
    assert backend.shape_problem(8, 512, 256) is None


def test_cpu_is_refused() -> None:
    assert "Hopper" in backend.Sm90Backend.unsupported_reason(GEOMETRY, torch.device("cpu"))


def test_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match="NVCC"):
        build.compile_library(tmp_path / "x.so")
