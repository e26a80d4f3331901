"""Checkpoints for the tests, written by the project's own tool, and copies with one fault each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .support import REPOSITORY

Tensors = dict[str, torch.Tensor]


def make(directory: Path, *options: str) -> Path:
    """Write a tiny checkpoint with scripts/make_checkpoint.py."""
    subprocess.run([sys.executable, "scripts/make_checkpoint.py", str(directory), *options], cwd=REPOSITORY, check=True)
    return directory


def edited(source: Path, target: Path, edit: Callable[[Tensors], None]) -> Path:
    """Copy ``source`` to ``target`` with ``edit`` applied to the tensors of every shard, in place."""
    shutil.copytree(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(target / shard)
        edit(tensors)
        save_file(tensors, target / shard, metadata={"format": "pt"})
    return target


def is_of_rank(name: str, rank: int, ranks: int, experts: int = 64) -> bool:
    """Whether rank ``rank`` of ``ranks`` needs the tensor ``name``: all but the experts of other ranks."""
    _, found, rest = name.partition(".ffn.experts.")
    return not found or int(rest.split(".")[0]) * ranks // experts == rank


def swap_nibbles(tensors: Tensors) -> None:
    """Exchange the two codes of every byte of the routed experts."""
    for name, tensor in tensors.items():
        if ".ffn.experts." in name and name.endswith(".weight"):
            tensors[name] = (tensor << 4) | (tensor >> 4)


def use_gate_scale_for_up(tensors: Tensors) -> None:
    """Do what stock vLLM does when it loads: take the gate's weight_scale_2 for the up projection too."""
    for name in tensors:
        if ".ffn.experts." in name and name.endswith(".w3.weight_scale_2"):
            tensors[name] = tensors[name.replace(".w3.", ".w1.")].clone()


def lose_a_block_scale(tensors: Tensors) -> None:
    """Make one block scale of one expert NaN."""
    name = next(name for name in sorted(tensors) if ".ffn.experts." in name and name.endswith(".w2.weight_scale"))
    tensors[name].view(torch.uint8)[3, 0] = 0x7F
