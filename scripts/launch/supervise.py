"""Runs the server as a child: hands signals on, reaps orphans as process 1 must, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

# vLLM shuts down in order, with status 0, also when a rank has died. Only an end that was asked for is one.
ENDED_UNTOLD = 11
_ORDERS = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Runs children one after the other. From its making on, SIGTERM and SIGINT go to the child that runs."""

    def __init__(self) -> None:
        self.told = False
        self._child: subprocess.Popen[bytes] | None = None
        for number in _ORDERS:
            signal.signal(number, self._hand_on)

    def run(
        self,
        command: list[str],
        environment: dict[str, str],
        beside: Callable[[Supervisor], None] | None = None,
    ) -> int:
        """Run ``command`` to its end; return its status, negative for a signal. Nothing runs after an order.

        ``beside`` runs in a thread once the child has started. No thread may run before: the child is forked.
        """
        # A session of its own: Ctrl-C in a terminal then reaches the server once, through us.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)
        try:
            if self.told:
                return 0
            child = self._child = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=_unblock
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
        if beside is not None:
            threading.Thread(target=beside, args=(self,), name="beside the child", daemon=True).start()
        try:
            return _wait(child.pid)
        finally:
            self._child = None
            # The session's other processes have lost their server: a rank left alone would keep its GPU.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)

    def exit_code(self, status: int) -> int:
        """The exit code for the server's ``status``, as docs/operations.md lists them."""
        if self.told and (status == 0 or -status in _ORDERS):
            return 0
        if status == 0:
            print(
                "[entrypoint] the server ended by itself with status 0: a rank died or failed; the log above and the "
                f"status service say which. Ending with status {ENDED_UNTOLD}",
                file=sys.stderr,
                flush=True,
            )
            return ENDED_UNTOLD
        return 128 - status if status < 0 else status

    def end(self, kill: bool = False) -> None:
        """Tell the running child to end, or kill its session; from any thread. This is no order: ``told`` stays."""
        child = self._child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL) if kill else os.kill(child.pid, signal.SIGTERM)

    def _hand_on(self, number: int, _frame: object) -> None:
        self.told = True
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, number)


def _wait(pid: int) -> int:
    """Reap every child until ``pid`` has ended; as process 1 we inherit the orphans."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
