#!/usr/bin/env python3
"""Watch the ranks of a starting server: a log line every few seconds, a page, JSON, Prometheus metrics, probe answers.

Runs beside the server as a process of its own, which no GIL and no CUDA call can hold up, and imports neither torch nor
vLLM. docs/startup.md describes the endpoints. Ends with status 0 on SIGTERM and SIGINT.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from status.collector import Collector
from status.estimate import History
from status.health import HealthPoll
from status.judge import PROGRESSING, Limits
from status.phases import READY
from status.rank_files import RankFiles
from status.server import Server
from status.text import compiled, line

DEFAULT_DIRECTORY = "/dev/shm/mega-moe-status"

logger = logging.getLogger("startup")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    limits = Limits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directory = os.environ.get("MEGA_MOE_STATUS_DIR", DEFAULT_DIRECTORY)
    # The ranks do not report then; the server's health can be followed all the same.
    directory = DEFAULT_DIRECTORY if directory == "0" else directory
    parser.add_argument("--dir", type=Path, default=directory, help="directory of the ranks' files (%(default)s)")
    parser.add_argument(
        "--run-id", default=os.environ.get("MEGA_MOE_RUN_ID") or None, help="this run only (the newest)"
    )
    parser.add_argument("--ranks", type=int, help="ranks on this host (what the ranks say)")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="port to listen on, 0 for any (%(default)s)")
    parser.add_argument("--health-url", help="the server's /health: ready only while it answers 200")
    parser.add_argument("--history", type=Path, help="file for the phases' durations, for the next start's estimate")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between looks (%(default)s)")
    parser.add_argument(
        "--log-every", type=float, default=10.0, help="at most so many seconds between lines (%(default)s)"
    )
    parser.add_argument(
        "--stall-after",
        type=float,
        default=limits.stall_after_s,
        help="seconds without movement of any rank, or with one stopped by a signal, that are a stall (%(default)s)",
    )
    parser.add_argument(
        "--rank-stall-after",
        type=float,
        default=limits.rank_stall_after_s,
        help="seconds without movement of one working rank, while others move, that are a stall (%(default)s)",
    )
    parser.add_argument(
        "--first-report-after",
        type=float,
        default=limits.first_report_after_s,
        help="seconds until a rank must have reported, 0 for ever (%(default)s)",
    )
    return parser.parse_args()


def watch(collector: Collector, stop: threading.Event, interval: float, log_every: float) -> None:
    """Look every ``interval`` seconds; log at changes, and while the server starts every ``log_every`` seconds."""
    logged_at, logged = float("-inf"), None
    while True:
        began = time.monotonic()
        snapshot = collector.look()
        seen = (
            snapshot.verdict.state,
            snapshot.ranks[0][0].run if snapshot.ranks else None,
            # Once it serves, each compilation is worth a line.
            compiled(snapshot) if snapshot.verdict.state == READY else None,
        )
        due = snapshot.verdict.state == PROGRESSING and began - logged_at >= log_every - interval
        if due or seen != logged:
            level = logging.INFO if snapshot.verdict.code != 500 else logging.ERROR
            logger.log(level, "%s", line(snapshot))
            logged_at, logged = began, seen
        if stop.wait(max(0.0, began + interval - time.monotonic())):
            return


def main() -> int:
    """Serve until a signal ends it."""
    options = arguments()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    collector = Collector(
        RankFiles(options.dir, options.run_id, time.time()),
        Limits(options.stall_after, options.rank_stall_after, options.first_report_after),
        options.ranks,
        HealthPoll(options.health_url) if options.health_url else lambda: None,
        History(options.history),
    )
    try:
        server = Server(options.host, options.port, collector)
    except OSError as error:
        logger.error("cannot listen on %s port %d: %s; choose another --port", options.host, options.port, error)
        return 1
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    logger.info("listening on %s port %d, watching %s", options.host, server.server_address[1], options.dir)
    watch(collector, stop, options.interval, options.log_every)
    server.shutdown()
    server.server_close()
    logger.info("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
