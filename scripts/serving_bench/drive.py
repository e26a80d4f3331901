"""Sends groups of requests to a server, one group after another, as a warm-up does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from serving_bench import client
from serving_bench.warm_plan import Group


def drive(
    base_url: str,
    groups: list[Group],
    seed: int,
    limit_s: float = math.inf,
    *,
    engines: int = 1,
    key: str | None = None,
    progress: Callable[[int], bool] = lambda sent: True,
) -> dict[str, float]:
    """Send each group of requests together, one after another, none after ``limit_s``.

    Args:
        groups: (prompt tokens, output tokens) of requests that belong together; the plan's.
        seed: other prompts for another seed, so that no prefix is found again.
        engines: data-parallel engines behind ``base_url``; each group is sent so many times at once, because the
            server spreads requests evenly, and every engine has to see the shapes.
        key: the API's key.
        progress: called before each group with the number of groups sent; False ends the drive.

    Returns:
        Groups and requests sent, of how many groups, seconds in all and of the slowest group.

    Raises:
        ServerError: the server refused, dropped or did not answer a request in time.
    """
    began, slowest, sent = time.monotonic(), 0.0, 0
    for number, group in enumerate(groups):
        started = time.monotonic()
        if not progress(number) or started - began > limit_s:
            break
        lengths = [length for length, _ in group for _ in range(engines)]
        prompts = [client.prompt(length, seed * 100_000 + number * 1000 + i) for i, length in enumerate(lengths)]
        client.together(base_url, prompts, group[0][1], key)
        slowest, sent = max(slowest, time.monotonic() - started), number + 1
    return {
        "groups": sent,
        "of_groups": len(groups),
        "requests": engines * sum(map(len, groups[:sent])),
        "seconds": round(time.monotonic() - began, 1),
        "slowest_group_s": round(slowest, 2),
    }
