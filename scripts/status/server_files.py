"""Reads what the entrypoints on this host tell of their servers: the warm-up requests, and what was compiled.

A file counts while the entrypoint that wrote it lives. Servers that were started without one tell nothing, and are
ready when their ranks and their health are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rank_files import complete, lock_owner

FORMAT = 1
# The stages of a start in which compilers may write, as the entrypoint names them.
STAGES = ("start", "warm_up", "serving")
# The phases beside status.phases.WARM_UP.
STARTING, SERVING = "starting", "serving"

Counts = dict[str, dict[str, int]]  # files and bytes by compiler


@dataclass(frozen=True)
class WarmUp:
    """Groups of requests sent, of how many (0: not known yet), seconds, and how it went wrong or was cut short."""

    sent: int
    of: int
    seconds: float
    error: str | None
    cut_off: bool


@dataclass(frozen=True)
class ServerStatus:
    """One server: its port, the phase that its entrypoint is in, times (Unix), and files by stage and compiler."""

    port: int
    phase: str
    started: float
    heartbeat: float
    warm_up: WarmUp | None
    compiled: dict[str, Counts] | None
    not_watched: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether warm-up requests are still to be answered."""
        return self.warm_up is not None and self.phase != SERVING

    def progress(self) -> str:
        """How far the warm-up is, in words."""
        if self.warm_up is None or not self.warm_up.of:
            return "warm-up requests are about to be sent"
        return f"warm-up requests: {self.warm_up.sent} of {self.warm_up.of} groups in {self.warm_up.seconds:.0f} s"

    def compiled_text(self) -> str | None:
        """What was compiled, in words; None if that is not known yet."""
        if self.compiled is None:
            return None
        stages = {stage: files_text(self.compiled[stage]) for stage in STAGES if self.compiled.get(stage)}
        names = {"start": "before ready", "warm_up": "by the warm-up", "serving": "since ready"}
        return "; ".join(f"{names[stage]} {text}" for stage, text in stages.items()) or "nothing"

    def as_json(self) -> dict[str, Any]:
        """One of ``servers`` in /startup."""
        return {
            "port": self.port,
            "phase": self.phase,
            "warm_up": self.warm_up and vars(self.warm_up),
            "compiled": self.compiled,
            "not_watched": list(self.not_watched),
        }


def read(directory: Path, problems: list[str]) -> tuple[ServerStatus, ...]:
    """The servers of living entrypoints by port; what cannot be read is added to ``problems``."""
    found = []
    for path in sorted(directory.glob("server-*.json")):
        if lock_owner(path.with_suffix(".lock")) is None:
            continue
        try:
            found.append(parse(path.read_text()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
    return tuple(sorted(found, key=lambda server: server.port))


def parse(text: str) -> ServerStatus:
    """Return what ``text`` tells.

    Raises:
        ValueError: it is not complete, or of another format.
    """
    with complete(text, FORMAT, "the entrypoint") as data:
        warm_up, compiled = data["warm_up"], data["compiled"]
        return ServerStatus(
            int(data["port"]),
            str(data["phase"]),
            float(data["started"]),
            float(data["heartbeat"]),
            warm_up
            and WarmUp(
                int(warm_up["sent"]),
                int(warm_up["of"]),
                float(warm_up["seconds"]),
                warm_up["error"],
                bool(warm_up["cut_off"]),
            ),
            compiled and {stage: _counts(compiled[stage]) for stage in STAGES if stage in compiled},
            tuple(compiled["not_watched"]) if compiled else (),
        )


def _counts(stage: dict[str, Any]) -> Counts:
    return {str(name): {unit: int(total[unit]) for unit in ("files", "bytes")} for name, total in stage.items()}


def files_text(counts: Counts) -> str:
    """The number of files of each compiler, in words."""
    return ", ".join(f"{name} {total['files']} files" for name, total in counts.items())
