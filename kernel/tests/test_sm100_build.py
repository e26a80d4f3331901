"""The ahead-of-time build: what it writes, that it agrees with the kernels' own host code, and what it refuses."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from nvfp4_megamoe.backends.sm100 import build, catalogue, objects, sass
from nvfp4_megamoe.backends.sm100.build import BuildError, Machine
from nvfp4_megamoe.backends.sm100.objects import KernelObject
from ptx_model import own_kernels
from ptx_model.testing import needs_compiler


def missing_tools() -> str | None:
    try:
        build.find_tool("cuobjdump")
        build.find_tool("nvdisasm")
    except BuildError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if missing_tools():
        pytest.skip(missing_tools())
    target = tmp_path_factory.mktemp("objects")
    return target, build.build(target)


@needs_compiler
def test_every_kernel_is_built_without_spills(built):
    target, report = built
    assert set(objects.read(target)) == set(catalogue.NAMES)
    for item, machine, _, size in report:
        assert size > 0
        assert build.problems(item.name, item, machine) == []
        if item.name.startswith("gemm"):
            assert machine.multiplications >= 4
            # At six clocks an instruction a warp keeps up with HBM: 631 clocks a stage, see docs/sm100-kernel.md.
            assert 0 < machine.stage["multiply"] < 100
            assert 0 < machine.stage["load"] < 100
            assert catalogue.stages(item.name) >= 4


@needs_compiler
@pytest.mark.parametrize("name", catalogue.NAMES)
def test_manifest_agrees_with_the_host_code(built, name):
    """Block, shared memory, cluster and parameters that the driver launch will use are those of the compiler's own."""
    item = objects.read(built[0])[name]
    args = {"q": ctypes.c_int64(0), "i": ctypes.c_int32(2), "f": ctypes.c_float(1.0)}
    launch = own_kernels.host_object(name).capture([args[kind] for kind in catalogue.arguments(name)])
    assert launch.block == (item.threads, 1, 1)
    assert launch.dynamic_shared == item.shared_bytes
    assert launch.cluster == (item.cluster, 1, 1)
    assert launch.grid == (2, 1, 1)
    assert launch.programmatic
    assert launch.program.name == item.symbol
    assert [size for _, size in launch.program.params.values()] == [8 if kind == "q" else 4 for kind in item.arguments]
    assert item.arguments == catalogue.arguments(name)[:-1]


def test_loops_of_a_listing():
    lines = ["MOV R1, R2", ".L_x_1:", "ELECT P1, URZ, PT", "UTCOMMA.4X gdesc[UR4]", "@P0 BRA.U.ANY `(.L_x_1)"]
    lines += [".L_x_2:", "SYNCS.PHASECHK P0", "SYNCS.ARRIVE URZ", "UBLKCP.S.G [UR4], [UR6], UR8", *["NOP"] * 10]
    lines += ["@P0 BRA `(.L_x_2)", "@!P1 BRA `(.L_x_3)", ".L_x_3:"]
    listing = "\n".join(
        line if line.endswith(":") else f"        /*{i:04x}*/   {line} ;" for i, line in enumerate(lines)
    )
    elected, copies = sass.loops(listing)
    assert (elected.count("UTCOMMA"), elected.count("SYNCS")) == (1, 0)
    assert len(copies.instructions) == 14
    assert sass.elections(listing) == 1
    assert sass.instructions_a_stage(listing) == {"load": 14}


GOOD = Machine(registers=64, stack=0, local=0, spills=0, multiplications=4)
ITEM = KernelObject("gemm1_n128", "entry", 320, 200000, 1, 64, "q")


@pytest.mark.parametrize(
    ("machine", "item", "message"),
    [
        ({"spills": 2}, {}, "spills"),
        ({"stack": 8}, {}, "spills"),
        ({"local": 16}, {}, "spills"),
        ({"registers": 255}, {}, "registers"),
        ({"multiplications": 0}, {}, "no UTCOMMA"),
        ({"elections": 3}, {}, "3 loops elect"),
        ({}, {"shared_bytes": 232449}, "shared memory"),
    ],
)
def test_broken_rules_are_named(machine, item, message):
    changed = KernelObject(**{**vars(ITEM), **item})
    found = build.problems("gemm1_n128", changed, Machine(**{**vars(GOOD), **machine}))
    assert len(found) == 1
    assert message in found[0]
    assert build.problems("gemm1_n128", ITEM, GOOD) == []


def test_a_broken_rule_leaves_nothing_to_load(tmp_path, monkeypatch):
    class Compiled:
        __cubin__, __ptx__ = b"x", ".entry k() .reqntid 128 {"

    objects.write(tmp_path, [], {})
    monkeypatch.setattr(catalogue, "compile_kernel", lambda name: Compiled)
    monkeypatch.setattr(catalogue, "describe", lambda name, ptx, registers: ITEM)
    monkeypatch.setattr(catalogue, "source", lambda name: ITEM)
    monkeypatch.setattr(build, "inspect", lambda cubin: Machine(255, 0, 0, 0, 4))
    with pytest.raises(BuildError, match="registers"):
        build.build(tmp_path, ("gemm1_n128",))
    assert not (tmp_path / objects.MANIFEST).exists()


def test_geometry_that_has_no_kernel_fails_the_build(tmp_path, monkeypatch):
    monkeypatch.setitem(build.GEOMETRIES, "DeepSeek-V5", (8, 7168, 3000))
    with pytest.raises(BuildError, match="DeepSeek-V5: hidden 7168 and intermediate 3000 must be multiples of 256"):
        build.build(tmp_path, ())


def test_missing_tool_says_what_to_install(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="install the CUDA toolkit or the triton package"):
        build.find_tool("cuobjdump")


@needs_compiler
def test_run_time_modules_do_not_import_the_kernel_language():
    code = (
        "import sys, nvfp4_megamoe.backends.sm100.backend; "
        "sys.exit(any(name.split('.')[0] == 'cutlass' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
