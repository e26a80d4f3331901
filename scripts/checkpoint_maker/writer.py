"""Shards, index and the rest of a checkpoint, written so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint_maker import config, formats, shard, tensors, tokenizer
from checkpoint_maker.formats import FORMATS, Matrix
from checkpoint_maker.geometry import Geometry
from checkpoint_maker.tensors import Plain, Planted

DEFAULT_SHARD_SIZE = 1 << 30
_SPARE_BYTES = 64 << 20  # for headers, index and tokenizer, and so as not to fill a disk to the last byte


class OutputError(OSError):
    """The output directory cannot be written; nothing was changed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a checkpoint's bytes."""

    geometry: Geometry
    format: str = "nvfp4"
    dequantize: bool = False
    seed: int = 0
    planted: Planted = field(default_factory=Planted)

    def inventory(self) -> Iterator[Plain | Matrix]:
        """What the checkpoint is made of, in order."""
        return tensors.inventory(self.geometry, self.seed, self.planted)

    def describe(self, spec: Plain | Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors of ``spec``."""
        if isinstance(spec, Plain):
            return {spec.name: (spec.dtype, spec.shape)}
        return formats.describe(spec, FORMATS[self.format].codec(spec), self.dequantize, self.seed)

    def build(self, spec: Plain | Matrix) -> dict[str, torch.Tensor]:
        """The tensors of ``spec``, the same whatever was built before."""
        if isinstance(spec, Plain):
            return {spec.name: tensors.make(spec, self.seed)}
        return formats.store(spec, FORMATS[self.format].codec(spec), self.dequantize, self.seed)


@dataclass(frozen=True)
class Shard:
    """Consecutive parts of a checkpoint that go into one file."""

    specs: list[Plain | Matrix]
    size: int  # bytes, without the header


def plan(recipe: Recipe, shard_size: int) -> list[Shard]:
    """Cut a checkpoint into shards of at most ``shard_size`` bytes; what is larger gets one of its own."""
    shards: list[Shard] = []
    specs: list[Plain | Matrix] = []
    size = 0
    for spec in recipe.inventory():
        extra = sum(shard.size_of(dtype, shape) for dtype, shape in recipe.describe(spec).values())
        if specs and size + extra > shard_size:
            shards.append(Shard(specs, size))
            specs, size = [], 0
        specs.append(spec)
        size += extra
    return [*shards, Shard(specs, size)]


def write(recipe: Recipe, out: Path, shard_size: int = DEFAULT_SHARD_SIZE, force: bool = False) -> int:
    """Write a checkpoint to the directory ``out``; memory is that of its largest tensor.

    It is written to ``<out>.partial`` and renamed when complete, so ``out`` is whole or absent.

    Returns:
        Bytes of tensors.

    Raises:
        OutputError: ``out`` holds something and ``force`` is not given, another process is writing it, or the disk is
            too small.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: choose a directory.")
    if out.exists() and any(out.iterdir()) and not force:
        raise OutputError(f"{out} is not empty: choose another directory, or replace it with --force.")
    shards = plan(recipe, shard_size)
    total = sum(part.size for part in shards)
    with _partial(out) as partial:
        free = shutil.disk_usage(partial).free
        if free < total + _SPARE_BYTES:
            raise OutputError(f"{out} needs {total / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free.")
        _write_shards(recipe, shards, partial)
        config.write(partial, recipe.geometry, recipe.format, recipe.dequantize)
        tokenizer.write(partial, recipe.geometry.max_positions)
        _replace(partial, out)
    return total


def _write_shards(recipe: Recipe, shards: list[Shard], directory: Path) -> None:
    weight_map: dict[str, str] = {}
    total = sum(part.size for part in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checkpoint", disable=None) as bar:
        for number, part in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            described = {name: entry for spec in part.specs for name, entry in recipe.describe(spec).items()}
            for written in shard.write(directory / file, described, map(recipe.build, part.specs)):
                bar.update(written)
            weight_map |= dict.fromkeys(described, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """An empty directory beside ``out``, held by a lock that ends with the process, and removed unless renamed."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{partial} is being written by another process.") from None
        for left in partial.iterdir():  # by a process that was killed
            left.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
