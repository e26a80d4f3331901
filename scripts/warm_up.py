#!/usr/bin/env python3
"""Fill the compile caches before users come: serve once as the server will serve, drive every shape, and stop.

    warm_up.py --model /models/dsv4 -- --tensor-parallel-size 8 --enable-expert-parallel --max-num-seqs 128

Everything after ``--`` goes to the server, and must be what it will serve with: kernels depend on geometry, ranks and
flags. The caches lie below MEGA_MOE_CACHE_DIR (scripts/cache_environment.py). The report has the duration of each
phase, what every compiler added, and what a second pass over the same shapes still compiled: if anything, status 1.

``--url`` drives a running server, and starts and stops nothing: an entrypoint that reports ready only after it
spares the first users what is compiled in each process anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cache_environment as caches
from serving_bench import client
from serving_bench.server import ServerError, compilations, end_servers_with_this_process, server, start_phases
from serving_bench.warm_plan import plan


def drive(base_url: str, groups: list, seed: int, limit_s: float = math.inf) -> dict[str, float]:
    """Send each group of requests together, one after another, none after ``limit_s``.

    Returns:
        Groups and requests sent, of how many groups, seconds in all and of the slowest group.
    """
    began, slowest, sent = time.monotonic(), 0.0, 0
    for number, group in enumerate(groups):
        started = time.monotonic()
        if started - began > limit_s:
            break
        prompts = [client.prompt(length, seed * 100_000 + number * 1000 + i) for i, (length, _) in enumerate(group)]
        client.together(base_url, prompts, group[0][1])
        slowest, sent = max(slowest, time.monotonic() - started), number + 1
    return {
        "groups": sent,
        "of_groups": len(groups),
        "requests": sum(map(len, groups[:sent])),
        "seconds": round(time.monotonic() - began, 1),
        "slowest_group_s": round(slowest, 2),
    }


def warm(base_url: str, groups: list, log_text: Callable[[], str], root: Path) -> dict:
    """Two passes over ``groups``; what the second one compiles is what the plan does not cover."""
    before = caches.snapshot(root)
    first = drive(base_url, groups, 0)
    between, compiled = caches.snapshot(root), set(compilations(log_text()))
    second = drive(base_url, groups, 1)
    return {
        "first_pass": first
        | {"compiled": sorted(compiled), "files": caches.by_compiler(caches.changed(before, between))},
        "second_pass": second
        | {
            "compiled": sorted(set(compilations(log_text())) - compiled),
            "files": caches.by_compiler(caches.changed(between, caches.snapshot(root))),
        },
    }


def serve_and_warm(arguments: argparse.Namespace, groups: list, root: Path) -> dict:
    """Start the server, warm it, stop it."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        started = caches.snapshot(root)
        variables = caches.environment(root)
        running = server("warm-up", arguments.model, arguments.flags, directory, environment=variables)
        with running:
            running.start(arguments.timeout)
            ready = caches.snapshot(root)
            report = {
                "ready_s": round(running.ready_seconds, 1),
                "phases": start_phases(directory / "warm-up-status"),
                "start_files": caches.by_compiler(caches.changed(started, ready)),
                **warm(running.base_url, groups, running.text, root),
                "facts": running.facts(),
            }
        return report


def show(report: dict) -> str:
    """The report for people."""
    lines = []
    if "ready_s" in report:
        lines.append(f"ready after {report['ready_s']} s")
        lines += [f"  {name}: {seconds:.1f} s" for name, seconds in report["phases"].items()]
        lines += ["compiled until ready:", caches.table(report["start_files"])]
    for key, title in (("first_pass", "first pass"), ("second_pass", "second pass")):
        p = report[key]
        lines.append(f"{title}: {p['requests']} requests in {p['seconds']} s, slowest group {p['slowest_group_s']} s")
        lines += [f"  {line}" for line in p["compiled"]]
        lines += [caches.table(p["files"])] if p["files"] else []
    return "\n".join(lines)


def main() -> int:
    """Warm, report, and judge the second pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="checkpoint directory")
    where.add_argument("--url", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--root", type=Path, help="of the caches; default: MEGA_MOE_CACHE_DIR, else ~/.cache/mega-moe")
    parser.add_argument("--max-batched-tokens", type=int, default=8192, help="the server's --max-num-batched-tokens")
    parser.add_argument("--max-sequences", type=int, default=128, help="the server's --max-num-seqs")
    parser.add_argument("--max-length", type=int, help="the server's --max-model-len; with --url it is asked")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until the server must be ready")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("flags", nargs="*", help="the server's flags, after --")
    arguments = parser.parse_args()
    end_servers_with_this_process()
    root = (arguments.root or caches.default_root()).expanduser().absolute()
    for flag, value in (("--max-num-batched-tokens", "max_batched_tokens"), ("--max-num-seqs", "max_sequences"),
                        ("--max-model-len", "max_length")):  # fmt: skip
        if flag in arguments.flags:
            setattr(arguments, value, int(arguments.flags[arguments.flags.index(flag) + 1]))
    try:
        if arguments.url:
            length = arguments.max_length or client.model(arguments.url)["max_model_len"]
            groups = plan(arguments.max_batched_tokens, arguments.max_sequences, length)
            report = warm(arguments.url, groups, str, root)
        else:
            groups = plan(arguments.max_batched_tokens, arguments.max_sequences, arguments.max_length or 8192)
            report = serve_and_warm(arguments, groups, root)
    except (ServerError, OSError, ValueError) as error:
        print(f"warm_up: {error}", file=sys.stderr)
        return 2
    print(show(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    again = report["second_pass"]
    if again["compiled"] or again["files"]:
        print("the second pass compiled again: the plan misses shapes, or a compiler keeps no cache", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
