"""vLLM's router GEMM computes the same in the process that compiled it and in one that loads it, on a Hopper GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or find_spec("quack") is None,
        reason="needs a Hopper GPU and vLLM's GPU build",
    ),
]


def errors(cache: Path, *options: str) -> list[float]:
    """Relative errors of every batch."""
    program = Path(__file__).with_name("cute_router.py")
    environment = os.environ | {"CUTE_DSL_CACHE_DIR": str(cache)}
    result = subprocess.run([sys.executable, program, *options], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line)["error"] for line in result.stdout.splitlines() if line.startswith("{")]


def test_a_loaded_kernel_computes_what_the_compiled_one_does(tmp_path):
    compiled = errors(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").iterdir()}
    assert errors(tmp_path, "--forbid") == pytest.approx(compiled, rel=1e-3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").iterdir()} == kept
