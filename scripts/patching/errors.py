"""Errors that a person can act on. Each carries the process's exit code."""

from __future__ import annotations


class PatchError(Exception):
    """The command cannot run: no vLLM, another version, unreadable patches, a directory that is not writable."""

    exit_code = 2


class MismatchError(PatchError):
    """A file of the installation is not what it has to be; nothing was changed."""

    exit_code = 1
