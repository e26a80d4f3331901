"""A damaged checkpoint is refused by the server with a message that names the damage; nothing is served.

Every single check has its own test beside the code in kernel/tests; here the refusal is followed to the exit status.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import checkpoints
from .support import REPOSITORY, free_port


def refusal(model: Path, *vllm_arguments: str, ranks: int = 1) -> str:
    """Start the server on ``model``, expect it to end by itself with an error, and return its log."""
    command = [sys.executable, "scripts/serve_cpu.py", "--model", str(model)]
    command += ["--port", str(free_port()), "--ranks", str(ranks), "--", *vllm_arguments]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    log = ended.stdout + ended.stderr
    assert ended.returncode != 0, f"the server served a damaged checkpoint:\n{log[-3000:]}"
    assert "[serve] ready after" not in log
    return log


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_truncated_shard(copy: Path) -> None:
    shard = next(copy.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    log = refusal(copy)
    assert "CheckpointError" in log or "ValidationError" in log
    assert shard.name in log


def test_missing_tensor_is_found_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.5.w3.input_scale"
    damaged = checkpoints.edited(checkpoint, tmp_path / "missing", lambda tensors: tensors.pop(name))
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    log = refusal(damaged)
    assert name in log
    assert "Loading safetensors checkpoint shards" not in log


def test_nan_block_scale_is_found_after_loading(checkpoint: Path, tmp_path: Path) -> None:
    log = refusal(checkpoints.edited(checkpoint, tmp_path / "nan", checkpoints.lose_a_block_scale))
    assert "NaN block scale" in log
    assert "w2.weight_scale" in log


def test_experts_that_do_not_divide_over_the_ranks(checkpoint: Path) -> None:
    log = refusal(checkpoint, ranks=3)
    assert "64" in log and "3" in log
    assert "expert" in log.lower()
