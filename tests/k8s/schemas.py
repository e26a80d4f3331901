"""Strict schemas: Kubernetes' own for its kinds and for every embedded pod, small ones here for two custom kinds."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

from .objects import Object

# The oldest release that docs/operations.md allows, and the newest that kubernetes-validate 1.34.1 has.
VERSIONS = ("1.30", "1.34")


def _object(required: tuple[str, ...] = (), **properties: Any) -> Object:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_COUNT_OR_SHARE = {"anyOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = _object(("name",), name=_TEXT, namespace=_TEXT, labels=_LABELS, annotations=_LABELS)
_TEMPLATE = _object(("spec",), metadata=_object((), labels=_LABELS, annotations=_LABELS), spec={"type": "object"})
_RETENTION = {"enum": ["Retain", "Delete"]}

# api/leaderworkerset/v1/leaderworkerset_types.go of kubernetes-sigs/lws
_LEADER_WORKER_SET = _object(
    ("leaderWorkerTemplate",),
    replicas=_COUNT,
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    networkConfig=_object((), subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
    rolloutStrategy=_object(
        ("type",),
        type={"const": "RollingUpdate"},
        rollingUpdateConfiguration=_object(
            (), partition=_COUNT, maxUnavailable=_COUNT_OR_SHARE, maxSurge=_COUNT_OR_SHARE
        ),
    ),
    leaderWorkerTemplate=_object(
        ("workerTemplate",),
        size={"type": "integer", "minimum": 1},
        restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        leaderTemplate=_TEMPLATE,
        workerTemplate=_TEMPLATE,
        subGroupPolicy=_object(
            (), subGroupPolicyType={"enum": ["LeaderWorker", "LeaderExcluded"]}, subGroupSize={"type": "integer"}
        ),
        volumeClaimTemplates={"type": "array", "items": {"type": "object"}},
        persistentVolumeClaimRetentionPolicy=_object((), whenDeleted=_RETENTION, whenScaled=_RETENTION),
    ),
)

# The part of the Prometheus operator's ServiceMonitor that is used here.
_SERVICE_MONITOR = _object(
    ("selector", "endpoints"),
    jobLabel=_TEXT,
    selector=_object((), matchLabels=_LABELS),
    namespaceSelector=_object((), any={"type": "boolean"}, matchNames={"type": "array", "items": _TEXT}),
    endpoints={
        "type": "array",
        "minItems": 1,
        "items": _object(
            ("port",),
            port=_TEXT,
            path={"type": "string", "pattern": "^/"},
            interval={"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
            scrapeTimeout={"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
        ),
    },
)


def _custom(version: str, kind: str, spec: Object) -> Draft202012Validator:
    whole = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_METADATA,
        spec=spec,
    )
    Draft202012Validator.check_schema(whole)
    return Draft202012Validator(whole)


_CUSTOM = {
    "LeaderWorkerSet": _custom("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", _LEADER_WORKER_SET),
    "ServiceMonitor": _custom("monitoring.coreos.com/v1", "ServiceMonitor", _SERVICE_MONITOR),
}


def problems(objects: list[Object]) -> list[str]:
    """What is against a schema, with kind, name and path."""
    found = []
    for each in objects:
        name = f"{each.get('kind')}/{each.get('metadata', {}).get('name')}"
        validator = _CUSTOM.get(each.get("kind", ""))
        if validator is None:
            found += _built_in(each, name)
            continue
        errors = [f"{name} {_path(error.path)}: {error.message}" for error in validator.iter_errors(each)]
        found += errors or _embedded(each, name)
    return found


def _built_in(each: Object, name: str) -> list[str]:
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{name} {_path(error.path)}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"{name}: Kubernetes {version} has no {each.get('apiVersion')} {each.get('kind')}")
    return found


def _embedded(each: Object, name: str) -> list[str]:
    """The pods and claims inside a LeaderWorkerSet, as objects of their own."""
    group = each["spec"].get("leaderWorkerTemplate", {})
    found = []
    for role in ("leaderTemplate", "workerTemplate"):
        if role in group:
            metadata = {"name": "pod", **group[role].get("metadata", {})}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group[role]["spec"]}
            found += _built_in(pod, f"{name} {role}")
    for claim in group.get("volumeClaimTemplates", ()):
        found += _built_in({"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}, f"{name} claim")
    return found


def _path(parts: Any) -> str:
    return ".".join(map(str, parts)) or "(top)"
