"""Each check is seen to fail: one fault planted in a rendered overlay, and the check that must name it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from . import schemas, serving, wiring
from .objects import Object, of_kind
from .render import build_case

NODE, GROUP, DEMO = "single-node-8xh200, monitored", "multi-node-lws", "cpu-demo"
_DELETED = object()


class Fault(NamedTuple):
    """In the object ``kind/name`` of ``case``, ``path`` becomes ``value``; ``check`` says ``text``.

    A part of ``path`` that is in a list is a number, an item's name, or how an item begins.
    """

    name: str
    case: str
    target: str
    path: str
    value: object
    check: Callable[[list[Object]], Iterator[str] | list[str]]
    text: str


_POD = "spec.template.spec."
_SERVER, _STATUS = _POD + "containers.server.", _POD + "initContainers.status."
_LEADER, _WORKER = (f"spec.leaderWorkerTemplate.{role}Template.spec." for role in ("leader", "worker"))
_SET, _LWS = "StatefulSet/deepseek-v4", "LeaderWorkerSet/deepseek-v4-group"
_API, _PAGE, _OUR = "Service/deepseek-v4", "Service/deepseek-v4-status", "deepseek-v4"
_OTHER = {"app.kubernetes.io/name": "other"}

FAULTS = [
    # schemas
    Fault("field", NODE, _SET, _SERVER + "startupProbe.failureTreshold", 3, schemas.problems, "failureTreshold"),
    Fault("type", NODE, _SET, "spec.replicas", "one", schemas.problems, "spec.replicas"),
    Fault("version", NODE, f"PodDisruptionBudget/{_OUR}", "apiVersion", "policy/v1beta1", schemas.problems, "has no"),
    Fault("policy field", NODE, f"NetworkPolicy/{_OUR}", "spec.policyType", [], schemas.problems, "policyType"),
    Fault("LWS field", GROUP, _LWS, "spec.leaderWorkerTemplate.restartpolicy", "None", schemas.problems, "restartp"),
    Fault("LWS choice", GROUP, _LWS, "spec.startupPolicy", "LeaderStarted", schemas.problems, "LeaderStarted"),
    Fault("LWS pod", GROUP, _LWS, _WORKER + "shareProcessNamespaces", True, schemas.problems, "workerTemplate"),
    Fault(
        "LWS probe", GROUP, _LWS, _LEADER + "containers.server.livenessProbe.period", 5, schemas.problems, "leaderTempl"
    ),
    Fault(
        "LWS claim",
        GROUP,
        _LWS,
        "spec.leaderWorkerTemplate.volumeClaimTemplates.0.spec.accessMode",
        "ReadWriteOnce",
        schemas.problems,
        "claim",
    ),
    Fault("monitor", NODE, f"ServiceMonitor/{_OUR}", "spec.endpoints.0.path", "metrics", schemas.problems, "metrics"),
    # names and selectors
    Fault("twice", NODE, _PAGE, "metadata.name", "deepseek-v4", wiring.names, "2 times"),
    Fault("namespace", NODE, _API, "metadata.namespace", "default", wiring.names, "namespace default"),
    Fault("pod labels", NODE, _SET, "spec.template.metadata.labels", _OTHER, wiring.selectors, "its pods have"),
    Fault("service", NODE, _API, "spec.selector", _OTHER, wiring.selectors, "selects no pod"),
    Fault("budget", NODE, f"PodDisruptionBudget/{_OUR}", "spec.selector", _DELETED, wiring.selectors, "every pod"),
    Fault("policy", NODE, f"NetworkPolicy/{_OUR}", "spec.podSelector.matchLabels", _OTHER, wiring.selectors, "every"),
    Fault("monitor port", NODE, f"ServiceMonitor/{_OUR}", "spec.endpoints.1.port", "stats", wiring.selectors, "stats"),
    Fault("monitored", NODE, _PAGE, "metadata.labels", _OTHER, wiring.selectors, "scrapes"),
    Fault("job", NODE, f"ServiceMonitor/{_OUR}", "spec.jobLabel", _DELETED, wiring.selectors, "makes jobs"),
    Fault("API of a worker", GROUP, _API, "spec.selector", {"app.kubernetes.io/name": _OUR}, wiring.ports, "worker"),
    # ports
    Fault("target", NODE, _API, "spec.ports.0.targetPort", 8080, wiring.ports, "wants port 8080"),
    Fault("target name", NODE, _API, "spec.ports.0.targetPort", "api", wiring.ports, "wants port api"),
    Fault("probe", NODE, _SET, _SERVER + "livenessProbe.httpGet.port", 8002, wiring.ports, "8002"),
    Fault("probe's name", NODE, _SET, _SERVER + "livenessProbe.httpGet.port", "status", wiring.ports, "port status"),
    Fault("policy port", NODE, f"NetworkPolicy/{_OUR}", "spec.ingress.1.ports.1.port", 9001, wiring.ports, "8001"),
    # volumes and services
    Fault("mount", NODE, _SET, _SERVER + "volumeMounts.caches.name", "cache", wiring.volumes, "no volume cache"),
    Fault("path twice", NODE, _SET, _SERVER + "volumeMounts.shm.mountPath", "/cache", wiring.volumes, "2 volumes"),
    Fault("unused", NODE, _SET, "spec.volumeClaimTemplates.0.metadata.name", "cachez", wiring.volumes, "nobody"),
    Fault(
        "writable", NODE, _SET, _SERVER + "volumeMounts.weights.readOnly", _DELETED, wiring.volumes, "mounted writable"
    ),
    Fault(
        "claim", NODE, "PersistentVolumeClaim/deepseek-v4-weights", "metadata.name", "w", wiring.volumes, "not there"
    ),
    Fault("headless", NODE, _PAGE, "spec.clusterIP", _DELETED, wiring.services, "headless"),
    Fault("hidden", NODE, _PAGE, "spec.publishNotReadyAddresses", False, wiring.services, "hides"),
    Fault("quantity", NODE, _SET, _SERVER + "resources.limits.memory", "512Gigs", wiring.quantities, "512Gigs"),
    Fault("size", DEMO, _SET, _POD + "volumes.shm.emptyDir.sizeLimit", "1 Gi", wiring.quantities, "1 Gi"),
    # security
    Fault("root", NODE, _SET, _POD + "securityContext.runAsUser", 0, wiring.security, "runAsNonRoot"),
    Fault("seccomp", NODE, _SET, _POD + "securityContext.seccompProfile", _DELETED, wiring.security, "seccomp"),
    Fault("IPC", NODE, _SET, _POD + "hostIPC", True, wiring.security, "hostIPC"),
    Fault(
        "capability", GROUP, _LWS, _WORKER + "containers.server.securityContext", {}, wiring.security, "capabilities"
    ),
    Fault("sidecar", NODE, _SET, _STATUS + "securityContext.privileged", True, wiring.security, "privileged"),
    Fault("token", NODE, _SET, _POD + "automountServiceAccountToken", True, wiring.security, "token"),
    Fault("level", NODE, f"Namespace/{_OUR}", "metadata.labels", {}, wiring.security, "restricted"),
    # flags, variables, programs
    Fault("flag", NODE, _SET, _SERVER + "args.--tensor", "--tensor-paralel-size=8", serving.flags, "--tensor-paralel"),
    Fault("flag's type", NODE, _SET, _SERVER + "args.--tensor", "--tensor-parallel-size=eight", serving.flags, "eight"),
    Fault("parser", NODE, _SET, _SERVER + "args.--tokenizer-mode", "--tokenizer-mode", serving.flags, "tokenizer-mode"),
    Fault(
        "unset",
        GROUP,
        _LWS,
        _LEADER + "containers.server.args.--served",
        "--host=$(POD_IP)",
        serving.flags,
        "$(POD_IP)",
    ),
    Fault(
        "variable",
        NODE,
        _SET,
        _SERVER + "env.VLLM_ENGINE_READY_TIMEOUT_S.name",
        "VLLM_READY_TIMEOUT",
        serving.variables,
        "VLLM_READY_TI",
    ),
    Fault(
        "our variable",
        NODE,
        _SET,
        _SERVER + "env.MEGA_MOE_CACHE_DIR.name",
        "MEGA_MOE_CACHES",
        serving.variables,
        "MEGA_MOE_CACHES",
    ),
    Fault("links", NODE, _SET, _POD + "enableServiceLinks", True, serving.variables, "enableServiceLinks"),
    Fault("versions", NODE, _SET, _STATUS + "image", "deepseek-v4-nvfp4:0.0.9", serving.programs, "different versions"),
    Fault("script", NODE, _SET, _STATUS + "command.1", "/opt/nvfp4-megamoe/scripts/st.py", serving.programs, "st.py"),
    # GPUs, memory, the end
    Fault("requests", NODE, _SET, _SERVER + "resources.requests", {}, serving.accelerators, "None nvidia.com/gpu"),
    Fault(
        "GPUs",
        NODE,
        _SET,
        _SERVER + "resources",
        {key: {"memory": "512Gi", "nvidia.com/gpu": "4"} for key in ("limits", "requests")},
        serving.accelerators,
        "8 ranks on 4 GPUs",
    ),
    Fault(
        "experts",
        NODE,
        _SET,
        _SERVER + "args.--enable-expert",
        "--enforce-eager",
        serving.accelerators,
        "expert-parallel",
    ),
    Fault(
        "shm size", NODE, _SET, _POD + "volumes.shm.emptyDir.sizeLimit", "4Gi", serving.accelerators, "8 GiB or more"
    ),
    Fault("shm medium", NODE, _SET, _POD + "volumes.shm.emptyDir.medium", "", serving.accelerators, "expected memory"),
    Fault("shm share", NODE, _SET, _POD + "volumes.shm.emptyDir.sizeLimit", "1Ti", serving.accelerators, "counts as"),
    Fault("no limit", NODE, _SET, _STATUS + "resources", {}, serving.accelerators, "no limit of memory"),
    Fault("grace", NODE, _SET, _POD + "terminationGracePeriodSeconds", 100, serving.the_end, "killed after 100"),
    Fault("abort", NODE, _SET, _SERVER + "args.--shutdown", "--shutdown-timeout=0", serving.the_end, "aborted"),
    Fault("no pause", NODE, _SET, _SERVER + "lifecycle", {}, serving.the_end, "preStop 0"),
    # status service
    Fault("sidecar's kind", NODE, _SET, _STATUS + "restartPolicy", _DELETED, serving.status_service, "native sidecar"),
    Fault("processes", NODE, _SET, _POD + "shareProcessNamespace", _DELETED, serving.status_service, "processes"),
    Fault("user", NODE, _SET, _STATUS + "securityContext.runAsUser", 1000, serving.status_service, "another user"),
    Fault(
        "directory",
        NODE,
        _SET,
        _SERVER + "env.MEGA_MOE_STATUS_DIR.value",
        "/run/status",
        serving.status_service,
        "directories",
    ),
    Fault("volume", NODE, _SET, _STATUS + "volumeMounts.status.name", "shm", serving.status_service, "directories"),
    Fault(
        "caches",
        NODE,
        _SET,
        _SERVER + "env.MEGA_MOE_CACHE_DIR.value",
        "/caches",
        serving.status_service,
        "no volume for caches",
    ),
    Fault(
        "history", NODE, _SET, _STATUS + "args.--history", "--history=/tmp/x.json", serving.status_service, "not kept"
    ),
    Fault("health", NODE, _SET, _STATUS + "args.--health", "--log-every=5", serving.status_service, "asks None"),
    Fault(
        "server port", NODE, _SET, _SERVER + "args.--tensor", "--port=8080", serving.status_service, "127.0.0.1:8080"
    ),
    # the group
    Fault("size", GROUP, _LWS, "spec.leaderWorkerTemplate.size", 3, serving.group, "3 pods of 8"),
    Fault("order", GROUP, _LWS, "spec.startupPolicy", "LeaderReady", serving.group, "startupPolicy"),
    Fault(
        "headless leader",
        GROUP,
        _LWS,
        _LEADER + "containers.server.args.--served",
        "--headless",
        serving.group,
        "leader True",
    ),
    Fault("first rank", GROUP, _LWS, _WORKER + "containers.server.command", _DELETED, serving.group, "worker 1 None"),
    Fault(
        "address",
        GROUP,
        _LWS,
        _WORKER + "containers.server.args.--data-parallel-address",
        "--data-parallel-address=127.0.0.1",
        serving.group,
        "data_parallel_address",
    ),
    Fault(
        "waits first",
        GROUP,
        _LWS,
        _LEADER + "initContainers.wait-for-group.name",
        "status",
        serving.group,
        "init containers",
    ),
    Fault("service's name", GROUP, _LWS, "metadata.name", _OUR, serving.group, "Service/deepseek-v4"),
    Fault("traffic", GROUP, f"NetworkPolicy/{_OUR}-group", "spec.egress", [], serving.group, "egress"),
]


def _index(node: Any, key: str) -> str | int:
    if isinstance(node, dict) or key.isdecimal():
        return key if isinstance(node, dict) else int(key)
    (index,) = (
        number
        for number, item in enumerate(node)
        if (item["name"] == key if isinstance(item, dict) else item.startswith(key))
    )
    return index


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_is_found(fault: Fault, rendered: Callable[[str], list[Object]]) -> None:
    broken = copy.deepcopy(rendered(fault.case))
    kind, name = fault.target.split("/")
    (target,) = (each for each in of_kind(broken, kind) if each["metadata"]["name"] == name)
    *parents, last = fault.path.split(".")
    node = target
    for key in parents:
        node = node[_index(node, key)]
    if fault.value is _DELETED:
        del node[last]
    else:
        node[_index(node, last)] = fault.value
    assert not any(fault.text in problem for problem in fault.check(rendered(fault.case)))
    problems = list(fault.check(broken))
    assert any(fault.text in problem for problem in problems), problems


def test_every_check_has_a_fault() -> None:
    assert {*wiring.CHECKS, *serving.CHECKS, schemas.problems} == {fault.check for fault in FAULTS}


def test_a_kustomization_that_cannot_be_rendered_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "manifests" / "overlays" / "cpu-demo").mkdir(parents=True)
    (tmp_path / "manifests" / "overlays" / "cpu-demo" / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(AssertionError, match=r"missing\.yaml"):
        build_case("cpu-demo", tmp_path / "out", tmp_path / "manifests")
