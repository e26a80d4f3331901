"""What schemas and linters do not see in the container files: checks of a project's folder that return problems."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")
_OUR_VARIABLE = r"MEGA_MOE_[A-Z_]+|NVFP4_(?!MEGAMOE\b)[A-Z0-9_]+|SKIP_ATTENTION"
_METRIC = re.compile(r"\b(?:vllm:|mega_moe_|http_)[a-z0-9_]+")


def compose(root: Path) -> dict[str, Any]:
    """The compose file, with its anchors resolved and its variables as they are written."""
    return yaml.safe_load((root / "docker-compose.yml").read_text())


def example(root: Path) -> dict[str, str]:
    """The settings of .env.example."""
    lines = (root / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables(root: Path) -> list[str]:
    """Each variable of the compose file has a default, and stands with that default in .env.example; and none else."""
    problems, known, used = [], example(root), {"COMPOSE_PROFILES"}
    for name, default in _VARIABLE.findall((root / "docker-compose.yml").read_text()):
        used.add(name)
        if known.get(name) != default:
            problems.append(f"{name}: {default!r} in docker-compose.yml, {known.get(name)!r} in .env.example")
    return problems + [f"{name} of .env.example is not used" for name in known.keys() - used]


def services(root: Path) -> list[str]:
    """Each service restarts, drops its capabilities, has a pinned image and keeps to its profile."""
    problems = []
    for name, service in compose(root)["services"].items():
        if service.get("restart") != "unless-stopped":
            problems.append(f"{name}: restart is {service.get('restart')}: vLLM may end with 0 after a failure")
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", ()):
            problems.append(f"{name}: keeps privileges")
        if not re.search(r":(?!latest)[\w.-]+$", _filled(service["image"])):
            problems.append(f"{name}: image {service['image']} is not pinned")
        if _filled(service["image"]).startswith("deepseek-v4-nvfp4:") and "build" not in service:
            problems.append(f"{name}: compose would look for {_filled(service['image'])} in a registry")
        if not service.get("profiles"):
            problems.append(f"{name}: without a profile it starts with every other")
        for port in service.get("ports", ()):
            if not port.startswith("${BIND_ADDRESS:-127.0.0.1}:"):
                problems.append(f"{name}: port {port} is open to the network by default")
    return problems


def servers(root: Path, vllm_flags: set[str]) -> list[str]:
    """Flags that vLLM knows, GPUs = ranks, shared memory, time to drain, one port throughout, the network's name."""
    problems = []
    for name, service in _servers(root):
        words = _filled(service["command"]).split()
        flags = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
        problems += [f"{name}: vLLM has no flag {flag}" for flag in flags if flag not in vllm_flags]
        grace, drain = _seconds(service["stop_grace_period"]), int(flags.get("--shutdown-timeout", 0))
        if not 0 < drain <= grace - 15:
            problems.append(f"{name}: killed after {grace} s, with {drain} s for requests in flight")
        port, health = flags.get("--port"), " ".join(service["healthcheck"]["test"])
        if f":{port}/health" not in health or not service["ports"][0].endswith(f":{port}"):
            problems.append(f"{name}: port {port} is not the one of health check and published port")
        if service["networks"]["default"]["aliases"] != ["server"]:
            problems.append(f"{name}: status service and Prometheus look for it as server")
        if "deploy" in service:
            problems += _gpus(name, service, flags)
    return problems


def _gpus(name: str, service: dict[str, Any], flags: dict[str, str]) -> list[str]:
    problems = []
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    ranks = int(flags.get("--tensor-parallel-size", 1)) * int(flags.get("--data-parallel-size", 1))
    if int(_filled(device["count"])) != ranks:
        problems.append(f"{name}: {ranks} ranks on {_filled(device['count'])} GPUs")
    if int(_filled(service["shm_size"]).removesuffix("gb")) < ranks:
        problems.append(f"{name}: less than 1 GiB of shared memory a rank")
    if flags.get("--moe-backend") != "nvfp4_megamoe" or "--enable-expert-parallel" not in flags:
        problems.append(f"{name}: the MoE backend is left to vLLM's choice, or experts are not divided")
    weights = [volume for volume in service["volumes"] if isinstance(volume, dict) and volume["target"] == "/models"]
    if not weights or not weights[0].get("read_only") or weights[0]["bind"].get("create_host_path") is not False:
        problems.append(f"{name}: checkpoints must be read-only, and a missing folder an error")
    return problems


def status_services(root: Path) -> list[str]:
    """Each server has a status service of its profile and image that shares its files and its cache."""
    problems, all_services = [], compose(root)["services"]
    for name, server in _servers(root):
        profile = server["profiles"][0]
        matches = [each for each in all_services.values() if _is_status(each) and profile in each["profiles"]]
        if len(matches) != 1 or matches[0]["image"] != server["image"]:
            problems.append(f"{name}: {len(matches)} status services of its profile, expected one, of its image")
            continue
        (status,) = matches
        shared = {volume for volume in server["volumes"] if isinstance(volume, str)}
        if set(status["volumes"]) != shared:
            problems.append(f"{name}: shares {shared}, its status service has {set(status['volumes'])}")
        if status["networks"]["default"]["aliases"] != ["status"]:
            problems.append(f"{name}: Prometheus looks for its status service as status")
    return problems


