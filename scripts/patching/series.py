"""The project's side: numbered patches, overlay files, and targets.json with the hashes that they are made for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from . import diff
from .errors import MismatchError, PatchError
from .files import read, sha256, write_json
from .install import Install

MANIFEST = "targets.json"
PATCH_NAME = re.compile(r"(\d{2,4})-.+\.diff")


@dataclass(frozen=True)
class Variant:
    """One stock form of a target (None: absent), what it becomes, and the builds ("vllm 0.32.0") that have it."""

    stock: str | None
    patched: str
    builds: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """Everything that belongs into one version of vLLM. Paths start with vllm/."""

    version: str
    folder: Path
    patches: tuple[diff.Patch, ...]
    hashes: dict[str, str]  # patch name -> SHA-256
    overlay: dict[str, bytes]
    targets: dict[str, tuple[Variant, ...]]  # empty until load_targets

    @property
    def paths(self) -> list[str]:
        """Files that the patches change or create, sorted."""
        return sorted({f.path for patch in self.patches for f in patch.files})

    @property
    def id(self) -> str:
        """Hash of all patches and overlay files: two runs with the same id leave the same files."""
        parts = [f"{name} {sha}" for name, sha in self.hashes.items()]
        parts += [f"{path} {sha256(data)}" for path, data in sorted(self.overlay.items())]
        return sha256("\n".join(parts).encode())

    def patched(self, path: str, stock: bytes | None) -> bytes:
        """A target after all patches. Raises diff.DiffError if one does not fit."""
        content = stock
        for patch in self.patches:
            for file_diff in patch.files:
                if file_diff.path == path:
                    content = diff.apply(patch.name, file_diff, content)
        return content


def load(patches: Path, overlay: Path, install: Install) -> Series:
    """The series for the installed version, without targets. Raises PatchError if there is none or it is malformed."""
    folder = patches / install.version
    if not folder.is_dir():
        known = sorted(f.name for f in patches.iterdir() if (f / MANIFEST).is_file()) if patches.is_dir() else []
        if not known:
            raise PatchError(f"no patches in {patches}: expected {folder}/NN-name.diff")
        raise PatchError(
            f"{install.distribution} {install.full_version} is installed in {install.site}, but the patches are for "
            f"{', '.join(known)}. Install it: pip install {install.distribution}=={known[-1]}"
        )
    contents = {path.name: _read(path) for path in sorted(folder.glob("*.diff"))}
    if not contents:
        raise PatchError(f"no patches in {folder}: expected NN-name.diff")
    numbers: dict[int, str] = {}
    for name in contents:
        match = PATCH_NAME.fullmatch(name)
        if not match:
            raise PatchError(f"{folder / name}: the name of a patch must be like 03-what-it-does.diff")
        if int(match[1]) in numbers:
            raise PatchError(f"{folder}: {numbers[int(match[1])]} and {name} have the same number")
        numbers[int(match[1])] = name
    ordered = [numbers[n] for n in sorted(numbers)]
    parsed = tuple(diff.parse(name, contents[name]) for name in ordered)
    series = Series(install.version, folder, parsed, {n: sha256(contents[n]) for n in ordered}, _overlay(overlay), {})
    for path in series.paths:
        if not path.startswith("vllm/"):
            raise PatchError(f"{folder}: a patch changes {path}, which is outside vllm/")
        if path in series.overlay:
            raise PatchError(f"{path} is changed by a patch and is an overlay file too: keep one of them")
    return series


def load_targets(series: Series) -> Series:
    """The series with the hashes of targets.json. Raises PatchError if the file does not belong to these patches."""
    path = series.folder / MANIFEST
    remedy = "Write it with: patch_vllm.py manifest --vllm STOCK"
    try:
        manifest = json.loads(_read(path))
        targets = {
            file: tuple(Variant(v["stock"], v["patched"], tuple(v["builds"])) for v in variants)
            for file, variants in manifest["files"].items()
        }
        patches = manifest["patches"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PatchError(f"{path} is damaged ({error!r}). {remedy}") from error
    if patches != series.hashes or sorted(targets) != series.paths:
        changed = sorted(n for n in {*patches, *series.hashes} if patches.get(n) != series.hashes.get(n))
        raise PatchError(
            f"{path} was made for other patches (different: {', '.join(changed) or 'its files'}). {remedy}"
        )
    return Series(**{**series.__dict__, "targets": targets})


def write_targets(series: Series, stock: list[Install]) -> dict[str, list[dict]]:
    """Write targets.json from the series and one stock tree per build; returns its "files".

    Raises MismatchError for a tree whose targets are not as the wheel's RECORD has them, or that has an overlay file.
    """
    files: dict[str, dict[tuple, list[str]]] = {path: {} for path in series.paths}
    for install in stock:
        for path in series.overlay:
            if read(install.path(path)) is not None:
                raise MismatchError(
                    f"overlay file {path} exists in {install.site}: not a stock tree, or the name is taken"
                )
        for path, variants in files.items():
            content = read(install.path(path))
            found = None if content is None else sha256(content)
            if found != install.shipped.get(path):
                raise MismatchError(
                    f"{path} in {install.site} is not as {install.distribution} {install.full_version} shipped it\n"
                    f"  expected  {install.shipped.get(path, 'absent')} (RECORD)\n  found     {found or 'absent'}\n"
                    f"  do        give a stock tree: {install.reinstall}"
                )
            key = (found, sha256(series.patched(path, content)))
            variants.setdefault(key, []).append(f"{install.distribution} {install.full_version}")
    value = {
        path: [{"stock": old, "patched": new, "builds": sorted(set(builds))} for (old, new), builds in variants.items()]
        for path, variants in files.items()
    }
    try:
        write_json(series.folder / MANIFEST, {"version": series.version, "patches": series.hashes, "files": value})
    except OSError as error:
        raise PatchError(f"cannot write {series.folder / MANIFEST}: {error.strerror}") from error
    return value


def _overlay(folder: Path) -> dict[str, bytes]:
    """Files to lay over vllm/model_executor; documentation, caches and hidden files are not among them."""
    if not folder.is_dir():
        raise PatchError(f"no overlay folder at {folder}")
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_dir() or hidden or path.suffix in (".pyc", ".md"):
            continue
        files["/".join(("vllm", "model_executor", *parts))] = _read(path)
    return files


def _read(path: Path) -> bytes:
    content = read(path)
    if content is None:
        raise PatchError(f"{path} is missing")
    return content
