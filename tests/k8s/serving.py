"""Cross-checks of what the pods do: flags, variables, ranks and GPUs, the end, the status service, the group."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from .flags import FlagError, is_read, parse
from .objects import Object, Pod, environment, of_kind, pods, server_arguments
from .render import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from preflight_checks.host import _SHM_PER_RANK

_SCRIPTS = "/opt/nvfp4-megamoe/scripts/"
# For eight ranks to end once the requests have.
_TEARDOWN_S = 30
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def amount(text: str) -> int:
    """Bytes of a quantity such as 64Gi."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)?", text)
    assert match is not None, text
    return int(match[1]) * _UNITS.get(match[2] or "", 1)


def flags(objects: list[Object]) -> Iterator[str]:
    """vLLM takes the flags, and every ``$(NAME)`` has a value."""
    for pod in pods(objects):
        arguments = server_arguments(pod)
        yield from (f"{pod.name}: nothing sets {each}" for each in arguments if re.search(r"\$\([A-Za-z_]\w*\)", each))
        try:
            parse(arguments)
        except FlagError as error:
            yield f"{pod.name}: vLLM refuses its flags: {error}"


def variables(objects: list[Object]) -> Iterator[str]:
    """Someone reads each variable; Services set none (one called vllm would set VLLM_PORT)."""
    for pod in pods(objects):
        for container in pod.containers():
            for name in environment(container):
                if not is_read(name):
                    yield f"{pod.name}, {container['name']}: nothing reads {name}"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: Services of the namespace set variables (enableServiceLinks)"


def programs(objects: list[Object]) -> Iterator[str]:
    """One image in a pod; the scripts that are run are in it."""
    for pod in pods(objects):
        images = sorted({container["image"] for container in pod.containers()})
        if len(images) > 1:
            yield f"{pod.name}: containers of different versions: {', '.join(images)}"
        for container in pod.containers():
            for word in container.get("command", ()):
                for script in re.findall(re.escape(_SCRIPTS) + r"[\w/]+\.py", word):
                    if not (ROOT / "scripts" / script.removeprefix(_SCRIPTS)).exists():
                        yield f"{pod.name}, {container['name']}: the project has no {script}"


def accelerators(objects: list[Object]) -> Iterator[str]:
    """Requests are limits for whatever cannot be shared; a GPU for each rank; shared memory for each rank."""
    for pod in pods(objects):
        for container in pod.containers():
            limits, requests = (container.get("resources", {}).get(key, {}) for key in ("limits", "requests"))
            for name in sorted(each for each in limits | requests if "/" in each):
                if limits.get(name) != requests.get(name):
                    yield (
                        f"{pod.name}, {container['name']}: {requests.get(name)} {name} requested, "
                        f"limit {limits.get(name)}"
                    )
            if "memory" not in limits:
                yield f"{pod.name}, {container['name']}: no limit of memory"
        yield from _ranks(pod)


def _ranks(pod: Pod) -> Iterator[str]:
    try:
        parsed = parse(server_arguments(pod))
    except FlagError:
        return
    replicas = parsed.data_parallel_size_local or parsed.data_parallel_size
    ranks = parsed.tensor_parallel_size * parsed.pipeline_parallel_size * replicas
    limits = pod.server["resources"]["limits"]
    gpus = limits.get("nvidia.com/gpu")
    if gpus is not None and int(gpus) != ranks:
        yield f"{pod.name}: {ranks} ranks on {gpus} GPUs"
    if ranks > 1 and not parsed.enable_expert_parallel:
        yield f"{pod.name}: {ranks} ranks without --enable-expert-parallel"
    shared = next((each for each in pod.spec["volumes"] if each["name"] == "shm"), {}).get("emptyDir", {})
    mount = next((each for each in pod.server["volumeMounts"] if each["mountPath"] == "/dev/shm"), {}).get("name")
    if shared.get("medium") != "Memory" or mount != "shm" or amount(shared["sizeLimit"]) < ranks * _SHM_PER_RANK:
        yield f"{pod.name}: /dev/shm is {shared} from volume {mount}, expected memory, {ranks} GiB or more"
    elif amount(shared["sizeLimit"]) > amount(limits["memory"]) // 2:
        yield f"{pod.name}: /dev/shm of {shared['sizeLimit']} counts as memory, of which {limits['memory']} are allowed"


def the_end(objects: list[Object]) -> Iterator[str]:
    """Requests in flight can end before the kill."""
    for pod in pods(objects):
        try:
            drain = parse(server_arguments(pod)).shutdown_timeout
        except FlagError:
            continue
        pause = pod.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if drain == 0 or pause == 0:
            yield f"{pod.name}: requests are aborted at the end: --shutdown-timeout {drain}, preStop {pause} s"
        if grace < pause + drain + _TEARDOWN_S:
            yield f"{pod.name}: killed after {grace} s, expected {pause} + {drain} + {_TEARDOWN_S} or more"


