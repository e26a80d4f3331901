"""Runs beside the server in a thread: waits until it answers, sends the warm-up requests, then lets /health say so.

All the while it counts what the compilers add to their caches, until ready, by the warm-up, and while it serves: the
second start of a server must add nothing. docs/operations.md describes the settings, docs/startup.md what is told.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

from serving_bench.probe import answers
from status.phases import READY, WARM_UP
from status.rank_files import RankFiles
from status.server_files import SERVING

from . import compiled, start_report
from .flags import Api
from .warming import Setting, hold_variable

ASK_EVERY_S = 1.0
LOOK_EVERY_S = 60.0
# A look at the caches may take this share of the time, on a slow file system.
_LOOK_SHARE = 0.01
# How long the end of a server may take to show after it has dropped a request, and after it was told to end.
_END_SHOWS_S = 15.0
_END_TAKES_S = 180.0
# The entrypoint's exit code for a server that was ended because of its warm-up.
UNANSWERED = 12


class Server(Protocol):
    """What the watch needs of the supervisor that runs the server."""

    told: bool

    def end(self, kill: bool = False) -> None:
        """Tell the server to end, or kill it with all that it started."""


class StartWatch:
    """One start: make it before the server starts, ``run`` it in a thread, ``stop`` it when the server has ended."""

    def __init__(self, api: Api, setting: Setting, cache: Path, status: Path | None, run_id: str | None = None) -> None:
        self.failed = False
        self._api, self._setting, self._status, self._run_id = api, setting, status, run_id
        self._began = time.time()
        self._ended = threading.Event()
        self._compiled = compiled.Compiled(cache)
        self._not_watched: list[str] = []
        self._warm_up = {"sent": 0, "of": 0, "seconds": 0.0, "strict": setting.strict, "error": None, "cut_off": False}
        self._report = start_report.StartReport(status, api.port)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._hold: Path | None = None
        if setting.send:
            self._hold = self._make_hold()
            self._report.tell(warm_up=self._warm_up)
        else:
            _say(f"no warm-up requests: {setting.why_not}")

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        """What the server needs beside ``settings``; the compilers that these send elsewhere are noted."""
        self._not_watched = compiled.unwatched(settings, self._compiled.root)
        if self._not_watched:
            _say(f"caches outside {self._compiled.root}, whose compilations are not counted: {self._not_watched}")
        return hold_variable(self._hold) if self._hold else {}

    def stop(self) -> None:
        """The server has ended."""
        self._ended.set()
        self._report.close()
        if self._hold:
            self._hold.unlink(missing_ok=True)
        if self._scratch:
            self._scratch.cleanup()

    def run(self, server: Server) -> None:
        """Watch until ``stop``. Whatever goes wrong here, the server is either ready or ended, never held for good."""
        self._report.beat()
        try:
            if not self._wait_until_up():
                return
            self._account(compiled.START)
            _say(f"compiled this start until the server answers: {compiled.text(self._compiled.stages['start'])}")
            if self._setting.send and not self._warm(server):
                return
        except Exception as error:
            _say(f"the watch over this start failed, the server is left as it is: {type(error).__name__}: {error}")
        self._let_go()
        pause = LOOK_EVERY_S
        while not self._ended.wait(pause):
            looked = time.monotonic()
            if new := self._account(compiled.SERVING):
                _say(f"compiled after ready: {compiled.text(new)}; the warm-up does not cover what users send")
            pause = max(LOOK_EVERY_S, (time.monotonic() - looked) / _LOOK_SHARE)

    def _wait_until_up(self) -> bool:
        """Wait until the API answers, or a worker's ranks are ready; False if the server ends before."""
        files = RankFiles(self._status, self._run_id, self._began) if self._api.headless and self._status else None
        while not self._ended.wait(ASK_EVERY_S):
            if files is None and answers(f"{self._api.base_url}/v1/models", self._api.key):
                return True
            ranks = files.read() if files is not None else []
            if ranks and len(ranks) >= ranks[0].ranks_here and all(rank.phase == READY for rank in ranks):
                return True
        return False

    def _warm(self, server: Server) -> bool:
        """Send the requests; False if the server has ended, or has to because it did not answer them."""
        from serving_bench import client
        from serving_bench.drive import drive
        from serving_bench.server import ServerError
        from serving_bench.warm_plan import plan

        api, began = self._api, time.monotonic()

        def progress(sent: int) -> bool:
            self._tell_warm_up(sent=sent, seconds=round(time.monotonic() - began, 1))
            return not self._ended.is_set()

        try:
            length = client.model(api.base_url, api.key)["max_model_len"]
            groups = plan(api.batched_tokens, api.sequences, length)
            self._tell_warm_up(of=len(groups))
            self._report.tell(phase=WARM_UP)
            _say(f"warm-up: {len(groups)} groups of requests, at most {self._setting.limit_s:.0f} s")
            found = drive(
                api.base_url, groups, 0, self._setting.limit_s, engines=api.engines, key=api.key, progress=progress
            )
        except (ServerError, ValueError, OSError) as error:
            return self._failed(server, str(error))
        if self._ended.is_set():
            return False
        cut_off = found["groups"] < len(groups)
        self._tell_warm_up(sent=found["groups"], seconds=found["seconds"], cut_off=cut_off)
        new = self._account(compiled.WARM_UP)
        took = f"{found['requests']} requests in {found['seconds']} s, slowest group {found['slowest_group_s']} s"
        _say(f"warm-up: {took}; compiled by them: {compiled.text(new)}")
        if cut_off:
            _say(
                f"warm-up cut off by MEGA_MOE_WARM_UP_SECONDS={self._setting.limit_s:.0f} after {found['groups']} of "
                f"{len(groups)} groups: what is left compiles with users' requests, or at the next start's warm-up"
            )
        return True

    def _failed(self, server: Server, why: str) -> bool:
        """A request failed: the server may just be ending; else say so, and in mode strict end it."""
        if server.told or self._ended.wait(_END_SHOWS_S):
            return False
        why = f"the warm-up requests failed: {why}"
        self._tell_warm_up(error=why)
        self._account(compiled.WARM_UP)
        if not self._setting.strict:
            _say(f"{why}; MEGA_MOE_WARM_UP=report: it serves all the same")
            return True
        _say(f"{why}; the server is ended. Its log above says more; MEGA_MOE_WARM_UP=report would serve all the same")
        self.failed = True
        self._report.refuse(why)
        server.end()
        if not self._ended.wait(_END_TAKES_S):
            server.end(kill=True)
        return False

    def _let_go(self) -> None:
        if self._hold:
            self._hold.unlink(missing_ok=True)
        self._report.tell(phase=SERVING)

    def _account(self, stage: str) -> compiled.Counts:
        new = self._compiled.account(stage)
        told = {"root": str(self._compiled.root), "not_watched": self._not_watched, **self._compiled.stages}
        self._report.tell(compiled=told)
        return new

    def _tell_warm_up(self, **changes: object) -> None:
        self._warm_up = self._warm_up | changes
        self._report.tell(warm_up=self._warm_up)

    def _make_hold(self) -> Path:
        """The file that keeps /health at 503, beside the status files, or in a directory of its own."""
        if self._status is not None:
            hold = self._status / f"server-{self._api.port}.hold"
            with contextlib.suppress(OSError):
                hold.touch()
                return hold
        self._scratch = tempfile.TemporaryDirectory(prefix="mega-moe-")
        hold = Path(self._scratch.name, "hold")
        hold.touch()
        return hold


def _say(text: str) -> None:
    print(f"[entrypoint] {text}", file=sys.stderr, flush=True)
