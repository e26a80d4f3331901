"""What the checks ask of rendered objects: the pods that workloads make, their containers, labels and commands."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]

LWS = "leaderworkerset.sigs.k8s.io"
# As set by the LeaderWorkerSet controller in every container: pkg/utils/pod/pod_utils.go of kubernetes-sigs/lws
_LWS_VARIABLES = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")


@dataclass(frozen=True)
class Pod:
    """A pod as its controller makes it. ``claims``: claim templates; ``variables``: set by the controller."""

    name: str
    labels: dict[str, str]
    spec: Object
    claims: list[Object]
    variables: dict[str, str]

    @property
    def server(self) -> Object:
        return next(each for each in self.spec["containers"] if each["name"] == "server")

    @property
    def status(self) -> Object:
        return next(each for each in self.spec["initContainers"] if each["name"] == "status")

    def containers(self) -> Iterator[Object]:
        yield from self.spec.get("initContainers", ())
        yield from self.spec["containers"]

    def lasting(self) -> Iterator[Object]:
        """The containers that run as long as the pod does."""
        yield from (each for each in self.spec.get("initContainers", ()) if each.get("restartPolicy") == "Always")
        yield from self.spec["containers"]

    def ports(self) -> dict[int, str | None]:
        """Open ports and their names."""
        return {port["containerPort"]: port.get("name") for each in self.lasting() for port in each.get("ports", ())}


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def pods(objects: list[Object]) -> list[Pod]:
    """One pod for each way in which a workload makes pods."""
    found = []
    for each in of_kind(objects, "StatefulSet"):
        template = each["spec"]["template"]
        claims = each["spec"].get("volumeClaimTemplates", [])
        found.append(
            Pod(each["metadata"]["name"], template["metadata"].get("labels", {}), template["spec"], claims, {})
        )
    for each in of_kind(objects, "Job"):
        template = each["spec"]["template"]
        found.append(Pod(each["metadata"]["name"], template["metadata"]["labels"], template["spec"], [], {}))
    for each in of_kind(objects, "LeaderWorkerSet"):
        name, group = each["metadata"]["name"], each["spec"]["leaderWorkerTemplate"]
        for role, index in (("leader", 0), ("worker", 1)):
            template = group[f"{role}Template"]
            labels = {f"{LWS}/name": name, f"{LWS}/worker-index": str(index)}
            values = (f"{name}-0.{name}.ns", str(group["size"]), str(index))
            found.append(
                Pod(
                    f"{name} {role}",
                    template["metadata"].get("labels", {}) | labels,
                    template["spec"],
                    group.get("volumeClaimTemplates", []),
                    dict(zip(_LWS_VARIABLES, values, strict=True)),
                )
            )
    return found


def selected(selector: dict[str, str], found: list[Pod]) -> list[Pod]:
    """The pods that carry all labels of ``selector``."""
    return [pod for pod in found if selector.items() <= pod.labels.items()]


def environment(container: Object) -> dict[str, str]:
    """Variables with their values; a field's value is a stand-in."""
    return {each["name"]: each.get("value", "10.0.0.1") for each in container.get("env", ())}


def expand(text: str, variables: dict[str, str]) -> str:
    """Replace ``$(NAME)`` as the kubelet does: an unknown name stays as it is."""
    return re.sub(r"\$\(([^()]*)\)", lambda match: variables.get(match[1], match[0]), text)


def server_arguments(pod: Pod) -> list[str]:
    """What the entrypoint gets; a command of the manifest's own is run, with a stand-in for Python."""
    variables = environment(pod.server) | pod.variables
    arguments = [expand(each, variables) for each in pod.server.get("args", ())]
    command = [expand(each, variables) for each in pod.server.get("command", ())]
    if not command:
        return arguments
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "python3"
        stand_in.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        stand_in.chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        done = subprocess.run(
            [*command, *arguments], env=variables | {"PATH": path}, capture_output=True, text=True, check=True
        )
    script, *rest = done.stdout.split("\0")[:-1]
    assert script.endswith("/entrypoint.py"), f"{command} runs {script}"
    return rest
