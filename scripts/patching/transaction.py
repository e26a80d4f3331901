"""Makes a set of file changes atomic: after a kill at any point, recover() brings either all of them or none.

In the work folder, on the same file system as the files themselves:
  blobs/<sha256>  the old and new contents; originals stay here as long as they are needed for revert
  staging/<n>     the new files, complete with mode and time, ready to be renamed into place
  journal.json    exists from the moment everything above is on disk until everything below is done
The journal's appearance is the commit: before it nothing was touched, after it a run goes on to its goal. The goal is
"after"; it turns to "before" when a file cannot be replaced (a full or read-only file system).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import MismatchError, PatchError
from .files import (
    Image,
    digest,
    image_of,
    purge_bytecode,
    read,
    remove,
    remove_if_empty,
    sha256,
    sync_directory,
    write_durable,
    write_json,
)
from .install import Install
from .record import RECORD_FILE, Record


@dataclass(frozen=True)
class Change:
    """One file, from `before` to `after` (None: absent). `stock` is its hash in a fresh vLLM."""

    path: str
    before: Image | None
    after: Image | None
    stock: str | None


@dataclass
class Journal:
    """A transaction under way. `folders` are those that may be left empty, `record` the records before and after."""

    version: str
    command: str
    goal: str
    changes: list[Change]
    folders: list[str]
    record: dict[str, dict | None]

    @staticmethod
    def from_json(value: dict) -> Journal:
        changes = [
            Change(c["path"], c["before"] and Image(**c["before"]), c["after"] and Image(**c["after"]), c["stock"])
            for c in value["changes"]
        ]
        return Journal(**{**value, "changes": changes})


def execute(install: Install, command: str, changes: list[Change], contents: dict[str, bytes],
            before: Record | None, after: Record | None) -> None:  # fmt: skip
    """Carry out `changes` and replace the record, atomically. The lock must be held and recover() must have run.

    `contents` maps hashes to contents, for all before and after images. Raises PatchError if the installation cannot be
    written; then it is as before.
    """
    folders = sorted({folder for record in (before, after) if record for folder in record.folders})
    journal = Journal(
        install.version, command, "after", changes, folders,
        {"before": before and before.to_json(), "after": after and after.to_json()},
    )  # fmt: skip
    try:
        _check_writable(install, changes)
        _store(install, changes, contents)
        write_json(install.work / "journal.json", asdict(journal))
    except OSError as error:
        raise PatchError(f"cannot write to {install.package}: {error}. Nothing was changed.") from error
    try:
        _finish(install, journal)
    except OSError as error:
        journal.goal = "before"
        _undo(install, journal, error)


def recover(install: Install) -> str | None:
    """Complete or roll back what a killed run left; says so in one line. The lock must be held."""
    path = install.work / "journal.json"
    data = read(path)
    if data is None:
        # A read-only folder stays as it is; a damaged record is reported by whoever needs it.
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            _clean(install, json.loads(read(install.work / RECORD_FILE) or "null"))
        return None
    try:
        journal = Journal.from_json(json.loads(data))
    except (KeyError, TypeError, ValueError) as error:
        raise PatchError(f"{path} is damaged ({error}). Remove {install.work} and run: {install.reinstall}") from error
    try:
        if journal.version != install.version:
            _abandon(install, journal)
            return f"dropped an interrupted {journal.command} of vLLM {journal.version}: now it is {install.version}"
        _check_known(install, journal)
        _finish(install, journal)
    except OSError as error:
        raise PatchError(
            f"an interrupted {journal.command} cannot be completed: {error}. Make {install.package} writable."
        ) from error
    return f"an interrupted {journal.command} was {'completed' if journal.goal == 'after' else 'rolled back'}"


def _check_writable(install: Install, changes: list[Change]) -> None:
    device = os.stat(install.work).st_dev
    for change in changes:
        folder = install.path(change.path).parent
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PatchError(f"{folder} is not writable. Run as a user who may write to it. Nothing was changed.")
        if os.stat(folder).st_dev != device:
            raise PatchError(
                f"{folder} is a mount of its own: files cannot be replaced atomically. Nothing was changed."
            )


def _store(install: Install, changes: list[Change], contents: dict[str, bytes]) -> None:
    blobs, staging = install.work / "blobs", install.work / "staging"
    for folder in (blobs, staging):
        os.makedirs(folder, exist_ok=True)
    for number, change in enumerate(changes):
        for image in (change.before, change.after):
            if image and digest(blobs / image.sha) != image.sha:
                write_durable(blobs / image.sha, contents[image.sha])
        if change.after:
            write_durable(staging / str(number), contents[change.after.sha], change.after.mode, change.after.mtime_ns)
    for folder in (blobs, staging, install.work):
        sync_directory(folder)


def _check_known(install: Install, journal: Journal) -> None:
    for change in journal.changes:
        known = {None, change.stock, *(image.sha for image in (change.before, change.after) if image)}
        found = digest(install.path(change.path))
        if found not in known:
            remedy = (
                f"{install.reinstall}, then run this again" if change.stock else "move it away, then run this again"
            )
            raise MismatchError(
                f"{change.path} was changed by someone else after {journal.command} was interrupted\n"
                f"  expected  {' or '.join(sorted(known - {None}))}\n  found     {found}\n  do        {remedy}"
            )


def _finish(install: Install, journal: Journal) -> None:
    touched = set()
    for number, change in enumerate(journal.changes):
        path = install.path(change.path)
        image = change.after if journal.goal == "after" else change.before
        if image and digest(path) != image.sha:
            touched |= _make_folders(path.parent, install.package)
            os.replace(_staged(install, number, image), path)
        elif image is None:
            remove(path)
        purge_bytecode(path)
        if path.parent.is_dir():
            touched.add(path.parent)
    for folder in sorted(journal.folders, reverse=True):
        remove_if_empty(install.path(folder))
    for folder in touched:
        if folder.is_dir():
            sync_directory(folder)
    _conclude(install, journal.record[journal.goal])


def _conclude(install: Install, record: dict | None) -> None:
    if record is None:
        remove(install.work / RECORD_FILE)
    else:
        write_json(install.work / RECORD_FILE, record)
    sync_directory(install.work)
    os.unlink(install.work / "journal.json")
    sync_directory(install.work)
    # The transaction is over; what cannot be removed now is removed by the next run.
    with contextlib.suppress(OSError):
        _clean(install, record)


def _undo(install: Install, journal: Journal, cause: OSError) -> None:
    try:
        write_json(install.work / "journal.json", asdict(journal))
        _finish(install, journal)
    except OSError as error:
        raise PatchError(
            f"{journal.command} failed ({cause}) and cannot be rolled back now ({error}). "
            f"Make {install.package} writable and run any subcommand: it rolls back first."
        ) from cause
    raise PatchError(f"{journal.command} failed: {cause}. All files were put back.") from cause


def _abandon(install: Install, journal: Journal) -> None:
    # The targets belong to another vLLM now; only what this project added is still its own to remove.
    records = [Record.from_json(r) for r in journal.record.values() if r]
    for relative, entry in [item for record in records for item in record.files.items()]:
        if entry.stock is None and digest(install.path(relative)) == entry.applied.sha:
            remove(install.path(relative))
            purge_bytecode(install.path(relative))
    for folder in sorted(journal.folders, reverse=True):
        remove_if_empty(install.path(folder))
    _conclude(install, None)


def _staged(install: Install, number: int, image: Image) -> Path:
    staged = install.work / "staging" / str(number)
    data = read(staged)
    if data is None or image_of(staged, data) != image:
        content = read(install.work / "blobs" / image.sha)
        if content is None or sha256(content) != image.sha:
            raise PatchError(
                f"{install.work / 'blobs' / image.sha} is damaged. Remove {install.work} and run: {install.reinstall}"
            )
        os.makedirs(staged.parent, exist_ok=True)
        write_durable(staged, content, image.mode, image.mtime_ns)
    return staged


def _make_folders(folder: Path, package: Path) -> set[Path]:
    missing = []
    while not folder.is_dir() and folder != package:
        missing.append(folder)
        folder = folder.parent
    mode = stat.S_IMODE(os.stat(folder).st_mode)
    for new in reversed(missing):
        os.mkdir(new, mode)
    return {folder, *missing}


def _clean(install: Install, record: dict | None) -> None:
    shutil.rmtree(install.work / "staging", ignore_errors=True)
    kept = {entry["stock"]["sha"] for entry in (record or {"files": {}})["files"].values() if entry["stock"]}
    blobs = install.work / "blobs"
    if blobs.is_dir():
        for name in os.listdir(blobs):
            if name not in kept:
                os.unlink(blobs / name)
        remove_if_empty(blobs)
    for name in ("journal.json.tmp", RECORD_FILE + ".tmp"):
        remove(install.work / name)
