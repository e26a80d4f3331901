"""What exists: the metrics that server and status service export, and vLLM's flags and variables."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

from tests.startup_cases import Ranks, Snapshot, collector, look_until

# From prometheus-fastapi-instrumentator, which vLLM's server uses with its defaults.
_HTTP = {"http_requests_total"}
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def vllm_metrics() -> set[str]:
    """The names under which vLLM's own logger of metrics exports its counters, gauges and histograms."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text()
    found = re.findall(r"self\._(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)
    assert len(found) > 20, "vLLM's logger of metrics is not written as expected"
    return {name + end for kind, name in found for end in _SUFFIXES[kind]}


def startup_metrics(directory: Path) -> set[str]:
    """The names that the status service exports for a rank that gets ready and an entrypoint that warms up."""
    from status.metrics import exposition
    from status.server_files import ServerStatus, WarmUp

    compiled = {"serving": {"Triton": {"files": 1, "bytes": 1}}}
    server = ServerStatus(8000, "serving", 0.0, 0.0, WarmUp(1, 1, 1.0, None, False), compiled)
    seen: list[Snapshot] = []

    def ready(snapshot: Snapshot) -> bool:
        seen.append(dataclasses.replace(snapshot, servers=(server,)))
        return snapshot.verdict.state == "ready"

    with Ranks(directory) as ranks:
        ranks.start(0, 1, "load:3000:0.001", "ready")
        look_until(collector(directory), ready)
    texts = (exposition(lambda snapshot=snapshot: snapshot)().decode() for snapshot in seen)
    return {name for text in texts for name in re.findall(r"^(mega_moe_\w+)", text, re.MULTILINE)}


def http_metrics() -> set[str]:
    """The names of the server's HTTP metrics that are asked for."""
    return _HTTP


def vllm_flags() -> set[str]:
    """Every option of ``vllm serve``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {name for action in make_arg_parser(FlexibleArgumentParser())._actions for name in action.option_strings}


def vllm_variables() -> set[str]:
    """Every environment variable that vLLM knows."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm.envs

    return set(vllm.envs.environment_variables)
