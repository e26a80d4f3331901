#!/usr/bin/env python3
"""Wait until the status service of every pod of this LeaderWorkerSet group answers; then all of them can start.

Reads LWS_LEADER_ADDRESS and LWS_GROUP_SIZE, which the LeaderWorkerSet controller sets. Exit status: 0 all answered,
1 not within --timeout, 2 the variables are missing or unusable.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

_ANSWER_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Ask the pods in turn until none is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8001, help="port of the status services (%(default)s)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds to wait at most (%(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two rounds (%(default)s)")
    parser.add_argument("--log-every", type=float, default=10.0, help="seconds between two lines (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        missing = members(os.environ)
    except ValueError as error:
        print(f"wait_for_group: {error}", file=sys.stderr)
        return 2
    size, began, logged = len(missing), time.monotonic(), float("-inf")
    while missing := [address for address in missing if not answers(address, options.port)]:
        waited = time.monotonic() - began
        if waited >= options.timeout:
            print(f"wait_for_group: after {waited:.0f} s no answer from {', '.join(missing)}", file=sys.stderr)
            return 1
        if waited - logged >= options.log_every:
            logged = waited
            print(f"{size - len(missing)} of {size} pods answer after {waited:.0f} s; not {missing[0]}", flush=True)
        time.sleep(options.interval)
    print(f"all {size} pods answer", flush=True)
    return 0


def members(environment: Mapping[str, str]) -> list[str]:
    """Addresses of the group's pods: the leader's ``set-0.domain``, and ``set-0-1.domain`` and on for the workers.

    Raises:
        ValueError: a variable is missing or cannot be used.
    """
    leader, size = environment.get("LWS_LEADER_ADDRESS", ""), environment.get("LWS_GROUP_SIZE", "")
    name, dot, domain = leader.partition(".")
    if not (name and dot and domain):
        raise ValueError(f"LWS_LEADER_ADDRESS is {leader!r}, expected pod.subdomain: run in a LeaderWorkerSet's pod")
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"LWS_GROUP_SIZE is {size!r}, expected 1 or more: run in a LeaderWorkerSet's pod")
    return [leader, *(f"{name}-{worker}.{domain}" for worker in range(1, int(size)))]


def answers(address: str, port: int) -> bool:
    """Whether the status service at ``address`` answers at all: 500 of a start before is an answer."""
    try:
        with urllib.request.urlopen(f"http://{address}:{port}/startup", timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
