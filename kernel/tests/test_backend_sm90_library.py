"""A library that does not belong to these sources is refused before it reads a pointer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvfp4_megamoe.backends.sm90 import build, library
from nvfp4_megamoe.errors import UnsupportedError


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for; nothing is there yet."""
    path = tmp_path / "kernels.so"
    monkeypatch.setenv("NVFP4_SM90_LIBRARY", str(path))
    library.load.cache_clear()
    yield path
    library.load.cache_clear()


def compile_c(path: Path, source: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source.encode(), check=True)


def test_a_missing_one(made: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not exist: run python -m"):
        library.load()


def test_one_that_is_no_library(made: Path) -> None:
    made.write_bytes(b"not a library")
    with pytest.raises(UnsupportedError, match="is not a library of these kernels"):
        library.load()


def test_one_from_before_libraries_told_their_sources(made: Path) -> None:
    compile_c(made, "int nvfp4_sm90_forward(void) { return 0; }")
    with pytest.raises(UnsupportedError, match="nvfp4_sm90_sources"):
        library.load()


def test_one_of_other_sources(made: Path) -> None:
    compile_c(made, 'const char* nvfp4_sm90_sources(void) { return "0123"; }')
    with pytest.raises(UnsupportedError, match=f"sources 0123, expected {build.sources_digest()}"):
        library.load()


def test_the_digest_follows_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", copy)
    before = build.sources_digest()
    for file in sorted(copy.iterdir()):
        file.write_text(file.read_text() + "\n")
        after = build.sources_digest()
        assert after != before, file.name
        before = after
