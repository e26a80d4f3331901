"""Reads what scripts/make_checkpoint.py writes, and runs it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TOOL = SCRIPTS / "make_checkpoint.py"
sys.path.insert(0, str(SCRIPTS))

import make_checkpoint  # noqa: E402, F401
from checkpoint_maker import formats, tensors, tiles, writer  # noqa: E402, F401
from checkpoint_maker.geometry import Geometry, make_geometry  # noqa: E402
from checkpoint_maker.tensors import Planted  # noqa: E402
from checkpoint_maker.writer import Recipe, write  # noqa: E402

# Small, yet with each kind of layer: hash routing and sliding window, compressed sparse, heavily compressed attention.
SMALL = {"layers": 3, "experts_count": 8, "index_heads": 8}


def small(**sizes: int) -> Geometry:
    """A geometry that takes about 0.2 s to write."""
    return make_geometry("tiny", **(SMALL | sizes))


def made(
    directory: Path,
    fmt: str = "nvfp4",
    dequantize: bool = False,
    seed: int = 0,
    planted: Planted | None = None,
    shard_size: int = 1 << 30,
) -> dict[str, torch.Tensor]:
    """Write a small checkpoint and read it back."""
    write(Recipe(small(), fmt, dequantize, seed, planted or Planted()), directory, shard_size)
    return read(directory)


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, found through its index."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    result = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(directory / file, "pt") as shard:
            assert {name for name, where in weight_map.items() if where == file} == set(shard.keys())
            result |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return result


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run the tool; returns what it printed and its exit status."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
