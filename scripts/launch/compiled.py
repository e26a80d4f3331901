"""What the compilers wrote below the cache root while this start went on: files and bytes, by stage and compiler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cache_environment as caches
from status.server_files import STAGES, Counts, files_text

# Until the server answers, during the warm-up requests, and from then on.
START, WARM_UP, SERVING = STAGES


class Compiled:
    """Compares the cache root with what it held before: make it before the server starts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages: dict[str, Counts] = {}
        self._seen = caches.snapshot(root)

    def account(self, stage: str) -> Counts:
        """Add what is new or rewritten since the last look to ``stage``, and return it: files and bytes by compiler."""
        now = caches.snapshot(self.root)
        new = {
            name: {"files": int(total["files"]), "bytes": int(total["bytes"])}
            for name, total in caches.compiled_between(self._seen, now).items()
        }
        self._seen = now
        # A new dictionary: the report may be written from another thread meanwhile.
        self.stages = self.stages | {stage: _sum(self.stages.get(stage, {}), new)}
        return new


def unwatched(settings: Mapping[str, str], root: Path) -> list[str]:
    """The compilers whose cache ``settings`` put elsewhere than below ``root``: what they write is not seen."""
    own = caches.environment(root)
    return [each.name for each in caches.COMPILERS if settings.get(each.variable) != own[each.variable]]


def text(counts: Counts) -> str:
    """``counts`` in words: nothing, or the number of files of each compiler."""
    return files_text(counts) or "nothing"


def _sum(one: Counts, other: Counts) -> Counts:
    names = dict.fromkeys([*one, *other])
    return {
        name: {unit: one.get(name, {}).get(unit, 0) + other.get(name, {}).get(unit, 0) for unit in ("files", "bytes")}
        for name in names
    }
