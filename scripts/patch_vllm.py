#!/usr/bin/env python3
"""Put this project's patches and files into an installed vLLM; all or nothing, also when killed half-way.

  check     version and hash of every file that would be touched; changes nothing
  apply     apply the series; an older one that is applied is replaced
  verify    every file is as apply leaves it, and as the repository has it
  revert    bring the stock files back, byte for byte
  manifest  (maintainers) write targets.json from stock trees: give --vllm once per build, all builds in one run

Exit codes:
  0  fine: applied, verified, reverted, or nothing to do; for check: patched, or apply can go ahead
  1  a file is not what it has to be, or (verify) the series is not applied as the repository has it
  2  cannot run: no vLLM, another version, unreadable patches, directory not writable

The first run after an interrupted one completes it, or rolls it back, and says so. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from patching import install as installs
from patching import plan, record, series, transaction
from patching.errors import PatchError
from patching.install import Install
from patching.lock import exclusive

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """What is printed, as text or JSON."""

    command: str
    exit_code: int = 0
    state: str | None = None
    distribution: str | None = None
    version: str | None = None
    package: str | None = None
    notes: list[str] = field(default_factory=list)
    summary: str | None = None
    error: str | None = None
    files: list[plan.FileState] = field(default_factory=list)

    def describe(self, install: Install) -> None:
        self.distribution, self.version, self.package = install.distribution, install.full_version, str(install.package)

    def to_json(self) -> str:
        value = {**self.__dict__, "files": [file.__dict__ for file in self.files]}
        return json.dumps(value, indent=1)

    def to_text(self) -> str:
        lines = [f"note: {note}" for note in self.notes]
        if self.error:
            return "\n".join([*lines, f"error: {self.error}"])
        if self.state:
            lines.append(f"{self.distribution} {self.version} in {self.package}: {self.state}")
        if self.command in ("check", "verify"):
            lines += [f"  {file.kind:8}{file.state:11}{file.path}" for file in self.files]
            lines += [file.explain() for file in self.files if file.state not in plan.SAFE]
        return "\n".join(lines + ([self.summary] if self.summary else []))


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    result = Result(options.command)
    try:
        if options.command == "manifest":
            _manifest(options, result)
        else:
            if len(options.vllm) > 1:
                raise PatchError("give --vllm once; only manifest takes several")
            _run(options, result)
    except PatchError as error:
        result.error, result.exit_code = str(error), error.exit_code
    except OSError as error:
        result.error, result.exit_code = str(error), PatchError.exit_code
    print(
        result.to_json() if options.json else result.to_text(),
        file=sys.stderr if result.error and not options.json else sys.stdout,
    )
    return result.exit_code


def _run(options: argparse.Namespace, result: Result) -> None:
    install = installs.find(options.vllm[0] if options.vllm else None)
    result.describe(install)
    with contextlib.ExitStack() as stack:
        # A stock installation has no work folder: nothing to recover, and a command that only reads leaves no trace.
        if options.command == "apply" or install.work.exists():
            stack.enter_context(exclusive(install.work))
            note = transaction.recover(install)
            result.notes += [note] if note else []
        before = record.load(install)
        if options.command == "revert":
            _revert(install, before, result)
            return
        ours = series.load_targets(series.load(options.patches, options.overlay, install))
        result.state, result.files = plan.examine(install, ours, before)
        if options.command == "check":
            _check(result)
        elif options.command == "verify":
            _verify(result)
        else:
            _apply(install, ours, before, result)


def _check(result: Result) -> None:
    result.exit_code = int(result.state == "unknown")
    result.summary = {
        "stock": "apply can go ahead.",
        "patched": "Nothing to do.",
        "older": "An older series is applied; apply replaces it.",
        "mixed": "Some files were put back by someone; apply or revert makes them consistent.",
        "unknown": "apply would refuse.",
    }[result.state]


def _verify(result: Result) -> None:
    bad = [file for file in result.files if file.state != plan.PATCHED]
    result.exit_code = int(result.state != "patched")
    if result.exit_code:
        result.summary = f"NOT as the repository has it: {len(bad)} of {len(result.files)} files differ."
        if result.state != "unknown":
            result.summary += " Run: patch_vllm.py apply"
    else:
        result.summary = f"All {len(result.files)} files are as the repository has them."


def _apply(install: Install, ours: series.Series, before: record.Record | None, result: Result) -> None:
    if result.state == "patched":
        result.summary = "Already applied."
        return
    changes, contents, after = plan.plan_apply(install, ours, before, result.files)
    transaction.execute(install, "apply", changes, contents, before, after)
    was, (result.state, result.files) = result.state, plan.examine(install, ours, after)
    result.summary = (
        f"Applied {len(ours.patches)} patches to {len(ours.paths)} files and laid over {len(ours.overlay)} files"
        + (f" (was: {was})." if was != "stock" else ".")
    )


def _revert(install: Install, before: record.Record | None, result: Result) -> None:
    result.state = "stock"
    if before is None:
        result.summary = "Nothing to revert."
        return
    changes, contents = plan.plan_revert(install, before)
    transaction.execute(install, "revert", changes, contents, before, None)
    result.summary = f"Reverted {len(changes)} files."


def _manifest(options: argparse.Namespace, result: Result) -> None:
    stock = [installs.find(path) for path in options.vllm or [None]]
    result.describe(stock[0])
    if len({install.version for install in stock}) > 1:
        raise PatchError(f"stock trees of different versions: {', '.join(i.full_version for i in stock)}")
    ours = series.load(options.patches, options.overlay, stock[0])
    files = series.write_targets(ours, stock)
    variants = sum(map(len, files.values()))
    result.summary = f"Wrote {ours.folder / series.MANIFEST}: {len(files)} files, {variants} stock variants."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "apply", "verify", "revert", "manifest"))
    parser.add_argument("--vllm", action="append", default=[], metavar="PATH",
                        help="package folder vllm/ or its site-packages; default: the vLLM of this Python")  # fmt: skip
    parser.add_argument("--patches", type=Path, default=REPOSITORY / "patches", metavar="DIR",
                        help="folder with one folder of patches per version")  # fmt: skip
    parser.add_argument("--overlay", type=Path, default=REPOSITORY / "model_executor", metavar="DIR",
                        help="files to lay over vllm/model_executor")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="machine-readable output, on stdout, also for errors")
    return parser


if __name__ == "__main__":
    os.umask(0o022)  # new folders must be readable by whoever serves
    sys.exit(main())
