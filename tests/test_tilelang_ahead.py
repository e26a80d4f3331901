"""TileLang kernels compiled ahead: by several processes, once a host, and never at the price of the start."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from vllm.model_executor.nvfp4 import tilelang_ahead
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry, VllmJitKernel

KERNELS = """\
import os
import time
from dataclasses import dataclass
from pathlib import Path

from vllm.model_executor.warmup.jit_warmup_tilelang_helper import VllmTileLangJitKernel


class Written(VllmTileLangJitKernel["Written.CompileKey"]):
    @dataclass(frozen=True)
    class CompileKey:
        size: int

    def get_warmup_keys(self, vllm_config=None, *, sizes=()):
        return [self.CompileKey(size) for size in sizes or vllm_config.sizes]

    def warmup_inputs(self, compile_key):
        return {}

    def compile(self, compile_key):
        if compile_key.size < 0:
            raise RuntimeError(f"no kernel of size {compile_key.size}")
        if compile_key.size == 0:
            time.sleep(600)
        with Path(os.environ["TILELANG_CACHE_DIR"], "compiled.txt").open("a") as file:
            print(type(self).__name__, compile_key.size, os.getpid(), file=file)


class Other(Written):
    pass
"""


class Host:
    """One host's TileLang directory, and kernels that leave a line there for each compilation."""

    def __init__(self, folder: Path, kernels: ModuleType) -> None:
        self.folder, self.kernels = folder / "cache", kernels

    def lines(self) -> list[list[str]]:
        """Kernel, size and process of each compilation."""
        file = self.folder / "compiled.txt"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def compiled(self) -> list[tuple[str, int]]:
        return sorted((name, int(size)) for name, size, _ in self.lines())

    def work(self, *sizes: int) -> tilelang_ahead.Work:
        return [(self.kernels.Written, self.kernels.Written.CompileKey(size)) for size in sizes]

    def rank(self, *sizes: int, jobs: int = 2, **settings: float) -> tilelang_ahead.Ahead:
        return tilelang_ahead.Ahead(self.work(*sizes), self.folder, jobs, **settings)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    (tmp_path / "made_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delitem(sys.modules, "made_kernels", raising=False)
    found = Host(tmp_path, importlib.import_module("made_kernels"))
    monkeypatch.setenv(tilelang_ahead.VARIABLE, str(found.folder))
    monkeypatch.setenv(tilelang_ahead.JOBS, "2")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return found


def registry(enabled: bool = True, **config: object) -> JitWarmupRegistry:
    return JitWarmupRegistry(SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=enabled), **config))


def test_what_a_model_registers_is_compiled_once_by_several_processes(host: Host) -> None:
    class InPlace(VllmJitKernel):
        def get_warmup_keys(self, sizes):
            raise AssertionError("only TileLang's kernels are compiled ahead")

        def compile(self, compile_key):
            raise AssertionError

    made = registry(sizes=[5])
    with made.activate():
        host.kernels.Written().register_warmup(sizes=(1, 2, 3))
        host.kernels.Written().register_warmup(sizes=(3, 4))
        host.kernels.Other().register_warmup()
        InPlace().register_warmup((1,))
        tilelang_ahead.begin()
        tilelang_ahead.finish()
        expected = [("Other", 5), *(("Written", size) for size in (1, 2, 3, 4))]
        assert host.compiled() == expected, "each once, also where it is registered twice"
        processes = {process for _, _, process in host.lines()}
        assert len(processes) == 2 and str(os.getpid()) not in processes
        tilelang_ahead.begin()
        assert not tilelang_ahead._running, "another start finds them"
        made._registrations.clear()
        host.kernels.Written().register_warmup(sizes=(6,))
        tilelang_ahead.begin()
        tilelang_ahead.finish()
    assert host.compiled() == [*expected, ("Written", 6)]
    assert any("5 of 5 TileLang kernels" in file.read_text() for file in host.folder.glob("ahead-*.txt"))


def test_nothing_is_compiled_where_vllm_would_compile_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    tilelang_ahead.begin()  # a loader outside a runner
    for made in (registry(), registry(enabled=False)):
        with made.activate():
            if not made.vllm_config.kernel_config.enable_jit_warmup:
                host.kernels.Written().register_warmup(sizes=(1,))
            tilelang_ahead.begin()
    monkeypatch.setenv(tilelang_ahead.JOBS, "0")
    with registry().activate():
        host.kernels.Written().register_warmup(sizes=(1,))
        tilelang_ahead.begin()
    assert not tilelang_ahead._running and not host.folder.exists()


def test_settings_are_checked(host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with registry().activate():
        host.kernels.Written().register_warmup(sizes=(1,))
        monkeypatch.setenv(tilelang_ahead.JOBS, "many")
        with pytest.raises(ValueError, match="MEGA_MOE_COMPILE_JOBS='many': expected a number of processes"):
            tilelang_ahead.begin()
        monkeypatch.delenv(tilelang_ahead.JOBS)
        monkeypatch.delenv(tilelang_ahead.VARIABLE)
        with caplog.at_level(logging.INFO):
            tilelang_ahead.begin()
    assert "1 TileLang kernels are compiled one after the other: TILELANG_CACHE_DIR is not set" in caplog.text
    assert not tilelang_ahead._running
    assert 1 <= tilelang_ahead._jobs(1000) <= 16 and tilelang_ahead._jobs(1) == 1


def test_ranks_of_a_host_share_the_work(host: Host) -> None:
    ranks = [host.rank(1, 2, 3, 4) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert host.compiled() == [("Written", size) for size in (1, 2, 3, 4)]


def test_a_kernel_that_fails_is_named_and_left_to_vllm(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    rank = host.rank(1, -2, 3)
    with caplog.at_level(logging.INFO):
        rank.run()
    assert host.compiled() == [("Written", 1), ("Written", 3)]
    assert "status 1: RuntimeError: no kernel of size -2" in caplog.text
    assert "2 of 3 TileLang kernels compiled" in rank.marker.read_text()


def test_a_process_that_hangs_is_ended(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    rank = host.rank(0, jobs=1, limit_s=1.0)
    with caplog.at_level(logging.INFO):
        rank.run()
    assert "killed after 1 s" in caplog.text and "0 of 1 TileLang kernels" in rank.marker.read_text()


def test_a_directory_that_cannot_be_written_is_logged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.folder.write_text("a file")
    with caplog.at_level(logging.INFO):
        host.rank(1).run()
    assert "TileLang kernels are not compiled ahead" in caplog.text and "FileExistsError" in caplog.text


def test_a_worker_ends_with_its_rank(host: Host) -> None:
    host.folder.mkdir()
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "vllm.model_executor.nvfp4.tilelang_worker", str(writing)]
    for parent, status, compiled in ((os.getpid(), 0, [("Written", 1)]), (1, 1, [("Written", 1)])):
        done = subprocess.run([*command, str(parent)], input=pickle.dumps(host.work(1)), pass_fds=(writing,))
        assert (done.returncode, host.compiled()) == (status, compiled)
    os.close(writing)
    assert os.read(reading, 10) == b"."
    os.close(reading)
