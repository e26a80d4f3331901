"""The compiled objects: where they lie, what each kernel is, and the limits of the architecture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from nvfp4_megamoe.errors import UnsupportedError

MANIFEST = "manifest.json"
BUILD = "python -m nvfp4_megamoe.backends.sm100.build"
REGISTERS = 65536
SHARED_LIMIT = 232448


@dataclass(frozen=True)
class KernelObject:
    """One compiled kernel.

    symbol: entry in the cubin. threads: of a block. shared_bytes: dynamic shared memory. cluster: blocks of a cluster.
    registers: of a thread. arguments: ``q`` 64-bit, ``i`` 32-bit integer, ``f`` float32, in order.
    """

    name: str
    symbol: str
    threads: int
    shared_bytes: int
    cluster: int
    registers: int
    arguments: str

    @property
    def file(self) -> str:
        return f"{self.name}.cubin"


def directory() -> Path:
    """``$NVFP4_SM100_OBJECTS`` or ``objects`` beside this file."""
    return Path(os.environ.get("NVFP4_SM100_OBJECTS", Path(__file__).with_name("objects")))


def write(target: Path, objects: list[KernelObject], versions: dict[str, str]) -> None:
    """Write the manifest; the cubins must already be there."""
    content = {"versions": versions, "kernels": [asdict(item) for item in objects]}
    (target / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    (target / ".gitignore").write_text("*\n")


def read(source: Path | None = None) -> dict[str, KernelObject]:
    """The built kernels by name.

    Raises:
        UnsupportedError: they have not been built, or a file is missing.
    """
    source = source or directory()
    path = source / MANIFEST
    if not path.exists():
        raise UnsupportedError(f"{path} does not exist: run {BUILD}")
    objects = {item["name"]: KernelObject(**item) for item in json.loads(path.read_text())["kernels"]}
    for item in objects.values():
        if not (source / item.file).exists():
            raise UnsupportedError(f"{source / item.file} is in the manifest but does not exist: run {BUILD}")
    return objects
