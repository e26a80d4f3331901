#!/usr/bin/env python3
"""Compile the GPU kernels that this machine has the compilers for, and say which were built and which were not.

Needs no GPU. Exit status: 0 everything in --require is built, 1 a required kernel is not (the line says why).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

MODULES = {
    "sm90": "nvfp4_megamoe.backends.sm90.build",
    "sm100": "nvfp4_megamoe.backends.sm100.build",
}


def build(module: str) -> str | None:
    """Run the build ``module`` as a program; return None, or the last line that it printed if it failed."""
    run = subprocess.run([sys.executable, "-m", module], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, end="", flush=True)
    if run.returncode == 0:
        return None
    return (run.stdout.strip().splitlines() or [f"status {run.returncode} without a message"])[-1]


def required(text: str) -> tuple[str, ...]:
    """Architectures in a list such as ``sm90,sm100``; ``none`` is the empty one."""
    names = tuple(name for name in text.split(",") if name) if text != "none" else ()
    if unknown := set(names) - MODULES.keys():
        known = ", ".join(MODULES)
        raise argparse.ArgumentTypeError(f"no kernels for {', '.join(sorted(unknown))}; expected none or of {known}")
    return names


def main(arguments: list[str] | None = None) -> int:
    """Build, print a line for each architecture, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", type=required, default=(), metavar="LIST", help="sm90,sm100 or none (%(default)s)")
    parser.add_argument("--report", type=Path, help="write what was built to this JSON file")
    options = parser.parse_args(arguments)
    results = {}
    for name, module in MODULES.items():
        began = time.monotonic()
        failure = build(module)
        results[name] = {"built": failure is None, "seconds": round(time.monotonic() - began, 1), "why_not": failure}
    for name, result in results.items():
        said = f"built in {result['seconds']} s" if result["built"] else f"NOT built: {result['why_not']}"
        print(f"{name}: {said}", flush=True)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(results, indent=1) + "\n")
    if missing := [name for name in options.require if not results[name]["built"]]:
        print(f"error: {', '.join(missing)} required but not built", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
