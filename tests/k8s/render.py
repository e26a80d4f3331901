"""Renders kustomizations as users do, and lists the combinations that are checked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "k8s"

Object = dict[str, Any]

# name: an overlay, and the components that a user adds to it
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "single-node-8xb200": ("single-node-8xb200", ()),
    "single-node-8xb200, data-parallel": ("single-node-8xb200", ("data-parallel", "servicemonitor")),
    "single-node-8xh200": ("single-node-8xh200", ()),
    "single-node-8xh200, monitored": ("single-node-8xh200", ("servicemonitor", "dashboard")),
    "multi-node-lws": ("multi-node-lws", ()),
    "multi-node-lws, infiniband": ("multi-node-lws", ("infiniband", "servicemonitor")),
    "cpu-demo": ("cpu-demo", ()),
}


def renderer() -> list[str]:
    """The command that renders a kustomization; skips without one, fails if REQUIRE_KUBECTL=1."""
    for program, arguments in (("kubectl", ["kustomize"]), ("kustomize", ["build"])):
        if path := shutil.which(program):
            return [path, *arguments]
    reason = "neither kubectl nor kustomize is installed: the manifests cannot be rendered"
    if os.environ.get("REQUIRE_KUBECTL") == "1":
        pytest.fail(f"{reason}, and REQUIRE_KUBECTL=1 asks for them")
    pytest.skip(reason)


def build(folder: Path) -> list[Object]:
    """The objects of the kustomization in ``folder``."""
    done = subprocess.run([*renderer(), str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return list(yaml.safe_load_all(done.stdout))


def build_case(name: str, folder: Path, manifests: Path = MANIFESTS) -> list[Object]:
    """The objects of CASES[name], from a kustomization of a user's own in ``folder``."""
    overlay, components = CASES[name]
    copy = folder / "k8s"
    shutil.copytree(manifests, copy)
    shutil.copytree(ROOT / "monitoring" / "grafana", folder / "monitoring" / "grafana")
    own = folder / "own"
    own.mkdir()
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../k8s/overlays/{overlay}"],
        "components": [f"../k8s/components/{component}" for component in components],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return build(own)
