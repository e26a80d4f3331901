"""Every overlay, alone and with the components, as a user renders it: strict schemas and the cross-checks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator

import pytest
import yaml

from . import schemas, serving, wiring
from .flags import parse
from .objects import Object, environment, of_kind, pods, server_arguments
from .render import CASES, MANIFESTS, ROOT, build, renderer

CHECKS = (*wiring.CHECKS, *serving.CHECKS)


def test_no_overlay_and_no_component_is_left_out() -> None:
    overlays = {path.name for path in (MANIFESTS / "overlays").iterdir()}
    components = {path.name for path in (MANIFESTS / "components").iterdir()}
    assert overlays == {overlay for overlay, _ in CASES.values()}
    assert components == {component for _, added in CASES.values() for component in added}


@pytest.mark.parametrize("case", CASES)
def test_schemas(case: str, rendered: Callable[[str], list[Object]]) -> None:
    assert not schemas.problems(rendered(case))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES)
def test_cross_checks(
    case: str, check: Callable[[list[Object]], Iterator[str]], rendered: Callable[[str], list[Object]]
) -> None:
    assert not list(check(rendered(case)))


def test_the_job_puts_the_weights_where_the_server_reads_them(rendered: Callable[[str], list[Object]]) -> None:
    objects = build(MANIFESTS / "fetch-weights")
    assert not schemas.problems(objects)
    assert not [*wiring.security(objects), *wiring.quantities(objects)]
    (job,) = pods(objects)
    (fetch,) = job.containers()
    (server,) = pods(rendered("single-node-8xh200"))
    assert fetch["image"] == server.server["image"]
    assert job.spec["securityContext"] == server.spec["securityContext"]
    assert f"--local-dir={parse(server_arguments(server)).model_tag}" in fetch["args"]
    weights = {volume["name"]: volume for volume in server.spec["volumes"]}["weights"]
    assert job.spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == weights["persistentVolumeClaim"]["claimName"]
    assert {each["metadata"]["namespace"] for each in objects} == {"deepseek-v4"}


@pytest.mark.parametrize("case", CASES)
def test_the_guide_explains_every_flag_and_variable(case: str, rendered: Callable[[str], list[Object]]) -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    overlay, components = CASES[case]
    words = {overlay, *components}
    for pod in pods(rendered(case)):
        words |= {each.split("=")[0] for each in server_arguments(pod) if each.startswith("--")}
        words |= {name for container in pod.containers() for name in environment(container)}
        words |= {container["name"] for container in pod.containers() if container["name"] != "server"}
    words |= {each["metadata"]["name"] for each in of_kind(rendered(case), "PersistentVolumeClaim")}
    assert not [word for word in sorted(words) if word not in guide]


def test_the_dashboard_is_the_one_of_compose(rendered: Callable[[str], list[Object]]) -> None:
    (config,) = of_kind(rendered("single-node-8xh200, monitored"), "ConfigMap")
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    (name,) = config["data"]
    assert config["data"][name] == (ROOT / "monitoring" / "grafana" / "dashboards" / name).read_text()


def test_the_guides_command_makes_a_prometheus_rule() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^\{ printf .*?\| kubectl", guide, re.DOTALL | re.MULTILINE)
    printed = subprocess.run(
        ["bash", "-c", command.removesuffix("| kubectl")], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    rule, alerts = yaml.safe_load(printed), yaml.safe_load((ROOT / "monitoring/prometheus/alerts.yml").read_text())
    assert (rule["kind"], rule["spec"]) == ("PrometheusRule", alerts)


def test_without_a_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    monkeypatch.delenv("REQUIRE_KUBECTL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="neither kubectl nor kustomize"):
        renderer()
    monkeypatch.setenv("REQUIRE_KUBECTL", "1")
    with pytest.raises(pytest.fail.Exception, match="REQUIRE_KUBECTL=1"):
        renderer()
