#!/usr/bin/env python3
"""Fill the compile caches before users come: serve once as the server will serve, drive every shape, and stop.

    warm_up.py --model /models/dsv4 -- --tensor-parallel-size 8 --enable-expert-parallel --max-num-seqs 128

Everything after ``--`` goes to the server, and must be what it will serve with: kernels depend on geometry, ranks and
flags. The caches lie below MEGA_MOE_CACHE_DIR (scripts/cache_environment.py). The report has the duration of each
phase, what every compiler added, and what a second pass over the same shapes still compiled: if anything, status 1.
``--nothing-compiles`` asks more, and is for the second start: nothing at all may be added, from the first process on.

``--url`` drives a running server, and starts and stops nothing. scripts/entrypoint.py sends the same requests.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cache_environment as caches
from launch import flags
from serving_bench import client
from serving_bench.drive import drive
from serving_bench.server import ServerError, compilations, end_servers_with_this_process, server, start_phases
from serving_bench.warm_plan import Group, plan


def warm(
    base_url: str,
    groups: list[Group],
    log_text: Callable[[], str],
    root: Path,
    engines: int = 1,
    limit_s: float = math.inf,
) -> dict:
    """Two passes over ``groups``, each for ``limit_s``; what the second one compiles the plan does not cover."""
    before = caches.snapshot(root)
    first = drive(base_url, groups, 0, limit_s, engines=engines)
    between, compiled = caches.snapshot(root), set(compilations(log_text()))
    second = drive(base_url, groups[: int(first["groups"])], 1, limit_s, engines=engines)
    return {
        "first_pass": first | {"compiled": sorted(compiled), "files": caches.compiled_between(before, between)},
        "second_pass": second
        | {
            "compiled": sorted(set(compilations(log_text())) - compiled),
            "files": caches.compiled_between(between, caches.snapshot(root)),
        },
    }


def serve_and_warm(arguments: argparse.Namespace, root: Path) -> dict:
    """Start the server, warm it, stop it."""
    api = flags.read([str(arguments.model), *arguments.flags]).api
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        started = caches.snapshot(root)
        variables = caches.environment(root)
        running = server("warm-up", arguments.model, arguments.flags, directory, environment=variables)
        with running:
            running.start(arguments.timeout)
            ready = caches.snapshot(root)
            groups = plan(api.batched_tokens, api.sequences, client.model(running.base_url)["max_model_len"])
            return {
                "ready_s": round(running.ready_seconds, 1),
                "phases": start_phases(directory / "warm-up-status"),
                "start_files": caches.compiled_between(started, ready),
                **warm(running.base_url, groups, running.text, root, api.engines, arguments.pass_seconds),
                "facts": running.facts(),
            }


def show(report: dict) -> str:
    """The report for people."""
    lines = []
    if "ready_s" in report:
        lines.append(f"ready after {report['ready_s']} s")
        lines += [f"  {name}: {seconds:.1f} s" for name, seconds in report["phases"].items()]
        lines += ["compiled until ready:", caches.table(report["start_files"])]
    for key, title in (("first_pass", "first pass"), ("second_pass", "second pass")):
        p = report[key]
        cut = "" if p["groups"] == p["of_groups"] else f" ({p['groups']} of {p['of_groups']} groups)"
        lines.append(
            f"{title}: {p['requests']} requests{cut} in {p['seconds']} s, slowest group {p['slowest_group_s']} s"
        )
        lines += [f"  {line}" for line in p["compiled"]]
        lines += [caches.table(p["files"])] if p["files"] else []
    return "\n".join(lines)


def judge(report: dict, nothing_compiles: bool) -> str | None:
    """What is wrong with a start that reports so; None if nothing is.

    In a first pass only files count: vLLM's monitor names each kernel that its process had not used, also a cached one.
    """
    first, again = report["first_pass"], report["second_pass"]
    if nothing_compiles and (report.get("start_files") or first["files"]):
        return "this start compiled: the caches were not full"
    if again["compiled"] or again["files"]:
        return "the second pass compiled again: the plan misses shapes, or a compiler keeps no cache"
    return None


def main() -> int:
    """Warm, report, and judge the second pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="checkpoint directory")
    where.add_argument("--url", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--root", type=Path, help="of the caches; default: MEGA_MOE_CACHE_DIR, else ~/.cache/mega-moe")
    for name, default in (("--max-num-batched-tokens", 8192), ("--max-num-seqs", 128)):
        parser.add_argument(name, type=int, default=default, help=f"with --url: the server's (default {default})")
    parser.add_argument("--pass-seconds", type=float, default=math.inf, help="none is sent after so many, in a pass")
    parser.add_argument("--nothing-compiles", action="store_true", help="status 1 if anything was compiled at all")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until the server must be ready")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("flags", nargs="*", help="the server's flags, after --")
    arguments = parser.parse_args()
    end_servers_with_this_process()
    root = (arguments.root or caches.default_root()).expanduser().absolute()
    try:
        if arguments.url:
            length = client.model(arguments.url)["max_model_len"]
            groups = plan(arguments.max_num_batched_tokens, arguments.max_num_seqs, length)
            report = warm(arguments.url, groups, str, root, limit_s=arguments.pass_seconds)
        else:
            report = serve_and_warm(arguments, root)
    except (ServerError, OSError, ValueError) as error:
        print(f"warm_up: {error}", file=sys.stderr)
        return 2
    print(show(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if complaint := judge(report, arguments.nothing_compiles):
        print(complaint, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
