"""Cross-checks that no schema makes: what refers to something, and whether that is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import yaml

from .objects import Object, Pod, of_kind, pods, selected
from .render import ROOT

_CLUSTER_WIDE = {"Namespace"}
_QUANTITY = re.compile(r"([0-9]+|[0-9]*\.[0-9]+)(m|k|Ki|Mi|Gi|Ti|M|G|T)?")


def names(objects: list[Object]) -> Iterator[str]:
    """Each object once, all in the one namespace that is among them."""
    for (kind, name), count in Counter((each["kind"], each["metadata"]["name"]) for each in objects).items():
        if count > 1:
            yield f"{kind}/{name} is there {count} times"
    namespaces = {each["metadata"]["name"] for each in of_kind(objects, "Namespace")}
    for each in objects:
        namespace = each["metadata"].get("namespace")
        if each["kind"] not in _CLUSTER_WIDE and namespace not in namespaces:
            yield f"{each['kind']}/{each['metadata']['name']} is in namespace {namespace}, expected {namespaces}"


def selectors(objects: list[Object]) -> Iterator[str]:
    """Every selector finds what it is for."""
    found = pods(objects)
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        match each["kind"]:
            case "StatefulSet":
                wanted, labels = each["spec"]["selector"]["matchLabels"], each["spec"]["template"]["metadata"]["labels"]
                if not wanted.items() <= labels.items():
                    yield f"{name} selects {wanted}, its pods have {labels}"
            case "Service":
                if not selected(each["spec"]["selector"], found):
                    yield f"{name} selects no pod: {each['spec']['selector']}"
            case "PodDisruptionBudget" | "NetworkPolicy":
                wanted = each["spec"].get("selector" if each["kind"] == "PodDisruptionBudget" else "podSelector", {})
                # An empty selector takes every pod of the namespace, a missing one none: neither is meant.
                if not wanted.get("matchLabels") or selected(wanted["matchLabels"], found) != found:
                    yield f"{name} selects {wanted}, expected every pod of the server"
            case "ServiceMonitor":
                yield from _monitor(each, name, objects)


def _monitor(monitor: Object, name: str, objects: list[Object]) -> Iterator[str]:
    wanted = monitor["spec"]["selector"]["matchLabels"]
    services = [
        each for each in of_kind(objects, "Service") if wanted.items() <= each["metadata"].get("labels", {}).items()
    ]
    ports = {port["name"] for each in services for port in each["spec"]["ports"]}
    asked = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    if asked != ports:
        yield f"{name} scrapes ports {sorted(asked)}, the services it selects have {sorted(ports)}"
    jobs = {each["metadata"].get("labels", {}).get(monitor["spec"].get("jobLabel")) for each in services}
    if jobs != (wanted_jobs := _compose_jobs()):
        yield f"{name} makes jobs {jobs}, dashboard and alerts ask for {wanted_jobs}"


def _compose_jobs() -> set[str]:
    configuration = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text())
    return {each["job_name"] for each in configuration["scrape_configs"]}


def ports(objects: list[Object]) -> Iterator[str]:
    """Services, probes and policies name ports that are open."""
    found = pods(objects)
    for service in of_kind(objects, "Service"):
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            for pod in selected(service["spec"]["selector"], found):
                if target not in pod.ports() and target not in pod.ports().values():
                    yield f"Service/{service['metadata']['name']} wants port {target} of {pod.name}: {pod.ports()}"
                yield from _policy(pod, target, objects)
    for pod in found:
        for container in pod.containers():
            own = {port.get("name") for port in container.get("ports", ())}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                # A name is looked up in the probe's own container only, a number is asked of the pod.
                if port is not None and port not in own and port not in pod.ports():
                    yield f"{pod.name}, {container['name']}: {probe} asks port {port}, which is not open there"


def _policy(pod: Pod, port: int | str, objects: list[Object]) -> Iterator[str]:
    policies = of_kind(objects, "NetworkPolicy")
    rules = [rule for policy in policies for rule in policy["spec"].get("ingress", ()) if "ports" in rule]
    if port not in {entry["port"] for rule in rules for entry in rule["ports"]}:
        yield f"no NetworkPolicy lets anyone in to port {port} of {pod.name}"


def volumes(objects: list[Object]) -> Iterator[str]:
    """Mounts have volumes, volumes are mounted, claims exist, the checkpoint is read-only."""
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    used = set()
    for pod in pods(objects):
        here = {volume["name"] for volume in pod.spec.get("volumes", ())}
        here |= {claim["metadata"]["name"] for claim in pod.claims}
        mounted = set()
        for container in pod.containers():
            mounts = container.get("volumeMounts", [])
            mounted |= {mount["name"] for mount in mounts}
            for path, count in Counter(mount["mountPath"] for mount in mounts).items():
                if count > 1:
                    yield f"{pod.name}, {container['name']}: {count} volumes at {path}"
            for mount in mounts:
                if mount["name"] not in here:
                    yield f"{pod.name}, {container['name']}: no volume {mount['name']} for {mount['mountPath']}"
                if mount["name"] == "weights" and not mount.get("readOnly"):
                    yield f"{pod.name}, {container['name']}: the weights are mounted writable"
        for name in sorted(here - mounted):
            yield f"{pod.name}: nobody mounts volume {name}"
        for volume in pod.spec.get("volumes", ()):
            if source := volume.get("persistentVolumeClaim"):
                used.add(source["claimName"])
                if source["claimName"] not in claims:
                    yield f"{pod.name}: volume {volume['name']} is of claim {source['claimName']}, which is not there"
                if not source.get("readOnly"):
                    yield f"{pod.name}: claim {source['claimName']} is attached writable"
    for name in sorted(claims - used):
        yield f"PersistentVolumeClaim/{name} is used by no pod"


def services(objects: list[Object]) -> Iterator[str]:
    """A StatefulSet's service is headless; what needs pods before they are ready publishes them."""
    by_name = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Service")}
    for each in of_kind(objects, "StatefulSet"):
        name = each["spec"]["serviceName"]
        if by_name.get(name, {}).get("clusterIP") != "None":
            yield f"StatefulSet/{each['metadata']['name']}: serviceName {name} is not a headless service among these"
    for name, spec in by_name.items():
        if any(port["name"] == "status" for port in spec["ports"]) and not spec.get("publishNotReadyAddresses"):
            yield f"Service/{name} hides the status of pods that are not ready"


