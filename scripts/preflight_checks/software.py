"""The patched vLLM, and the backend that would compute the MoE layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .finding import FAIL, OK, Finding

_PATCH_VLLM = Path(__file__).resolve().parents[1] / "patch_vllm.py"


def patches(command: list[str] | None = None) -> Finding:
    """Whether the installed vLLM is as ``patch_vllm.py apply`` leaves it."""
    command = command or [sys.executable, str(_PATCH_VLLM), "verify", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    try:
        report = json.loads(result.stdout)
    except ValueError:
        text = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no answer"]
        return Finding("patches", FAIL, text[0], "python scripts/patch_vllm.py verify")
    what = f"vLLM {report['version']}" if report.get("version") else "vLLM"
    if result.returncode == 0:
        return Finding("patches", OK, f"{what}: {report.get('summary') or report.get('state')}")
    return Finding("patches", FAIL, f"{what}: {report.get('error') or report.get('summary')}")


def backend(directory: Path, ranks: int, device: str) -> Finding:
    """Which backend supports the checkpoint's layers on ``device``."""
    from nvfp4_megamoe.backends.select import BACKENDS, unsupported_reason
    from nvfp4_megamoe.moe.geometry import MoEGeometry

    config = json.loads((directory / "config.json").read_text())
    experts = int(config["n_routed_experts"])
    geometry = MoEGeometry(
        num_experts=experts,
        num_local_experts=experts // ranks,
        top_k=int(config["num_experts_per_tok"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["moe_intermediate_size"]),
        swiglu_limit=config.get("swiglu_limit"),
    )
    reasons = {name: unsupported_reason(geometry, device, name=name) for name in BACKENDS}
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    if chosen is not None:
        return Finding("backend", OK, f"{chosen} on {device}, {geometry.num_local_experts} experts a rank")
    return Finding("backend", FAIL, "; ".join(filter(None, reasons.values())), "serve on supported hardware")
