"""Compares an installation with the series, and works out the changes that apply or revert it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from .errors import MismatchError
from .files import Image, digest, fresh_mtime, image_of, read, sha256
from .install import Install
from .record import Entry, Record
from .series import Series
from .transaction import Change

# A file may be in these states; only the first four are known to be safe to replace.
STOCK, PATCHED, OLDER, LEFT_OVER, DIFFERS, FOREIGN, MISSING, UNRECORDED = (
    "stock", "patched", "older", "left over", "differs", "foreign", "missing", "unrecorded",
)  # fmt: skip
SAFE = (STOCK, PATCHED, OLDER, LEFT_OVER)


@dataclass(frozen=True)
class FileState:
    """One file of the series or of the record: `expected` are (hash, meaning) pairs, `found` is its hash."""

    path: str
    kind: str
    state: str
    expected: tuple[tuple[str, str], ...]
    found: str | None
    remedy: str

    def explain(self) -> str:
        """Several lines: the file, what was expected, what was found, what to do."""
        lines = [f"{self.path}: {self.state}"]
        lines += [f"  expected  {sha}  ({meaning})" for sha, meaning in self.expected]
        return "\n".join([*lines, f"  found     {self.found or 'absent'}", f"  do        {self.remedy}"])


def examine(install: Install, series: Series, record: Record | None) -> tuple[str, list[FileState]]:
    """State of the installation (stock, patched, older, mixed, unknown) and of each file."""
    recorded = record.files if record else {}
    files = [_target(install, series, path, recorded.get(path)) for path in series.paths]
    files += [_overlay(install, series, path, recorded.get(path)) for path in series.overlay]
    wanted = {file.path for file in files}
    files += [_dropped(install, path, entry) for path, entry in recorded.items() if path not in wanted]
    states = {file.state for file in files}
    if not states <= set(SAFE):
        return "unknown", files
    if not recorded:
        return "stock", files
    if states == {PATCHED}:
        return "patched", files
    ours = [file for file in files if file.path in recorded]
    complete = all(file.found == recorded[file.path].applied.sha for file in ours)
    return ("older" if complete else "mixed"), files


def plan_apply(
    install: Install, series: Series, record: Record | None, files: list[FileState]
) -> tuple[list[Change], dict[str, bytes], Record]:
    """Changes that bring the series in (taking an older one out), their contents, and the record to leave.

    Raises MismatchError, naming every file in question, if a file is neither stock nor this project's own.
    """
    _refuse(files)
    recorded = record.files if record else {}
    changes: list[Change] = []
    contents: dict[str, bytes] = {}
    entries: dict[str, Entry] = {}
    for file in files:
        path, old = file.path, recorded.get(file.path)
        current, before = _current(install, path, contents)
        if file.state == LEFT_OVER:
            changes += _restore(install, path, old, before, contents)
            continue
        if path in series.overlay:
            stock, new = None, series.overlay[path]
        else:
            stock, content = _stock(install, series, file, old, current, before)
            new = series.patched(path, content)
            if content is not None:
                contents[stock.sha] = content
        mode = stock.mode if stock else 0o644
        after = Image(sha256(new), mode, fresh_mtime(before.mtime_ns if before else None))
        contents[after.sha] = new
        if before and before.sha == after.sha:
            entries[path] = Entry(stock, before)
            continue
        entries[path] = Entry(stock, after)
        changes.append(Change(path, before, after, stock.sha if stock else None))
    folders = _new_folders(install, [p for p, e in entries.items() if e.stock is None], record)
    names = [patch.name for patch in series.patches]
    return changes, contents, Record(install.version, install.distribution, series.id, names, entries, folders)


def plan_revert(install: Install, record: Record) -> tuple[list[Change], dict[str, bytes]]:
    """Changes that bring back every recorded file. Raises MismatchError if one was edited after the apply."""
    files = [_dropped(install, path, entry) for path, entry in record.files.items()]
    _refuse(files)
    changes: list[Change] = []
    contents: dict[str, bytes] = {}
    for file in files:
        before = _current(install, file.path, contents)[1]
        changes += _restore(install, file.path, record.files[file.path], before, contents)
    return changes, contents


def _target(install: Install, series: Series, path: str, old: Entry | None) -> FileState:
    found = digest(install.path(path))
    variants = series.targets[path]
    expected = tuple((v.stock, f"stock {', '.join(v.builds)}") for v in variants if v.stock)
    expected += tuple((v.patched, "patched") for v in variants)
    remedy = f"{install.reinstall}, then run this again"
    if found in [v.stock for v in variants]:
        state = STOCK
    elif found is None:
        state = MISSING
    elif old and found == old.applied.sha:
        state = PATCHED if (old.stock and old.stock.sha, found) in [(v.stock, v.patched) for v in variants] else OLDER
    elif found in [v.patched for v in variants]:
        state, remedy = UNRECORDED, f"the record in {install.work} is gone, so it cannot be reverted: {remedy}"
    elif all(v.stock is None for v in variants):
        state, remedy = FOREIGN, "a patch creates this file, but it was there before: move it away"
    else:
        state = DIFFERS
        if found == install.shipped.get(path):
            remedy = (
                f"this is as {install.distribution} {install.full_version} shipped it: another build than the patches "
                "are made for. Use a build named above, or rebase the patches and add it with: patch_vllm.py manifest"
            )
        elif path in install.shipped:
            remedy = f"it was edited after it was installed; {remedy}"
    return FileState(path, "patch", state, expected, found, remedy)


def _overlay(install: Install, series: Series, path: str, old: Entry | None) -> FileState:
    found = digest(install.path(path))
    wanted = sha256(series.overlay[path])
    remedy = f"move {install.path(path)} away, then run this again"
    if found is None:
        state = STOCK
    elif old is None:
        state, remedy = FOREIGN, f"it is not from an earlier apply; if it is not vLLM's own, {remedy}"
    elif found == wanted:
        state = PATCHED
    elif found == old.applied.sha:
        state = OLDER
    else:
        state, remedy = DIFFERS, f"it was edited after apply; take the change over into the repository and {remedy}"
    return FileState(path, "overlay", state, ((wanted, "overlay file of the repository"),), found, remedy)


def _dropped(install: Install, path: str, entry: Entry) -> FileState:
    found = digest(install.path(path))
    expected = ((entry.applied.sha, "applied earlier"),)
    remedy = f"move {install.path(path)} away, then run this again"
    if entry.stock:
        expected += ((entry.stock.sha, "stock"),)
        remedy = f"{install.reinstall}, then run this again"
    safe = found in [sha for sha, _ in expected] or (found is None and entry.stock is None)
    state = LEFT_OVER if safe else DIFFERS if found else MISSING
    return FileState(
        path, "patch" if entry.stock else "overlay", state, expected, found, f"edited after apply; {remedy}"
    )


def _refuse(files: list[FileState]) -> None:
    bad = [file for file in files if file.state not in SAFE]
    if bad:
        raise MismatchError("\n".join([*(file.explain() for file in bad), "Nothing was changed."]))


def _current(install: Install, path: str, contents: dict[str, bytes]) -> tuple[bytes | None, Image | None]:
    content = read(install.path(path))
    if content is None:
        return None, None
    image = image_of(install.path(path), content)
    contents[image.sha] = content
    return content, image


def _stock(install: Install, series: Series, file: FileState, old: Entry | None,
           current: bytes | None, before: Image | None) -> tuple[Image | None, bytes | None]:  # fmt: skip
    if file.state == STOCK:
        return before, current
    if old.stock is None:
        return None, None
    content = _original(install, old.stock)
    if old.stock.sha not in [v.stock for v in series.targets[file.path]]:
        remedy = f"{install.reinstall}, then run this again"
        found = replace(file, state="original differs", found=old.stock.sha, remedy=remedy)
        raise MismatchError(f"{found.explain()}\nNothing was changed.")
    return old.stock, content


def _restore(
    install: Install, path: str, entry: Entry, before: Image | None, contents: dict[str, bytes]
) -> list[Change]:
    if entry.stock is None:
        return [Change(path, before, None, None)] if before else []
    if before and before.sha == entry.stock.sha:
        return []
    contents[entry.stock.sha] = _original(install, entry.stock)
    return [Change(path, before, entry.stock, entry.stock.sha)]


def _original(install: Install, image: Image) -> bytes:
    path = install.work / "blobs" / image.sha
    content = read(path)
    if content is None or sha256(content) != image.sha:
        raise MismatchError(
            f"the original kept in {path} is damaged\n  expected  {image.sha}\n"
            f"  found     {'absent' if content is None else sha256(content)}\n"
            f"  do        remove {install.work}, then {install.reinstall}"
        )
    return content


def _new_folders(install: Install, paths: list[str], record: Record | None) -> list[str]:
    folders = set()
    for path in paths:
        for folder in PurePosixPath(path).parents:
            name = str(folder)
            if name.startswith("vllm/") and (not install.path(name).is_dir() or (record and name in record.folders)):
                folders.add(name)
    return sorted(folders)