def image(root: Path) -> list[str]:
    """Dockerfile against compose file, package and scripts: bases, version, paths, ports."""
    text, problems = (root / "Dockerfile").read_text(), []
    for name, value in re.findall(r"^ARG (BASE_IMAGE|CPU_BASE_IMAGE|REQUIRE_KERNELS)=(\S+)$", text, re.MULTILINE):
        if example(root)[name] != value:
            problems.append(f"{name} is {value} in the Dockerfile, {example(root)[name]} in .env.example")
    version = re.search(r'^version = "(.+)"', (root / "kernel/pyproject.toml").read_text(), re.MULTILINE)[1]
    if set(re.findall(r"^ARG VERSION=(\S+)$", text, re.MULTILINE)) != {version}:
        problems.append(f"the image's version is not the package's, {version}")
    if example(root)["IMAGE"] != f"deepseek-v4-nvfp4:{version}":
        problems.append(f"IMAGE in .env.example is {example(root)['IMAGE']}, the version is {version}")
    texts = text + (root / "docker-compose.yml").read_text()
    for path in set(re.findall(r"/opt/nvfp4-megamoe/(scripts/\S+\.py)", texts)):
        if not (root / path).is_file():
            problems.append(f"{path} does not exist")
    if re.search(r"^# *syntax=", text, re.MULTILINE) or "<<EOF" in text:
        problems.append("a syntax line or a heredoc: not every builder has them, and the first needs a registry")
    if not all(re.search(rf"^{line}", text, re.MULTILINE) for line in ("HEALTHCHECK", "USER 2000:0", "LABEL")):
        problems.append("no health check, no unprivileged user, or no labels")
    return problems


def documented(root: Path, vllm_variables: set[str]) -> list[str]:
    """Variables, settings and alerts of code and files are in the operations guide, and the other way round."""
    guide = (root / "docs/operations.md").read_text()
    in_code = {name for text in _sources(root) for name in re.findall(rf"""["']({_OUR_VARIABLE})["']""", text)}
    in_guide = set(re.findall(rf"\b(?:{_OUR_VARIABLE})\b", guide))
    problems = [f"{name} is not in docs/operations.md" for name in in_code - in_guide]
    problems += [f"{name} of docs/operations.md is not in the code" for name in in_guide - in_code]
    problems += [f"{name} of .env.example is not in docs/operations.md" for name in example(root) if name not in guide]
    for name in re.findall(r"\bVLLM_[A-Z_]+\b", guide):
        if name not in vllm_variables | example(root).keys():
            problems.append(f"vLLM has no variable {name}")
    alerts = {rule["alert"] for rule in _rules(root)}
    section = guide.partition("\n## Monitoring and alerts\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `([A-Z]\w*[a-z]\w*)` \|", section, re.MULTILINE))
    return problems + [f"alert {name} is in one of alerts.yml and docs/operations.md only" for name in alerts ^ listed]


def metrics(root: Path, exported: set[str]) -> list[str]:
    """Every metric that a panel or an alert asks for is exported."""
    asked = {name for expression in expressions(root) for name in _METRIC.findall(expression)}
    assert asked, "no expression asks for a metric"
    return [f"nothing exports {name}" for name in sorted(asked - exported)]


def dashboard(root: Path) -> list[str]:
    """Panels with data, of the provisioned source, that do not overlap; every alert has summary and severity."""
    problems: list[str] = []
    provisioning = root / "monitoring/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(provisioning.read_text())["datasources"]
    taken: dict[tuple[int, int], str] = {}
    panels = json.loads((root / "monitoring/grafana/dashboards/deepseek-v4.json").read_text())["panels"]
    if len({panel["id"] for panel in panels}) != len(panels):
        problems.append("two panels have one id")
    for panel in panels:
        title, place = panel["title"], panel["gridPos"]
        if panel["type"] != "row" and not panel.get("targets"):
            problems.append(f"{title}: no query")
        if any(target["datasource"]["uid"] != source["uid"] for target in panel.get("targets", ())):
            problems.append(f"{title}: its data source is not {source['uid']}, which is the one provisioned")
        for cell in ((x, y) for x in range(place["w"]) for y in range(place["h"])):
            other = taken.setdefault((place["x"] + cell[0], place["y"] + cell[1]), title)
            if other != title:
                problems.append(f"{title} lies over {other}")
                break
    for rule in _rules(root):
        if "severity" not in rule.get("labels", {}) or "summary" not in rule.get("annotations", {}):
            problems.append(f"{rule['alert']}: no severity or no summary")
    return problems


def expressions(root: Path) -> Iterator[str]:
    """Every query of the dashboard and every alert's condition."""
    panels = json.loads((root / "monitoring/grafana/dashboards/deepseek-v4.json").read_text())["panels"]
    for panel in panels:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (rule["expr"] for rule in _rules(root))


def _rules(root: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((root / "monitoring/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _sources(root: Path) -> Iterator[str]:
    for folder in ("kernel/nvfp4_megamoe", "model_executor", "scripts"):
        yield from (path.read_text() for path in sorted((root / folder).rglob("*.py")))
    yield from (path.read_text() for path in sorted((root / "patches").rglob("*.diff")))


def _servers(root: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(name, each) for name, each in compose(root)["services"].items() if name.startswith("vllm")]


def _is_status(service: dict[str, Any]) -> bool:
    return any("startup_status.py" in word for word in service.get("entrypoint", ()))


def _filled(text: str) -> str:
    return _VARIABLE.sub(lambda match: match[2] or "", text)


def _seconds(text: str) -> int:
    return int(text.removesuffix("s"))
