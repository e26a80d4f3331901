"""What the CPU backend does to its process and machine: the build, OpenMP threads, resident memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import cpu_variants
import pytest
import torch
from moe_cases import random_batch, random_weights
from nvfp4_megamoe.backends.cpu import build, library
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry

KERNEL = Path(__file__).parents[1]


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter; the cache of the kernel is that of this process."""
    environment = {"PYTHONPATH": f"{KERNEL}:{KERNEL / 'tests'}", **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def no_kernel(monkeypatch, tmp_path):
    """An empty cache and no compiler."""
    monkeypatch.setenv("NVFP4_MEGAMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.compiled.cache_clear()
    yield
    library.compiled.cache_clear()


def test_build_is_done_once(tmp_path):
    environment = {"NVFP4_MEGAMOE_CACHE": str(tmp_path)}
    start = [sys.executable, "-m", "nvfp4_megamoe.backends.cpu.build"]
    whole = {**os.environ, **environment, "PYTHONPATH": str(KERNEL)}
    racing = [subprocess.Popen(start, env=whole, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    (made,) = tmp_path.iterdir()  # nothing of either build is left over
    assert all(str(made) in output for output in outputs)
    assert sum("Compiling" in output for output in outputs) == 1
    library.load(made)
    before = made.stat().st_mtime_ns
    assert "up to date" in subprocess.run(start, env=whole, capture_output=True, text=True).stdout
    assert made.stat().st_mtime_ns == before


def test_another_cpu_torch_or_source_is_another_library(monkeypatch, tmp_path):
    paths = {build.library_path(), build.library_path(("-O1",))}
    monkeypatch.setattr(build, "cpu_flags", lambda: ("avx2",))
    paths.add(build.library_path())
    monkeypatch.setattr(torch, "__version__", "0")
    paths.add(build.library_path())
    (tmp_path / "kernel.cpp").write_text("")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    paths.add(build.library_path())
    assert len(paths) == 5


def test_without_a_compiler_torch_computes_and_says_so(no_kernel, monkeypatch, caplog):
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    assert library.compiled() is None
    assert "no-such-compiler" in caplog.text
    assert "apt-get install g++" in caplog.text


def test_forced_kernel_that_is_missing_is_an_error(no_kernel, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, "compiled")
    with pytest.raises(UnsupportedError, match="no-such-compiler"):
        library.compiled()


def test_failed_compilation_shows_the_compilers_words(monkeypatch, tmp_path):
    monkeypatch.setenv("NVFP4_MEGAMOE_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no-such-flag"):
        build.build((*build.FLAGS, "-no-such-flag"))
    assert not list(tmp_path.iterdir())


def test_old_cpu_is_told(no_kernel, monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: ("sse2", "fma"))
    with pytest.raises(UnsupportedError, match=r"lacks \['avx2', 'f16c'\]"):
        build.build()


def test_the_environment_chooses(monkeypatch, caplog):
    for mode in ("torch", "fast"):
        monkeypatch.setenv(library.ENVIRONMENT, mode)
        library.compiled.cache_clear()
        if mode == "torch":
            assert library.compiled() is None
            assert "plain torch" in caplog.text
        else:
            with pytest.raises(UnsupportedError, match="expected auto, compiled or torch"):
                library.compiled()
    library.compiled.cache_clear()


def test_torchs_own_openmp_threads_are_used():
    kernel = cpu_variants.kernel("native")
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            torch.set_num_threads(threads)
            assert kernel.nvfp4_threads() == threads
    finally:
        torch.set_num_threads(before)
    runtimes = set(re.findall(r"\S*lib[gi]?omp\S*\.so\S*", Path("/proc/self/maps").read_text()))
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_cores_work_where_threads_are_bound():
    """As vLLM's CPU worker: each OpenMP thread bound to a core, the main thread with them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    output = python(
        """
        import os, torch, cpu_variants
        from moe_cases import random_batch
        from nvfp4_megamoe.moe.geometry import MoEGeometry
        from nvfp4_megamoe.moe.weights import ExpertWeights

        def milliseconds():
            tasks = {task: open(f"/proc/self/task/{task}/stat").read() for task in os.listdir("/proc/self/task")}
            ticks = {task: int(stat.rsplit(")", 1)[1].split()[11]) for task, stat in tasks.items()}
            return {task: count * 1000 // os.sysconf("SC_CLK_TCK") for task, count in ticks.items()}

        g, rng = MoEGeometry(8, 8, 4, 1024, 512, 10.0), torch.Generator().manual_seed(0)
        backend, weights = cpu_variants.backend("native", g), ExpertWeights.empty(8, 1024, 512)
        for tensor in vars(weights).values():
            tensor.view(torch.uint8).fill_(0x38)
        backend.prepare(weights)
        batch = random_batch(g, 256, rng)
        out, workspace = torch.empty_like(batch.x), torch.empty(backend.workspace_bytes(256), dtype=torch.uint8)
        before = milliseconds()
        while sum(milliseconds().values()) - sum(before.values()) < 800:
            backend.forward(*batch, None, out, workspace)
        for thread, spent in milliseconds().items():
            print("thread", sorted(os.sched_getaffinity(int(thread))), spent - before.get(thread, 0))
        """,
        GOMP_CPU_AFFINITY=",".join(map(str, cores)),
        OMP_NUM_THREADS="2",
    )
    spent = {int(core): int(ms) for core, ms in re.findall(r"thread \[(\d+)\] (\d+)", output)}
    assert set(spent) == set(cores)
    assert min(spent.values()) > 200, spent


# Weights of 28 MB; a dequantized copy in bfloat16 would take 100 MB, in float8 50 MB.
MEMORY = """
    import torch, cpu_variants
    from moe_cases import random_batch
    from nvfp4_megamoe.moe.geometry import MoEGeometry
    from nvfp4_megamoe.moe.weights import ExpertWeights

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    def backend_for(experts):
        g = MoEGeometry(experts, experts, 2, 1024, 1024, 10.0)
        weights = ExpertWeights.empty(experts, 1024, 1024)
        for tensor in vars(weights).values():
            tensor.view(torch.uint8).fill_(0x38)
        return g, weights, cpu_variants.backend("native", g)

    def run(g, weights, backend):
        backend.prepare(weights)
        batch = random_batch(g, 64, torch.Generator().manual_seed(0))
        workspace = torch.zeros(backend.workspace_bytes(64), dtype=torch.uint8)
        for count in (1, 64):  # both ways of multiplying
            backend.forward(*(part[:count] for part in batch), None, torch.empty_like(batch.x[:count]), workspace)
        PLANTED
        return workspace.numel()

    run(*backend_for(2))  # libraries, threads and their scratch
    layer = backend_for(16)
    packed = sum(tensor.nbytes for tensor in vars(layer[1]).values())
    before = resident()
    workspace = run(*layer)
    print("grown", (resident() - before - workspace) / packed)
"""


@pytest.mark.parametrize("planted", [False, True])
def test_no_decoded_copy_stays_resident(planted):
    copy = "backend.copy = torch.ones(weights.w13.numel(), dtype=torch.bfloat16)" if planted else "pass"
    grown = float(re.search(r"grown (\S+)", python(MEMORY.replace("PLANTED", copy), OMP_NUM_THREADS="2"))[1])
    assert (grown > 0.1) == planted, grown


def test_prepare_keeps_the_tensors_it_is_given(rng):
    g = MoEGeometry(4, 4, 2, 64, 48, 10.0)
    weights = random_weights(g, rng)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vars(weights).items()}
    backend = CpuBackend(g)
    backend.prepare(weights)
    batch = random_batch(g, 9, rng)
    workspace = torch.empty(backend.workspace_bytes(9), dtype=torch.uint8)
    backend.forward(*batch, None, torch.empty_like(batch.x), workspace)
    for name, (address, value) in before.items():
        now = getattr(backend._weights, name)
        assert now.data_ptr() == address
        assert torch.equal(now.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("tokens", [1, 40])
def test_only_touched_experts_are_read(tokens, tmp_path, rng):
    """Weights in a file that is mapped: pages become resident when they are read."""
    g = MoEGeometry(8, 8, 1, 1024, 1024, 10.0)
    weights = random_weights(MoEGeometry(8, 8, 1, 16, 16, 10.0), rng)
    sizes = {"w13": (8, 2048, 512), "w2": (8, 1024, 512)}
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 * 3072 * 512))
    mapped = torch.from_file(str(file), shared=True, size=8 * 3072 * 512, dtype=torch.uint8)
    split = 8 * 2048 * 512
    parts = {"w13": mapped[:split].view(sizes["w13"]), "w2": mapped[split:].view(sizes["w2"])}
    scales = {f"{n}_scale": torch.ones(*s[:2], 64).to(torch.float8_e4m3fn) for n, s in sizes.items()}
    backend = CpuBackend(g)
    backend.prepare(type(weights)(**{**vars(weights), **parts, **scales}))
    batch = random_batch(g, tokens, rng)
    batch.topk_ids.fill_(3)
    workspace = torch.empty(backend.workspace_bytes(tokens), dtype=torch.uint8)
    backend.forward(*batch, None, torch.empty_like(batch.x), workspace)
    entry = Path("/proc/self/smaps").read_text().split(str(file))[1]
    resident = int(re.search(r"Rss:\s+(\d+) kB", entry)[1]) << 10
    expert = mapped.numel() // 8
    assert expert <= resident < 3 * expert  # of 8; the system maps pages around each that is read
