"""Docker's programs, an engine, and the images that the Dockerfile builds on, each made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import standin
from .engine import Engine
from .tools import Tools


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the programs and the makings of the images lie; some 3 GB."""
    if os.environ.get("REQUIRE_CONTAINER_ENGINE") != "1":
        pytest.skip("takes minutes, root, 6 GB of memory and Debian 12's archive: set REQUIRE_CONTAINER_ENGINE=1")
    assert os.geteuid() == 0, "REQUIRE_CONTAINER_ENGINE=1, but the tests do not run as root"
    directory = tmp_path_factory.mktemp("containers")
    yield directory
    shutil.rmtree(directory)  # pytest would keep it for three runs


@pytest.fixture(scope="session")
def tools(workplace: Path) -> Tools:
    return Tools(workplace / "tools")


@pytest.fixture(scope="session")
def engine(tools: Tools, workplace: Path) -> Iterator[Engine]:
    running = Engine(tools, workplace / "engine")
    try:
        yield running
    finally:
        running.close()
    mounts = Path("/proc/self/mounts").read_text()
    assert str(workplace) not in mounts, "the engine left mounts behind"


@pytest.fixture(scope="session")
def bases(engine: Engine, workplace: Path) -> None:
    """The stand-ins for vLLM's, Python's and Prometheus' images."""
    standin.make(engine, workplace)
    standin.make_prometheus(engine, workplace)
