"""CuTe DSL kernels are compiled once: kept, served to other processes, and compiled again when anything differs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY / "model_executor" / "nvfp4")]

import cache_environment as caches  # noqa: E402
import cute_cache  # noqa: E402

needs_compiler = pytest.mark.skipif(
    find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed: pip install -r requirements/sm100.txt"
)

KERNELS = """\
import cutlass
import cutlass.cute as cute


@cute.kernel
def scale(source: cute.Tensor, target: cute.Tensor, factor: cutlass.Constexpr):
    i = cute.arch.thread_idx()[0]
    target[i] = source[i] * factor


@cute.jit
def launch(source: cute.Tensor, target: cute.Tensor, factor: cutlass.Constexpr, stream):
    scale(source, target, factor).launch(grid=(1, 1, 1), block=(cute.size(source), 1, 1), stream=stream)


@cute.jit
def host(source: cute.Tensor, target: cute.Tensor, factor: cutlass.Constexpr):
    for i in range(cute.size(source)):
        target[i] = source[i] * factor
"""


class Starts:
    """Starts that share one cache root, below which each compiler has its directory."""

    def __init__(self, folder: Path) -> None:
        self.root, self.kernels = folder / "cache", folder / "kernels.py"
        self.kernels.write_text(KERNELS)
        self.variables = caches.environment(self.root)
        self.kept = Path(self.variables[cute_cache.VARIABLE], cute_cache.FOLDER)

    def case(self, function: str = "launch", **changes) -> dict:
        return {"file": str(self.kernels), "function": function, "size": 32, "factor": 3.0} | changes

    def open(self, *cases: dict, forbid: bool = False, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, REPOSITORY / "tests" / "cute_start.py", json.dumps({"cases": cases, "forbid": forbid})],
            env={**os.environ, **self.variables, "CUTE_DSL_ARCH": "sm_90a", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, *cases: dict, **how) -> tuple[list[dict], str]:
        """What each case gave, and the log."""
        process = self.open(*cases, **how)
        output, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
        return [json.loads(line) for line in output.splitlines()], log

    def counted(self, before: caches.Snapshot) -> dict[str, int]:
        """Files that compilers have added or rewritten since."""
        found = caches.compiled_between(before, caches.snapshot(self.root))
        return {name: total["files"] for name, total in found.items()}


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


@needs_compiler
def test_the_second_start_compiles_nothing_and_has_the_same_code(starts):
    cases = starts.case(), starts.case("host"), starts.case("host", plain=True)
    alone, log = starts.start(*cases, CUTE_DSL_CACHE_DIR="")
    assert "compiled anew by every start: CUTE_DSL_CACHE_DIR is not set" in log
    first, log = starts.start(*cases)
    assert first == alone
    assert first[1]["result"] == first[2]["result"] == [3.0 * i for i in range(32)]
    assert first[1]["object"] != first[2]["object"]
    # What is kept has no entry yet: TVM FFI's and the plain one are added to the same file's content.
    assert log.count("CuTe DSL compiled") == 2
    assert starts.counted({}) == {"CuTe DSL": 2}

    before = caches.snapshot(starts.root)
    second, log = starts.start(*cases, forbid=True)
    assert second == first
    assert "CuTe DSL compiled" not in log
    assert starts.counted(before) == {}
    forbidden, _ = starts.start(*cases, forbid=True, CUTE_DSL_CACHE_DIR="")
    assert [each["error"] for each in forbidden] == ["the compiler was called"] * 3


@needs_compiler
def test_whatever_changes_the_kernel_is_compiled(starts):
    starts.start(starts.case())
    others = {
        "shape": starts.case(size=64),
        "constant": starts.case(factor=4.0),
        "type": starts.case(dtype="Int32", factor=3),
        "option": starts.case(options="--opt-level 2"),
        "assembler's option": starts.case(options="--ptxas-options -maxrregcount=64"),
        "architecture": starts.case(options="--gpu-arch sm_100a"),
    }
    results, _ = starts.start(starts.case(), *others.values(), forbid=True)
    assert "error" not in results[0]
    missed = {name for name, result in zip(others, results[1:], strict=True) if "error" in result}
    assert missed == set(others)
    starts.kernels.write_text(KERNELS.replace("source[i] * factor", "source[i] + factor"))
    [edited], _ = starts.start(starts.case(), forbid=True)
    assert "error" in edited


@needs_compiler
def test_a_damaged_file_is_named_and_compiled_again(starts):
    cases = [starts.case("host", size=size) for size in (8, 16, 24, 32, 40)]
    first, _ = starts.start(*cases)
    files = sorted(starts.kept.iterdir())
    good = [path.read_bytes() for path in files]
    assert len(files) == 5
    files[0].write_bytes(good[0][:-100])
    files[1].write_bytes(good[1][:200] + bytes([good[1][200] ^ 1]) + good[1][201:])
    files[2].write_bytes(good[3])
    files[4].write_bytes(b"")

    second, log = starts.start(*cases)
    assert second == first
    warnings = [line for line in log.splitlines() if line.startswith("WARNING")]
    reasons = ["its checksum is wrong"] * 2 + ["it is no kernel kept here under this name"] * 2
    for path, reason in zip((files[0], files[1], files[2], files[4]), reasons, strict=True):
        assert any(str(path) in line and reason in line for line in warnings), (path.name, log)
    assert len(warnings) == 4
    assert [path.read_bytes() for path in files] == good
    assert starts.start(*cases, forbid=True)[0] == first


@needs_compiler
def test_processes_that_start_at_once_do_not_disturb_each_other(starts):
    cases = [starts.case("host", size=size) for size in (8, 16, 24)]
    processes = [starts.open(*cases) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert outputs[0] == outputs[1] == outputs[2]
    assert sorted(path.suffix for path in starts.kept.iterdir()) == [".mlirbc"] * 3
    assert starts.start(*cases, forbid=True)[0] == [json.loads(line) for line in outputs[0].splitlines()]


@needs_compiler
def test_a_result_that_cannot_be_kept_is_counted_at_every_start(starts, tmp_path):
    case = starts.case(options=f"--keep-cubin --dump-dir {tmp_path / 'dump'}")
    (tmp_path / "dump").mkdir()
    for _ in range(2):
        before = caches.snapshot(starts.root)
        [result], log = starts.start(case)
        assert "error" not in result
        assert "it is not kept: option dump-cubin-path has an effect beside the result" in log
        assert starts.counted(before) == {"CuTe DSL": 1}
        [dumped] = (tmp_path / "dump").iterdir()
        dumped.unlink()
    assert [path.name[:16] for path in starts.kept.iterdir()] == ["not-kept-launch_"]
    _, log = starts.start(starts.case(), CUTE_DSL_DISABLE_FILE_CACHING="1")
    assert "it is not kept: the environment forbids the DSL's caches" in log


@needs_compiler
def test_a_directory_that_cannot_be_written_does_not_stop_a_start(starts):
    starts.kept.parent.mkdir(parents=True)
    starts.kept.write_text("a file where the directory belongs")
    [result], log = starts.start(starts.case("host"))
    assert result["result"] == [3.0 * i for i in range(32)]
    assert "is not kept, and the next start compiles it again" in log


class OtherCompiler:
    def compile(self, source):
        return source


@pytest.mark.parametrize(
    ("content", "difference"),
    [
        ({"Compiler": OtherCompiler}, "takes ['self', 'source'], expected ['self', 'module', 'pipeline']"),
        ({}, "has no cutlass.base_dsl.compiler.Compiler"),
    ],
)
def test_another_compilers_interface_is_left_alone(tmp_path, monkeypatch, caplog, content, difference):
    for name in ("cutlass", "cutlass.base_dsl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.compiler", SimpleNamespace(**content))
    monkeypatch.setattr(cute_cache, "find_spec", lambda name: object())
    monkeypatch.setenv(cute_cache.VARIABLE, str(tmp_path))
    stock = OtherCompiler.compile
    with caplog.at_level(logging.WARNING):
        assert not cute_cache.install()
    assert OtherCompiler.compile is stock
    assert difference in caplog.text


def test_without_the_compiler_nothing_happens(monkeypatch):
    monkeypatch.setattr(cute_cache, "find_spec", lambda name: None)
    assert not cute_cache.install()
