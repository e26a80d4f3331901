"""What the host check tells before anything is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import check_host  # noqa: E402

AVX2 = {"avx2", "fma", "f16c"}


def test_native_operators_need_avx512_bf16() -> None:
    assert check_host.check_cpu("x86_64", AVX2 | {"avx512f", "avx512_bf16"}).level == "ok"
    note = check_host.check_cpu("x86_64", AVX2 | {"avx512f"})
    assert note.level == "note"
    assert "AVX512_BF16" in note.message
    assert "portable" in note.message


@pytest.mark.parametrize(("machine", "flags", "names"), [("aarch64", AVX2, "aarch64"), ("x86_64", {"fma"}, "AVX2")])
def test_unusable_processors_fail_and_say_why(machine: str, flags: set[str], names: str) -> None:
    check = check_host.check_cpu(machine, flags)
    assert check.level == "fail"
    assert names in check.message


def test_flags_are_read_from_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert check_host.cpu_flags(str(cpuinfo)) == {"fpu", "avx2", "avx512_bf16"}


def test_another_python_is_refused_with_the_command_to_use() -> None:
    check = check_host.check_python((3, 12))
    assert check.level == "fail"
    assert "make PYTHON=" in check.message


def test_too_little_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_host, "DISK_GB", 10**9)
    assert check_host.check_disk(tmp_path).level == "fail"


def test_a_failed_check_ends_the_command_with_status_one(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import check_host as c; c.DISK_GB = 10**9; "
    ended = subprocess.run(
        [sys.executable, "-c", script + "sys.exit(c.main())", "--path", str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "free some" in ended.stdout
