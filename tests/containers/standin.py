"""Stand-ins for the images that the Dockerfile builds on: Debian with the packages of this project's CPU environment.

No registry is asked: the system comes from Debian's archive; torch, vLLM's CPU build (stock: patches taken back) and
the rest come from the virtual environment that runs the tests. One image bears both names.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .engine import Engine

REPOSITORY = Path(__file__).resolve().parents[2]
GPU_BASE = "vllm/vllm-openai:v0.32.0"
CPU_BASE = "python:3.11-slim-bookworm"
PROMETHEUS = "prom/prometheus:v3.5.0"
_PACKAGES = "python3-minimal,python3-venv,g++,libnuma1,ca-certificates"
_PATH = "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def make(engine: Engine, directory: Path) -> None:
    """Make the images and remove what they were made of."""
    root = directory / "rootfs"
    engine.tools.check(
        *("mmdebstrap", "--quiet", "--variant=minbase", "--format=directory", f"--include={_PACKAGES}"),
        *("--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/doc/*"),
        *("bookworm", root, engine.tools.source),
    )
    # Without the pip and setuptools that Debian would add: a package found in two versions is in either, by chance.
    engine.tools.check("chroot", root, "python3", "-m", "venv", "--without-pip", "/opt/venv")
    site = root / "opt/venv/lib/python3.11/site-packages"
    for name in ("pip", "torch", *_pinned(REPOSITORY / "requirements/cpu.txt")):
        _copy(importlib.metadata.distribution(name), site)
    engine.tools.check(sys.executable, REPOSITORY / "scripts/patch_vllm.py", "revert", "--vllm", site / "vllm")
    _import(engine, root, GPU_BASE, f"ENV PATH={_PATH}")
    engine.docker("tag", GPU_BASE, CPU_BASE)
    shutil.rmtree(root)


def make_prometheus(engine: Engine, directory: Path) -> None:
    """Make a stand-in for Prometheus' image from Debian's program; ``make`` must have been called."""
    context = directory / "prometheus"
    context.mkdir()
    shutil.copy(engine.tools.root / "usr/bin/prometheus", context)
    (context / "Dockerfile").write_text(
        f"FROM {CPU_BASE}\nCOPY prometheus /bin/prometheus\nRUN install -d -m 0777 /prometheus\n"
        'USER 65534\nENTRYPOINT ["/bin/prometheus"]\n'
    )
    engine.docker("build", "--quiet", "--tag", PROMETHEUS, context)
    shutil.rmtree(context)


def _pinned(requirements: Path) -> list[str]:
    return re.findall(r"^([A-Za-z0-9_.-]+)==", requirements.read_text(), re.MULTILINE)


def _copy(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Hard-link the files of ``distribution``, and all of vLLM's folder, which holds the originals of patched files."""
    origin = Path(str(distribution.locate_file("")))
    files = {Path(str(file)) for file in distribution.files or ()}
    if (origin / "vllm" / "__init__.py").exists() and Path("vllm/__init__.py") in files:
        files |= {path.relative_to(origin) for path in (origin / "vllm").rglob("*") if path.is_file()}
    for file in files:
        if ".." in file.parts or not (origin / file).exists():
            continue  # programs of the environment's bin, with its path in their first line
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).unlink(missing_ok=True)
        try:
            os.link(origin / file, site / file)
        except OSError:  # another file system
            shutil.copy2(origin / file, site / file)


def _import(engine: Engine, root: Path, name: str, change: str) -> None:
    with subprocess.Popen(
        ["tar", "-C", root, "--numeric-owner", "--exclude=./proc/*", "--exclude=./sys/*", "-c", "."],
        stdout=subprocess.PIPE,
    ) as packed:
        engine.docker("import", "--change", change, "-", name, stdin=packed.stdout)
    assert packed.returncode == 0, f"tar failed with status {packed.returncode}"