def status_service(objects: list[Object]) -> Iterator[str]:
    """A native sidecar, first of the init containers, that sees the ranks' files and processes and the server."""
    for pod in pods(objects):
        first = pod.spec.get("initContainers", [{}])[0]
        if first.get("name") != "status" or first.get("restartPolicy") != "Always":
            yield f"{pod.name}: the first init container is not the status service as a native sidecar"
            continue
        if not pod.spec.get("shareProcessNamespace"):
            yield f"{pod.name}: the status service cannot see the ranks' processes (shareProcessNamespace)"
        users = {each.get("securityContext", {}).get("runAsUser") for each in (first, pod.server)}
        if len(users) > 1:
            yield f"{pod.name}: the status service is another user than the ranks"
        places = [_place(each, environment(each).get("MEGA_MOE_STATUS_DIR")) for each in (first, pod.server)]
        if places[0] is None or places[0] != places[1]:
            yield f"{pod.name}: status directories {places[0]} of the service, {places[1]} of the server"
        cache = environment(pod.server).get("MEGA_MOE_CACHE_DIR")
        if _place(pod.server, cache) != ("caches", ""):
            yield f"{pod.name}: no volume for caches at {cache}"
        yield from _arguments(pod, first)


def _place(container: Object, path: str | None) -> tuple[str, str] | None:
    """The volume in which ``path`` lies, and where in it."""
    if path is None:
        return None
    for mount in container.get("volumeMounts", ()):
        if path == mount["mountPath"] or path.startswith(mount["mountPath"] + "/"):
            return (mount["name"], path[len(mount["mountPath"]) :]) if not mount.get("readOnly") else None
    return None


def _arguments(pod: Pod, service: Object) -> Iterator[str]:
    given = dict(each.split("=", 1) for each in service.get("args", ()))
    history = given.get("--history")
    if history is not None and (_place(service, history) or ("", ""))[0] != "caches":
        yield f"{pod.name}: the history {history} is not kept on the volume for caches"
    try:
        server = parse(server_arguments(pod))
    except FlagError:
        return
    expected = None if server.headless else f"http://127.0.0.1:{server.port}/health"
    if given.get("--health-url") != expected:
        yield f"{pod.name}: the status service asks {given.get('--health-url')}, expected {expected}"


def group(objects: list[Object]) -> Iterator[str]:
    """A LeaderWorkerSet's pods make one server: every rank once, one head, workers without an API."""
    for each in of_kind(objects, "LeaderWorkerSet"):
        if each["metadata"]["name"] in {service["metadata"]["name"] for service in of_kind(objects, "Service")}:
            yield f"Service/{each['metadata']['name']} stands where the controller makes one for the pods' DNS names"
        spec = each["spec"]["leaderWorkerTemplate"]
        leader, worker = pods([each])
        try:
            head, other = (parse(server_arguments(pod)) for pod in (leader, worker))
        except FlagError:
            continue
        local = head.data_parallel_size_local
        if head.data_parallel_size != spec["size"] * (local or 0):
            yield f"{head.data_parallel_size} data-parallel ranks, {spec['size']} pods of {local}"
        if head.headless or not other.headless:
            yield f"--headless: leader {head.headless}, worker {other.headless}"
        if head.data_parallel_start_rank is not None or other.data_parallel_start_rank != local:
            yield (
                f"first ranks: leader {head.data_parallel_start_rank}, expected none; "
                f"worker 1 {other.data_parallel_start_rank}, expected {local}"
            )
        same = ("data_parallel_address", "data_parallel_rpc_port", "data_parallel_size", "model_tag")
        for name in (*same, "tensor_parallel_size", "data_parallel_size_local", "max_model_len", "max_num_seqs"):
            if getattr(head, name) != getattr(other, name):
                yield f"{name}: leader {getattr(head, name)}, worker {getattr(other, name)}"
        if head.data_parallel_address != leader.variables["LWS_LEADER_ADDRESS"]:
            yield f"--data-parallel-address is {head.data_parallel_address}, expected the leader's"
        if each["spec"].get("startupPolicy") != "LeaderCreated":
            yield "the workers are made when the leader is ready, which it is only with them (startupPolicy)"
        for pod in (leader, worker):
            order = [container["name"] for container in pod.spec["initContainers"]]
            if order != ["status", "wait-for-group"]:
                yield f"{pod.name}: init containers {order}: a pod waits for status services that start after"
        yield from _traffic(objects, leader)


def _traffic(objects: list[Object], leader: Pod) -> Iterator[str]:
    rules = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    for direction, side in (("ingress", "from"), ("egress", "to")):
        peers = [
            peer.get("podSelector", {}).get("matchLabels", {})
            for spec in rules
            for rule in spec.get(direction, ())
            if "ports" not in rule
            for peer in rule.get(side, ())
        ]
        if not any(labels and labels.items() <= leader.labels.items() for labels in peers):
            yield f"no NetworkPolicy allows {direction} on all ports between the pods of a group"


CHECKS = (flags, variables, programs, accelerators, the_end, status_service, group)
