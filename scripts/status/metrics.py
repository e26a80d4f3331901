"""The snapshot as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as MetricsCollector

from .collector import Snapshot
from .judge import STATES
from .rank_files import UNITS
from .server_files import STAGES

_PREFIX = "mega_moe_startup"


def exposition(snapshot: Callable[[], Snapshot]) -> Callable[[], bytes]:
    """Return a function that renders the newest of ``snapshot()`` in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(snapshot))
    return lambda: generate_latest(registry)


class _Families(MetricsCollector):
    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        state = GaugeMetricFamily(f"{_PREFIX}_state", "1 for the state that the start-up is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == snapshot.verdict.state))
        yield state
        yield _single("elapsed_seconds", "Time from the first rank's start to readiness, or to now", snapshot.elapsed_s)
        if snapshot.eta_s is not None:
            yield _single("eta_seconds", "Estimated time until readiness", snapshot.eta_s)
        if snapshot.expected is not None:
            yield _single("ranks_expected", "Ranks that this host should have", snapshot.expected)
        yield from _rank_families(snapshot)
        yield from _server_families(snapshot)


def _single(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"{_PREFIX}_{name}", text)
    family.add_metric([], float(value))
    return family


def _rank_families(snapshot: Snapshot) -> Iterable[Metric]:
    def family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{_PREFIX}_rank_{name}", text, labels=["rank", *labels])

    up = family("up", "1 while the rank's process lives")
    phase = family("phase", "1 for the phase that the rank is in", "phase")
    silent = family("silent_seconds", "Time since the rank last made progress, did I/O or used CPU time")
    heartbeat = family("heartbeat_age_seconds", "Time since the rank last wrote its status")
    seconds = family("phase_seconds", "Time that the rank has spent in a phase", "phase")
    done = family("done", "Amount of a unit done in a phase", "phase", "unit")
    total = family("total", "Amount of a unit to do in a phase", "phase", "unit")
    for status, movement in snapshot.ranks:
        rank = str(status.rank)
        up.add_metric([rank], float(status.alive))
        phase.add_metric([rank, status.phase], 1.0)
        silent.add_metric([rank], max(0.0, snapshot.monotonic - movement.moved_at))
        heartbeat.add_metric([rank], max(0.0, snapshot.at - status.heartbeat))
        for each in status.phases:
            seconds.add_metric([rank, each.name], each.seconds)
            for unit in UNITS:
                if each.total.get(unit):
                    done.add_metric([rank, each.name, unit], float(each.done.get(unit, 0)))
                    total.add_metric([rank, each.name, unit], float(each.total[unit]))
    return (up, phase, silent, heartbeat, seconds, done, total)


def _server_families(snapshot: Snapshot) -> Iterable[Metric]:
    def family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["port", *labels])

    sent = family("warm_up_groups_sent", "Groups of warm-up requests that were answered")
    total = family("warm_up_groups", "Groups of warm-up requests to send")
    seconds = family("warm_up_seconds", "Time that the warm-up requests have taken")
    failed = family("warm_up_failed", "1 if a warm-up request failed and the server serves all the same")
    files = family("compiled_files", "Files that compilers added to the caches this start", "stage", "compiler")
    for server in snapshot.servers:
        port = str(server.port)
        if (warm_up := server.warm_up) is not None:
            sent.add_metric([port], float(warm_up.sent))
            total.add_metric([port], float(warm_up.of))
            seconds.add_metric([port], warm_up.seconds)
            failed.add_metric([port], float(warm_up.error is not None))
        for stage in STAGES if server.compiled is not None else ():
            counts = server.compiled.get(stage, {})
            for compiler, amount in counts.items():
                files.add_metric([port, stage, compiler], float(amount["files"]))
            # So that a start that compiled nothing is told from one of which nothing is known.
            files.add_metric([port, stage, "all"], float(sum(amount["files"] for amount in counts.values())))
    return (sent, total, seconds, failed, files)
