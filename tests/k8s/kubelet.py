"""What a kubelet does with a container's probes, in steps of a second of simulated time.

https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/: until the startup probe has
succeeded once, the other probes do not run; failureThreshold failures in a row of the startup or liveness probe end the
container, which then gets the probe's own grace period and is started again; readiness only decides about requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[int | str, str, float], bool]


@dataclass
class Kubelet:
    """Probes ``container`` of a pod with ``answer(port, path, time)``; ``restart(time)`` is told of every restart."""

    container: dict[str, Any]
    answer: Answer
    restart: Callable[[float], None]
    ready: bool = False
    restarts: list[tuple[float, str]] = field(default_factory=list)
    _began: float = 0.0
    _started: bool = False
    _started_at: float = 0.0
    _failures: dict[str, int] = field(default_factory=dict)

    def run(self, until: float) -> None:
        """From the start of the container to time ``until`` (s)."""
        for now in range(int(self._began), int(until)):
            self._second(float(now))

    def _second(self, now: float) -> None:
        if now < self._began:
            return  # the old container is still being ended
        if not self._started:
            if "startupProbe" in self.container:
                self._probe("startupProbe", now, self._began)
            else:
                self._started, self._started_at = True, now
            return
        if "livenessProbe" in self.container:
            self._probe("livenessProbe", now, self._started_at)
        if now >= self._began and "readinessProbe" in self.container:
            self._probe("readinessProbe", now, self._started_at)

    def _probe(self, name: str, now: float, since: float) -> None:
        probe = self.container[name]
        if (now - since) % probe.get("periodSeconds", 10):
            return
        asked = probe["httpGet"]
        if self.answer(asked["port"], asked["path"], now):
            self._failures[name] = 0
            if name == "startupProbe":
                self._started, self._started_at = True, now
            self.ready = self.ready or name == "readinessProbe"
            return
        self._failures[name] = self._failures.get(name, 0) + 1
        if self._failures[name] < probe.get("failureThreshold", 3):
            return
        if name == "readinessProbe":
            self.ready = False
            return
        self.restarts.append((now, name))
        self._began = now + probe.get("terminationGracePeriodSeconds", 30)
        self._started, self.ready, self._failures = False, False, {}
        self.restart(self._began)
