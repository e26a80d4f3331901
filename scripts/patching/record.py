"""What an earlier apply left in an installation: enough to verify it and to bring the stock files back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from .errors import PatchError
from .files import Image, digest, read
from .install import Install

FORMAT = 1
RECORD_FILE = "state.json"


@dataclass(frozen=True)
class Entry:
    """One file. `stock` is None for a file that vLLM does not have."""

    stock: Image | None
    applied: Image


@dataclass(frozen=True)
class Record:
    """The series that is applied (`series` is Series.id), by path. `folders` were created for new files."""

    version: str
    distribution: str
    series: str
    patches: list[str]
    files: dict[str, Entry]
    folders: list[str]

    def to_json(self) -> dict:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(value: dict) -> Record:
        """Inverse of to_json; raises KeyError, TypeError or ValueError for anything else."""
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']}, expected {FORMAT}")
        files = {
            path: Entry(entry["stock"] and Image(**entry["stock"]), Image(**entry["applied"]))
            for path, entry in value["files"].items()
        }
        fields = {name: value[name] for name in ("version", "distribution", "series", "patches", "folders")}
        return Record(files=files, **fields)


def load(install: Install) -> Record | None:
    """The record of an installation, None if nothing was applied. Raises PatchError if it is unreadable.

    After a change of vLLM's version only the files that this project added still mean anything: the others are dropped.
    """
    path = install.work / RECORD_FILE
    data = read(path)
    if data is None:
        return None
    try:
        record = Record.from_json(json.loads(data))
    except (KeyError, TypeError, ValueError) as error:
        raise PatchError(f"{path} is damaged ({error}). Remove {install.work} and run: {install.reinstall}") from error
    if record.version == install.version:
        return record
    added = {p: e for p, e in record.files.items() if e.stock is None and digest(install.path(p)) == e.applied.sha}
    return replace(record, series="", files=added)
