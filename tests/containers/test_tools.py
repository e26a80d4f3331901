"""Compose file and monitoring as the real programs read them, without a running engine; each fails on a broken copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .checks import example
from .standin import REPOSITORY
from .tools import Tools

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]
MONITORING = REPOSITORY / "monitoring/prometheus"


def services(tools: Tools, *arguments: str, directory: Path = REPOSITORY) -> set[str]:
    compose = ("docker", "compose", "--project-directory", directory)
    return set(tools.check(*compose, *arguments, "config", "--services").split())


@pytest.mark.parametrize(
    "profiles, expected",
    [
        (["gpu"], {"vllm", "status"}),
        (["gpu-dp"], {"vllm-dp", "status"}),
        (["cpu"], {"vllm-cpu", "status-cpu"}),
        (["cpu", "monitoring"], {"vllm-cpu", "status-cpu", "prometheus", "grafana"}),
    ],
)
def test_a_profile_starts_its_services(tools: Tools, profiles: list[str], expected: set[str]) -> None:
    assert services(tools, *(word for name in profiles for word in ("--profile", name))) == expected


def test_the_example_starts_the_gpu_server_and_a_profile_on_the_command_line_wins(tools: Tools, tmp_path: Path) -> None:
    for name in ("docker-compose.yml", ".env.example"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".env.example").rename(tmp_path / ".env")
    assert services(tools, directory=tmp_path) == {"vllm", "status"}
    assert services(tools, "--profile", "cpu", directory=tmp_path) == {"vllm-cpu", "status-cpu"}


def test_settings_reach_the_command(tools: Tools, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "docker-compose.yml", tmp_path)
    settings = example(REPOSITORY) | {"GPUS": "4", "VLLM_EXTRA_FLAGS": "--seed 7 --async-scheduling"}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    shown = tools.check("docker", "compose", "--project-directory", tmp_path, "config", "--format", "json")
    command = json.loads(shown)["services"]["vllm"]["command"]
    assert command[-3:] == ["--seed", "7", "--async-scheduling"]
    assert command[command.index("--tensor-parallel-size") + 1] == "4"


def test_compose_refuses_a_misspelt_key(tools: Tools, tmp_path: Path) -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    (tmp_path / "docker-compose.yml").write_text(text.replace("shm_size: 1gb", "shmm_size: 1gb"))
    result = tools.run("docker", "compose", "--profile", "cpu", "--project-directory", tmp_path, "config", "--quiet")
    assert result.returncode != 0 and "shmm_size" in result.stdout


def promtool(tools: Tools, directory: Path) -> tuple[bool, str]:
    """Whether Prometheus takes its configuration and the alerts do what alerts_test.yml says."""
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), directory)
    results = [
        tools.run("promtool", "check", "config", directory / "prometheus.yml"),
        tools.run("promtool", "test", "rules", directory / "alerts_test.yml"),
    ]
    return all(result.returncode == 0 for result in results), "".join(result.stdout for result in results)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("", ""),
        ('== 1\n        for: 30s', "== 1\n        for: 5m"),
        ('{state="failed"}[5m]', '{state="failed"}[1m]'),
        ("unless on()", "and on()"),
        (', handler=~"/v1/.*"', ""),
        ("and on() sum(vllm:num_requests_waiting) > 0", ""),
        ("sum by (le) (rate(vllm:time", "sum by (l) (rate(vllm:time"),
        ("humanizePercentage", "humanisePercentage"),
    ],
)  # fmt: skip
def test_alerts_fire_when_they_should_and_a_wrong_one_is_found(
    tools: Tools, tmp_path: Path, right: str, wrong: str
) -> None:
    copy = tmp_path / "prometheus"
    shutil.copytree(MONITORING, copy)
    text = (copy / "alerts.yml").read_text()
    assert right in text
    (copy / "alerts.yml").write_text(text.replace(right, wrong))
    passed, said = promtool(tools, copy)
    assert passed == (right == wrong), said
