"""Verify the SM100 kernels on the PTX model: ``python kernel/tests/verify_sm100.py --report report.json``.

Every configuration of ``ptx_model.configurations.FULL`` with several seeds; the report is written after each, and a
later call goes on where the report ends. A result counts for the PTX that it was made with: what the compiler emits
otherwise by then is run again. Needs ``requirements/sm100.txt`` and a C compiler; no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ptx_model import ModelError, own_kernels
from ptx_model.configurations import FULL, Configuration
from tqdm import tqdm

PACKAGES = ("nvidia-cutlass-dsl", "torch", "numpy")


def ptx_hash(kernel: str) -> str:
    """Of the text that the compiler emits for a kernel."""
    return hashlib.sha256(own_kernels.host_object(kernel).ptx.encode()).hexdigest()[:16]


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def header() -> dict:
    """Where and with what the results were made."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{processor()}, {os.cpu_count()} cores, PTX model, no GPU",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def run_one(configuration: Configuration, number: int, seed: int) -> dict:
    """One result; a fault that the model reports is a failure with its message."""
    begin = time.perf_counter()
    try:
        found = configuration.run(seed)
    except ModelError as error:
        found = {"passed": False, "error": str(error)}
    return {
        "kernel": configuration.kernel,
        "configuration": configuration.name,
        "number": number,
        "seed": seed,
        "ptx": ptx_hash(configuration.kernel),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }


def kept(path: Path) -> dict[tuple, dict]:
    """Results of an earlier call that still hold, by kernel, configuration and number."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text())["results"]
    return {
        (r["kernel"], r["configuration"], r["number"]): r
        for r in results
        if r["passed"] and r["ptx"] == ptx_hash(r["kernel"])
    }


def verify(configurations: Sequence[Configuration], seeds: int, path: Path) -> list[dict]:
    """Run what ``path`` does not have yet and add it there; results of these configurations, seed by seed."""
    done, order = kept(path), [(c, n) for n in range(seeds) for c in configurations]
    path.parent.mkdir(parents=True, exist_ok=True)
    for configuration, number in tqdm(order, unit="run", dynamic_ncols=True):
        key = (configuration.kernel, configuration.name, number)
        if key in done:
            continue
        done[key] = run_one(configuration, number, random.SystemRandom().getrandbits(31))
        scratch = path.with_name(path.name + ".part")
        scratch.write_text(json.dumps({**header(), "results": list(done.values())}, indent=1) + "\n")
        scratch.replace(path)
    return [done[c.kernel, c.name, n] for c, n in order]


def table(results: Sequence[dict]) -> str:
    """One row for each kernel and configuration."""
    lines = ["| kernel | K | seeds passed | codes compared | different | unexplained | largest relative L2 | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for key in dict.fromkeys((r["kernel"], r["configuration"]) for r in results):
        group = [r for r in results if (r["kernel"], r["configuration"]) == key]
        sums = [sum(r[name] for r in group if name in r) for name in ("codes", "different", "unexplained")]
        errors = [r["relative_l2"] for r in group if "relative_l2" in r]
        cells = [key[0], key[1].lstrip("k"), f"{sum(r['passed'] for r in group)} of {len(group)}"]
        cells += ["", "", "", f"{max(errors):.1e}"] if errors else [*map(str, sums), ""]
        cells.append(f"{sum(r['seconds'] for r in group):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="JSON file, written after every run and resumed")
    parser.add_argument("--seeds", type=int, default=5, help="fresh seeds of each configuration (default 5)")
    parser.add_argument("--only", default="", help="configurations whose kernel and name contain this text")
    args = parser.parse_args(arguments)
    configurations = [c for c in FULL if args.only in f"{c.kernel} {c.name}"]
    if not configurations:
        names = ", ".join(f"{c.kernel} {c.name}" for c in FULL)
        parser.error(f"no configuration contains {args.only!r}; there are: {names}")
    torch.set_num_threads(1)
    results = verify(configurations, args.seeds, args.report)
    print(table(results))
    failed = [r for r in results if not r["passed"]]
    for r in failed:
        print(f"FAILED: {r['kernel']} {r['configuration']}, seed {r['seed']}: {r.get('error', 'outside the bounds')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
