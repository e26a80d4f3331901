"""The manifests' own probes, the status service's own judgement, a simulated kubelet and hours of simulated time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from .kubelet import Kubelet
from .objects import Object, pods
from .simulated_start import Limits, Start, World

MINUTE, HOUR = 60.0, 3600.0
# What docs/operations.md promises: a server in which nothing moves is started again within nine minutes.
PROMISE = 9 * MINUTE

Container = dict[str, Any]


@pytest.fixture(scope="module", params=["single-node-8xh200", "multi-node-lws"])
def server(request: pytest.FixtureRequest, rendered: Callable[[str], list[Object]]) -> Container:
    return pods(rendered(request.param))[0].server


def run(server: Container, world: World, until: float) -> Kubelet:
    kubelet = Kubelet(server, world.answer, world.restart)
    kubelet.run(until)
    return kubelet


def test_a_slow_load_lives_as_long_as_it_moves(server: Container) -> None:
    silent = Limits().stall_after_s - 10
    slow = World([Start(load_s=10 * HOUR, moves_every=silent)])
    kubelet = run(server, slow, 9.9 * HOUR)
    assert not kubelet.restarts and not kubelet.ready
    assert run(server, World([Start(load_s=10 * HOUR, moves_every=silent)]), 11 * HOUR).ready


@pytest.mark.parametrize("stalls_at", [100.0, 1000.0, 3 * HOUR])
def test_a_stalled_load_is_restarted_in_time_and_the_next_one_serves(server: Container, stalls_at: float) -> None:
    world = World([Start(stalls_at=stalls_at, load_s=4 * HOUR), Start(import_s=20 * MINUTE)])
    kubelet = run(server, world, stalls_at + 2 * HOUR)
    assert len(kubelet.restarts) == 1 and kubelet.ready
    restarted = kubelet.restarts[0][0] + server["livenessProbe"]["terminationGracePeriodSeconds"]
    assert Limits().stall_after_s < restarted - stalls_at <= PROMISE


@pytest.mark.parametrize("dies_at", [1000.0, 3000.0])
def test_a_dead_rank_whose_server_hangs_is_restarted(server: Container, dies_at: float) -> None:
    kubelet = run(server, World([Start(dies_at=dies_at), Start()]), 3 * HOUR)
    assert len(kubelet.restarts) == 1 and kubelet.ready
    assert kubelet.restarts[0][0] - dies_at <= 4 * MINUTE


def test_a_server_that_stops_to_answer_is_restarted(server: Container) -> None:
    kubelet = run(server, World([Start(unhealthy_at=HOUR), Start()]), 3 * HOUR)
    assert len(kubelet.restarts) == 1 and kubelet.ready
    assert kubelet.restarts[0][0] - HOUR <= PROMISE


@pytest.mark.parametrize("forgets", [True, False])
def test_a_server_that_never_reports_is_restarted(server: Container, forgets: bool) -> None:
    never = [Start(import_s=float("inf")), Start(import_s=float("inf"))]
    kubelet = run(server, World(never, forgets=forgets), 3 * HOUR)
    assert 2 <= len(kubelet.restarts) <= 5
    assert kubelet.restarts[0][0] <= Limits().first_report_after_s + PROMISE


def test_the_verdict_of_the_start_before_ends_no_start(server: Container) -> None:
    """Its dead ranks' files may be there until the new ranks have written theirs."""
    world = World([Start(dies_at=100.0), Start(import_s=29 * MINUTE)], forgets=False)
    kubelet = run(server, world, 3 * HOUR)
    assert len(kubelet.restarts) == 1 and kubelet.ready


@pytest.mark.parametrize("at", [500.0, HOUR])
def test_a_restart_of_the_status_service_restarts_no_server(server: Container, at: float) -> None:
    kubelet = run(server, World([Start()], service_away=lambda now: at <= now < at + 2 * MINUTE), 2 * HOUR)
    assert not kubelet.restarts and kubelet.ready


def _changed(server: Container, **probes: Any) -> Container:
    changed = copy.deepcopy(server)
    for name, change in probes.items():
        if change is None:
            del changed[name]
        else:
            changed[name] |= change
    return changed


def test_faulty_probes_are_found(server: Container) -> None:
    """What the checks above would see of the designs that suggest themselves."""
    page = {"httpGet": {"path": "/startupz", "port": 8001}}
    assert run(_changed(server, livenessProbe=page), World([Start()]), HOUR).restarts, "kills every load"
    bounded = _changed(server, startupProbe=page | {"failureThreshold": 360})
    assert run(bounded, World([Start(load_s=2 * HOUR)]), 2 * HOUR).restarts, "kills a slow load"
    stalled = run(bounded, World([Start(stalls_at=100.0)]), 2 * HOUR)
    assert stalled.restarts[0][0] > 100.0 + PROMISE, "leaves a stalled load alone until the bound"
    hasty = _changed(server, startupProbe=None)
    old = World([Start(dies_at=100.0), Start(import_s=29 * MINUTE)], forgets=False)
    assert len(run(hasty, old, HOUR).restarts) > 1, "kills by the verdict of the start before"
    nervous = _changed(server, livenessProbe={"failureThreshold": 3})
    away = World([Start()], service_away=lambda now: 500.0 <= now < 620.0)
    assert run(nervous, away, HOUR).restarts, "kills when the status service is restarted"


def test_the_service_restarts_sooner_than_the_server(rendered: Callable[[str], list[Object]]) -> None:
    for pod in pods(rendered("multi-node-lws")):
        own, liveness = pod.status["livenessProbe"], pod.server["livenessProbe"]
        service = own["periodSeconds"] * own["failureThreshold"] + 30
        assert liveness["periodSeconds"] * (liveness["failureThreshold"] - 1) > service + 60
