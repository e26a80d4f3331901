"""The layer reports as a table for people and as a record for machines."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
from nvfp4_megamoe.selftest import LayerReport
from nvfp4_megamoe.selftest.judge import CALC_DIFF, COLUMN, NORM, PROBE, ROW

from .checkpoint import Source

FORMAT = 1
_METRICS = (CALC_DIFF, NORM, ROW, COLUMN, PROBE)


def table(reports: list[LayerReport], detailed: int = 5) -> str:
    """One line a layer with the value nearest to its limit of each metric, then those of the first failed layers."""
    rows = [("layer", *_METRICS, "seconds", "")]
    for report in reports:
        worst = report.worst()
        cells = (f"{worst[m].value:.2e} / {worst[m].limit:.2e}" if m in worst else "-" for m in _METRICS)
        rows.append((report.layer.split(".")[1], *cells, f"{report.seconds:.2f}", "ok" if report.passed else "FAILED"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    bad = [report for report in reports if not report.passed]
    for report in bad[:detailed]:
        lines += [f"{report.layer} on {report.backend}: {m}" for m in report.worst().values() if not m.passed]
    backends = ", ".join(sorted({report.backend for report in reports}))
    lines.append(f"{len(reports)} layer(s) on {backends}: " + (f"{len(bad)} FAILED" if bad else "all passed"))
    return "\n".join(lines)


def record(reports: list[LayerReport], source: Source, device: torch.device, arguments: list[str]) -> dict:
    """Everything measured, with device, versions and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "format": FORMAT,
        "passed": all(report.passed for report in reports),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": [str(argument) for argument in arguments],
        "device": {"name": name, "type": str(device)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "checkpoint": {"path": str(source.directory), "ranks": source.ranks, "rank": source.rank},
        "geometry": vars(source.geometry),
        "layers": [
            {
                "layer": report.layer,
                "backend": report.backend,
                "passed": report.passed,
                "seconds": round(report.seconds, 3),
                "measurements": [m._asdict() | {"passed": m.passed} for m in report.measurements],
            }
            for report in reports
        ],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