def quantities(objects: list[Object]) -> Iterator[str]:
    """Amounts that the API server can read."""
    for path, key, value in _leaves(objects, ""):
        if key in {"memory", "cpu", "storage", "sizeLimit"} and not _QUANTITY.fullmatch(str(value)):
            yield f"{path}: {value!r} is not a quantity"


def _leaves(node: object, path: str) -> Iterator[tuple[str, str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (
                _leaves(value, f"{path}/{key}") if isinstance(value, (dict, list)) else [(f"{path}/{key}", key, value)]
            )
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}/{index}")


def security(objects: list[Object]) -> Iterator[str]:
    """The restricted pod security standard, which the namespace enforces, and no token of the API server."""
    for namespace in of_kind(objects, "Namespace"):
        level = namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if level != "restricted":
            yield f"Namespace/{namespace['metadata']['name']} enforces {level}, expected restricted"
    for pod in pods(objects):
        whole = pod.spec.get("securityContext", {})
        for field in ("hostIPC", "hostNetwork", "hostPID"):
            if pod.spec.get(field):
                yield f"{pod.name}: {field}"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: carries a token of the API server"
        if any("hostPath" in volume for volume in pod.spec.get("volumes", ())):
            yield f"{pod.name}: hostPath"
        for container in pod.containers():
            own = container.get("securityContext", {})
            both = whole | own
            missing = [
                text
                for text, right in (
                    ("runAsNonRoot", both.get("runAsNonRoot") is True and both.get("runAsUser", 0) != 0),
                    ("seccompProfile", both.get("seccompProfile", {}).get("type") == "RuntimeDefault"),
                    ("allowPrivilegeEscalation", own.get("allowPrivilegeEscalation") is False),
                    ("capabilities", own.get("capabilities") == {"drop": ["ALL"]}),
                    ("privileged", not own.get("privileged")),
                )
                if not right
            ]
            if missing:
                yield f"{pod.name}, {container['name']}: not restricted in {', '.join(missing)}"


CHECKS = (names, selectors, ports, volumes, services, quantities, security)
