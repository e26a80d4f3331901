"""The container files without an engine: linter, schema, and what those do not see; all fail on broken copies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from . import checks, exporters
from .standin import REPOSITORY

_FILES = (
    *("Dockerfile", ".dockerignore", "docker-compose.yml", ".env.example", "docs/operations.md"),
    *("monitoring", "scripts", "patches", "model_executor", "kernel/pyproject.toml", "kernel/nvfp4_megamoe"),
)


def hadolint(root: Path) -> list[str]:
    """Problems that the linter of Dockerfiles finds."""
    return _tool("hadolint", "--no-color", str(root / "Dockerfile"))


def compose_schema(root: Path) -> list[str]:
    """What the Compose Specification does not allow."""
    return _tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(root / "docker-compose.yml"))


def _tool(name: str, *arguments: str) -> list[str]:
    result = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *arguments], capture_output=True, text=True, timeout=120
    )
    return (result.stdout + result.stderr).splitlines() if result.returncode else []


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], list[str]]:
    """Run a check by its name on a project folder."""
    flags, variables = exporters.vllm_flags(), exporters.vllm_variables()
    startup = exporters.startup_metrics(tmp_path_factory.mktemp("status"))
    exported = exporters.vllm_metrics() | startup | exporters.http_metrics()
    known = {
        "hadolint": hadolint,
        "compose_schema": compose_schema,
        "variables": checks.variables,
        "services": checks.services,
        "servers": lambda root: checks.servers(root, flags),
        "status_services": checks.status_services,
        "image": checks.image,
        "documented": lambda root: checks.documented(root, variables),
        "metrics": lambda root: checks.metrics(root, exported),
        "dashboard": checks.dashboard,
    }
    return lambda name, root: known[name](root)


COMPOSE, DOCKERFILE, GUIDE = "docker-compose.yml", "Dockerfile", "docs/operations.md"
DASHBOARD, ALERTS = "monitoring/grafana/dashboards/deepseek-v4.json", "monitoring/prometheus/alerts.yml"

# check, file, what stands there, what a mistake would make of it, what the check has to say
BROKEN = [
    ("hadolint", DOCKERFILE, "FROM ${BASE_IMAGE} AS gpu", "FORM ${BASE_IMAGE} AS gpu", "unexpected"),
    ("hadolint", DOCKERFILE, "WORKDIR /opt/nvfp4-megamoe", "WORKDIR opt", "DL3000"),
    ("compose_schema", COMPOSE, "shm_size: 1gb", "shmm_size: 1gb", "shmm_size"),
    ("compose_schema", COMPOSE, "restart: unless-stopped", "restart: [always]", "restart"),
    ("variables", COMPOSE, "${MODEL_NAME:-deepseek-v4}", "${MODEL_NAME:-other}", "MODEL_NAME"),
    ("variables", COMPOSE, "${SHM_SIZE:-16gb}", "${SHARED:-16gb}", "SHARED"),
    ("variables", ".env.example", "GPUS=8", "GPU=8", "GPU of .env.example is not used"),
    ("services", COMPOSE, "restart: unless-stopped", "restart: on-failure", "restart is on-failure"),
    ("services", COMPOSE, "cap_drop: [ALL]", "cap_drop: [MKNOD]", "keeps privileges"),
    ("services", COMPOSE, "prom/prometheus:v3.5.0", "prom/prometheus:latest", "not pinned"),
    ("services", COMPOSE, "    build: *cpu-build\n", "", "in a registry"),
    ("services", COMPOSE, "profiles: [cpu]", "profiles: []", "without a profile"),
    ("services", COMPOSE, "${BIND_ADDRESS:-127.0.0.1}:${GRAFANA_PORT", "${GRAFANA_PORT", "open to the network"),
    ("servers", COMPOSE, "--max-num-seqs", "--max-seqs", "no flag --max-seqs"),
    ("servers", COMPOSE, "stop_grace_period: 150s", "stop_grace_period: 90s", "killed after 90 s"),
    ("servers", COMPOSE, "--port 8000", "--port 8080", "port 8080 is not the one"),
    ("servers", COMPOSE, "aliases: [server]", "aliases: [vllm]", "look for it as server"),
    ("servers", COMPOSE, "--tensor-parallel-size ${GPUS:-8}", "--tensor-parallel-size 4", "4 ranks on 8 GPUs"),
    ("servers", COMPOSE, "${SHM_SIZE:-16gb}", "${SHM_SIZE:-4gb}", "shared memory"),
    ("servers", COMPOSE, "--moe-backend nvfp4_megamoe", "--moe-backend auto", "vLLM's choice"),
    ("servers", COMPOSE, "read_only: true\n      bind", "read_only: false\n      bind", "read-only"),
    ("status_services", COMPOSE, "profiles: [gpu, gpu-dp]", "profiles: [gpu]", "vllm-dp: 0 status services"),
    ("status_services", COMPOSE, "cpu:/cache\n      - status:/run/mega-moe\n\n", "cpu:/cache\n\n", "vllm-cpu: shares"),
    ("image", DOCKERFILE, "vllm-openai:v0.32.0", "vllm-openai:v0.33.0", "BASE_IMAGE is vllm/vllm-openai:v0.33.0"),
    ("image", DOCKERFILE, "ARG VERSION=0.1.0", "ARG VERSION=0.2.0", "not the package's"),
    ("image", DOCKERFILE, "scripts/entrypoint.py", "scripts/entry.py", "scripts/entry.py does not exist"),
    ("image", DOCKERFILE, "USER 2000:0", "USER 0", "no unprivileged user"),
    ("image", DOCKERFILE, "# Two images", "# syntax=docker/dockerfile:1\n# Two images", "syntax line"),
    ("documented", GUIDE, "MEGA_MOE_STATIC", "MEGA_MOE_STATICS", "MEGA_MOE_STATICS of docs"),
    ("documented", GUIDE, "GRAFANA_ADMIN_PASSWORD", "the password", "GRAFANA_ADMIN_PASSWORD of .env.example"),
    ("documented", GUIDE, "VLLM_API_KEY", "VLLM_APIKEY", "VLLM_APIKEY"),
    ("documented", ALERTS, "alert: KVCacheFull", "alert: CacheFull", "CacheFull"),
    ("metrics", DASHBOARD, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ("metrics", ALERTS, "mega_moe_startup_elapsed_seconds", "mega_moe_startup_age", "mega_moe_startup_age"),
    ("dashboard", DASHBOARD, '"x": 12,', '"x": 11,', "lies over"),
    ("dashboard", "monitoring/grafana/provisioning/datasources/prometheus.yml", "uid: prom", "uid: p", "data source"),
    ("dashboard", ALERTS, "labels: {severity: critical}", "labels: {}", "no severity"),
]  # fmt: skip


@pytest.mark.parametrize("check", sorted({row[0] for row in BROKEN}))
def test_the_project_has_no_problem(problems: Callable[[str, Path], list[str]], check: str) -> None:
    assert problems(check, REPOSITORY) == []


@pytest.mark.parametrize("check, file, right, wrong, says", BROKEN, ids=[f"{row[0]}-{row[4]}" for row in BROKEN])
def test_a_broken_copy_is_found(
    problems: Callable[[str, Path], list[str]],
    tmp_path: Path,
    check: str,
    file: str,
    right: str,
    wrong: str,
    says: str,
) -> None:
    for name in _FILES:
        _copy(REPOSITORY / name, tmp_path / name)
    text = (tmp_path / file).read_text()
    assert right in text, f"{file} has no {right!r} any more"
    (tmp_path / file).write_text(text.replace(right, wrong))
    found = problems(check, tmp_path)
    assert any(says in each for each in found), found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "objects"))
    else:
        shutil.copy(source, target)
