"""The cache directories of everything that compiles at run time, and what a start added to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import cache_environment as caches  # noqa: E402

TOOL = str(SCRIPTS / "cache_environment.py")


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **variables}
    )


def write(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_every_cache_has_a_directory_of_its_own_below_the_root(tmp_path):
    variables = caches.environment(tmp_path)
    root = variables.pop(caches.ROOT_VARIABLE)
    assert root == str(tmp_path)
    assert all(Path(value).parent == tmp_path for value in variables.values())
    assert len(set(variables.values())) == len(variables) == len(caches.COMPILERS)


def test_a_relative_root_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert caches.environment(Path("kept"))["TRITON_CACHE_DIR"] == str(tmp_path / "kept" / "triton")


@pytest.mark.parametrize(
    ("variable", "program"),
    [
        ("VLLM_CACHE_ROOT", "from vllm import envs; print(envs.VLLM_CACHE_ROOT)"),
        ("TORCHINDUCTOR_CACHE_DIR", "from torch._inductor.runtime.cache_dir_utils import cache_dir as d; print(d())"),
        ("NVFP4_MEGAMOE_CACHE", "from nvfp4_megamoe.backends.cpu import build; print(build.cache_directory())"),
        ("TORCH_EXTENSIONS_DIR", "import os; from torch.utils import cpp_extension as c\n"
         "print(os.path.dirname(c._get_build_directory('probe', False)))"),
    ],
)  # fmt: skip
def test_the_packages_read_these_variables(tmp_path, variable, program):
    variables = caches.environment(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **variables}, check=True
    )
    assert result.stdout.splitlines()[-1] == variables[variable]


def test_exports_are_read_by_a_shell_whatever_the_directory_is_called(tmp_path):
    root = tmp_path / "it's a $(cache)"
    printed = run("exports", "--root", root).stdout
    shell = subprocess.run(["sh", "-c", f"{printed}\nprintenv DG_JIT_CACHE_DIR"], capture_output=True, text=True)
    assert shell.stdout.rstrip("\n") == str(root / "deep_gemm")


def test_the_root_is_the_variable_or_the_users_cache(tmp_path):
    assert f"={tmp_path}/triton" in run("exports", MEGA_MOE_CACHE_DIR=str(tmp_path)).stdout
    assert f"={tmp_path}/.cache/mega-moe/triton" in run("exports", MEGA_MOE_CACHE_DIR="", HOME=str(tmp_path)).stdout


def test_files_are_counted_by_compiler(tmp_path):
    write(tmp_path / "triton" / "ab" / "kernel.cubin", "12345")
    write(tmp_path / "triton" / "ab" / "kernel.json", "1")
    write(tmp_path / "tilelang" / "0.1" / "cd" / "kernel.so")
    write(tmp_path / "startup.json")  # the root may hold other files, which no compiler wrote
    totals = caches.by_compiler(caches.snapshot(tmp_path))
    assert {name: (t["files"], t["bytes"]) for name, t in totals.items()} == {"TileLang": (1, 1), "Triton": (2, 6)}
    assert totals["Triton"]["newest"] == pytest.approx((tmp_path / "triton/ab/kernel.json").stat().st_mtime)


def test_a_directory_that_does_not_exist_holds_nothing(tmp_path):
    assert caches.snapshot(tmp_path / "absent") == {}
    assert "holds no files" in run("count", "--root", tmp_path / "absent").stdout


@pytest.mark.parametrize(
    "name",
    [
        "humming/a.lock",
        "flashinfer/.cache/flashinfer/flashinfer_jit.log",
        "tilelang/tmp/12_ab",
        "humming/.ninja_log",
        "deep_gemm/cache/sm90_fp8_gemm_1d2d.0dbd24a6/.committed",
    ],
)
def test_locks_logs_and_files_under_way_are_no_compilation(tmp_path, name):
    before = tmp_path / "before.json"
    root = tmp_path / "root"
    assert run("snapshot", before, "--root", root).returncode == 0
    write(root / name)
    result = run("changes", before, "--root", root)
    assert result.returncode == 0, result.stdout
    assert "nothing was compiled" in result.stdout


def test_a_new_and_a_rewritten_file_are_changes(tmp_path):
    root, before = tmp_path / "root", tmp_path / "before.json"
    write(root / "deep_gemm" / "kernel.cubin")
    write(root / "deep_gemm" / "kept.cubin")
    run("snapshot", before, "--root", root)
    write(root / "deep_gemm" / "kernel.cubin", "longer")
    write(root / "humming" / "ab" / "kernel.cubin")
    result = run("changes", before, "--root", root, "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)["compilers"]
    assert {name: total["files"] for name, total in found.items()} == {"DeepGEMM": 1, "Humming": 1}


def test_a_file_that_is_no_snapshot_is_named(tmp_path):
    write(tmp_path / "broken", "[1, 2]")
    result = run("changes", tmp_path / "broken", "--root", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path}/broken is not a snapshot" in result.stderr
    assert run("changes", tmp_path / "absent", "--root", tmp_path).returncode == 2
