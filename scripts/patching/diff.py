"""Strict unified diffs: every context line must match at exactly the stated line, byte for byte.

Accepted: changes to existing files and new files (mode 0644), with or without a newline at the end, as `diff -u`, `git
diff` and difflib write them. Refused with an error that names the line: deletions, renames, mode changes, binary diffs,
offsets, fuzz. Lines end at "\\n" only, so a carriage return is an ordinary byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import PatchError

HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?")
# Lines that git puts before "---"; anything else there (rename, deletion, mode change, binary) is refused.
GIT_HEADER = re.compile(rb"diff --git a/\S+ b/\S+|index [0-9a-f]+\.\.[0-9a-f]+(?: 100\d{3})?|new file mode 100644")
NO_NEWLINE = b"\\ No newline at end of file"


class DiffError(PatchError):
    """The diff is malformed, or does not fit the file."""


@dataclass(frozen=True)
class Hunk:
    """Lines `old` at 1-based line `old_start` become `new`; each line carries its newline if it has one."""

    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class FileDiff:
    """All hunks for one file. `path` is relative, without the a/ or b/."""

    path: str
    creates: bool
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """One .diff file: its reason (the text on top) and its file diffs."""

    name: str
    reason: str
    files: tuple[FileDiff, ...]


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their "\\n"; only the last may lack it. Empty data has no lines."""
    lines = data.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


def parse(name: str, data: bytes) -> Patch:
    """Parse one .diff file. Raises DiffError with `name` and the line number for anything it does not accept."""
    return _Parser(name, data).patch()


def apply(patch_name: str, file_diff: FileDiff, content: bytes | None) -> bytes:
    """New content of a file, from its old content (None: no such file). Raises DiffError if a line differs."""
    where = f"{patch_name}: {file_diff.path}"
    if file_diff.creates != (content is None):
        raise DiffError(f"{where}: " + ("creates a file that exists already" if file_diff.creates else "no such file"))
    old = split_lines(content or b"")
    result: list[bytes] = []
    position = 0
    for number, hunk in enumerate(file_diff.hunks, 1):
        start = _index(hunk.old_start, hunk.old)
        if start < position or _index(hunk.new_start, hunk.new) != len(result) + start - position:
            raise DiffError(f"{where}: hunk {number} does not follow from the hunks before it (wrong line numbers)")
        result += old[position:start]
        for offset, expected in enumerate(hunk.old):
            found = old[start + offset] if start + offset < len(old) else b"<end of file>"
            if found != expected:
                raise DiffError(
                    f"{where}: hunk {number} does not fit at line {start + offset + 1}\n"
                    f"  expected  {_show(expected)}\n  found     {_show(found)}"
                )
        if start > len(old):
            raise DiffError(f"{where}: hunk {number} starts at line {start + 1}, the file has {len(old)}")
        result += hunk.new
        position = start + len(hunk.old)
    result += old[position:]
    if any(not line.endswith(b"\n") for line in result[:-1]):
        raise DiffError(f"{where}: a line without newline would end up in the middle of the file")
    return b"".join(result)


def _index(start: int, lines: tuple[bytes, ...]) -> int:
    # A range of no lines names the line before it.
    return start - 1 if lines else start


def _show(line: bytes) -> str:
    return repr(line.decode("utf-8", "backslashreplace"))


class _Parser:
    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.lines = data.split(b"\n")
        if self.lines[-1] == b"":
            self.lines.pop()
        self.at = 0

    def patch(self) -> Patch:
        reason = self._reason()
        files: list[FileDiff] = []
        while self.at < len(self.lines):
            files.append(self._file())
            if files[-1].path in [f.path for f in files[:-1]]:
                self._fail(f"{files[-1].path} appears twice in one patch")
        if not files:
            self._fail("no '--- a/...' line: not a unified diff")
        return Patch(self.name, reason, tuple(files))

    def _reason(self) -> str:
        start = re.compile(rb"--- (?:a/|/dev/null)|diff --git ")
        while self.at < len(self.lines) and not start.match(self.lines[self.at]):
            self.at += 1
        reason = b"\n".join(self.lines[: self.at]).decode("utf-8", "replace").strip()
        if not reason and self.at < len(self.lines):
            self._fail("no reason: text before the first '---' must say what the patch is for")
        return reason

    def _file(self) -> FileDiff:
        while self._peek() is not None and not self._peek().startswith(b"--- "):
            if not GIT_HEADER.fullmatch(self._peek()):
                self._fail(
                    f"unexpected line {_show(self._peek())}; only changes to text files and new files of mode 0644 "
                    "are accepted (no deletion, rename, mode change or binary diff)"
                )
            self.at += 1
        old = self._file_name(b"--- ", "a/")
        new = self._file_name(b"+++ ", "b/")
        if new is None:
            self._fail(f"deletes {old}: deletions are not accepted")
        if old is not None and old != new:
            self._fail(f"renames {old} to {new}: renames are not accepted")
        hunks = []
        while self._peek() is not None and self._peek().startswith(b"@@"):
            hunks.append(self._hunk())
        if not hunks:
            self._fail(f"no hunk for {new}")
        if old is None and (len(hunks) != 1 or hunks[0].old or hunks[0].old_start != 0):
            self._fail(f"{new} is created from /dev/null but its hunk has old lines")
        return FileDiff(new, old is None, tuple(hunks))

    def _file_name(self, marker: bytes, side: str) -> str | None:
        line = self._peek()
        if line is None or not line.startswith(marker):
            self._fail(f"expected a line starting with {marker.decode()!r}")
        text = line[len(marker) :].split(b"\t")[0].decode("utf-8", "replace")
        if text == "/dev/null":
            self.at += 1
            return None
        path = text.removeprefix(side)
        if not text.startswith(side) or path != str(PurePosixPath(path)) or ".." in path.split("/") or path[:1] in "/.":
            self._fail(f"{text!r} is not of the form {side}<relative path>")
        self.at += 1
        return path

    def _hunk(self) -> Hunk:
        header = self.at
        match = HUNK.fullmatch(self._peek())
        if not match:
            self._fail("malformed hunk header")
        old_start, old_count, new_start, new_count = (1 if g is None else int(g) for g in match.groups())
        self.at += 1
        old: list[bytes] = []
        new: list[bytes] = []
        changes = False
        while len(old) < old_count or len(new) < new_count:
            line = self._peek()
            kind = line[:1] if line else b""
            if line is None:
                self._fail(f"the hunk of line {header + 1} ends too early")
            if kind not in (b" ", b"-", b"+"):
                self._fail("a hunk line must start with ' ', '-' or '+' (was trailing white space stripped?)")
            self.at += 1
            end = b"\n"
            if self._peek() == NO_NEWLINE:
                self.at += 1
                end = b""
            if kind != b"+":
                old.append(line[1:] + end)
            if kind != b"-":
                new.append(line[1:] + end)
            changes |= kind != b" "
        if len(old) != old_count or len(new) != new_count:
            self._fail(f"the hunk of line {header + 1} has other line counts than its header")
        if not changes:
            self._fail(f"the hunk of line {header + 1} changes nothing")
        if any(not line.endswith(b"\n") for line in (*old[:-1], *new[:-1])):
            self._fail(f"the hunk of line {header + 1} has a line without newline that is not the last")
        return Hunk(old_start, new_start, tuple(old), tuple(new))

    def _peek(self) -> bytes | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def _fail(self, what: str) -> None:
        raise DiffError(f"{self.name}, line {min(self.at, len(self.lines)) + 1}: {what}")
