"""The checkpoint: integrity, scales, and how much memory its ranks need."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from nvfp4_megamoe.checkpoint import expert_tensors
from nvfp4_megamoe.checkpoint.index import CheckpointIndex, read_index
from nvfp4_megamoe.checkpoint.validate import check_checkpoint
from nvfp4_megamoe.errors import CheckpointError

from .finding import FAIL, NOTE, OK, Finding, gib

_EXPERTS = ".ffn.experts."
_KV_BYTES_PER_TOKEN = 584  # DeepSeek-V4's fp8_ds_mla: 448 of values, 128 of rotary part, 8 of scales
_INDEX_BYTES_PER_TOKEN = 132  # 128 FP8 values and a float32 scale, in the layers that compress by 4
_WINDOW = 128
# What a rank needs beside weights and KV: CUDA context, NCCL, CUDA graphs, activations of a large batch.
_SCRATCH = 6 << 30
_UE4M3_NAN = (0x7F, 0xFF)


def check(directory: Path, ranks: int, seed: int, sampled: int) -> tuple[list[Finding], CheckpointIndex | None]:
    """Check files and scales; the index is None where the files cannot be used."""
    try:
        summary = check_checkpoint(directory, expert_parallel_size=ranks)
        index = read_index(directory)
    except CheckpointError as error:
        return [Finding("checkpoint", FAIL, str(error))], None
    findings = [Finding("checkpoint", OK, str(summary))]
    return [*findings, _scalars(index), _block_scales(index, seed, sampled)], index


def memory(
    index: CheckpointIndex, directory: Path, ranks: int, length: int, available: int, share: float, where: str
) -> Finding:
    """Whether a rank's weights, the KV cache of one sequence of ``length`` tokens, and scratch fit ``available`` bytes.

    The dense weights are counted once divided among the ranks and once whole on each: vLLM divides most of them.
    """
    experts = dense = 0
    for name, file in index.files.items():
        if not name.startswith("mtp."):
            info = index.shards[file].tensors[name]
            if _EXPERTS in name:
                experts += info.end - info.start
            else:
                dense += info.end - info.start
    cache = kv_cache_bytes(json.loads((directory / "config.json").read_text()), length)
    on_gpu = where != "RAM"
    fixed = experts // ranks + cache + (_SCRATCH if on_gpu else 0)
    least, most = (fixed + dense // ranks, fixed + dense) if on_gpu else ((experts + dense) + cache * ranks,) * 2
    budget = int(available * share)
    text = (
        f"{gib(least)} to {gib(most)} of {gib(budget)} {where}: experts {gib(experts / ranks)} a rank, other weights "
        f"{gib(dense / ranks)} to {gib(dense)}, KV of one sequence of {length:,} tokens {gib(cache)}"
    )
    if least > budget:
        return Finding("memory", FAIL, text, "more ranks, larger GPUs, or a smaller --max-model-len")
    if most > budget:
        return Finding("memory", NOTE, text, "it fits only as far as the other weights are divided among the ranks")
    return Finding("memory", OK, text)


def kv_cache_bytes(config: dict[str, Any], length: int) -> int:
    """KV cache of one sequence on one rank; every rank holds all of it, heads being one latent."""
    layers = int(config["num_hidden_layers"])
    ratios = config.get("compress_ratios") or []
    total = 0
    for layer in range(layers):
        ratio = ratios[layer] if layer < len(ratios) else 0
        total += min(length, _WINDOW) * _KV_BYTES_PER_TOKEN
        if ratio:
            total += length // ratio * (_KV_BYTES_PER_TOKEN + (_INDEX_BYTES_PER_TOKEN if ratio == 4 else 0))
    return total


def _scalars(index: CheckpointIndex) -> Finding:
    """Every weight_scale_2 and input_scale of every routed expert: finite and positive; gate against up."""
    wanted: dict[str, list[tuple[int, str]]] = {}
    for name, file in index.files.items():
        if _EXPERTS in name and name.endswith((expert_tensors.GLOBAL_SCALE, expert_tensors.INPUT_SCALE)):
            wanted.setdefault(file, []).append((index.info(name).start, name))
    values: dict[str, float] = {}
    for file, places in wanted.items():
        with open(index.directory / file, "rb", buffering=0) as stream:
            for start, name in sorted(places):
                stream.seek(start)
                (values[name],) = struct.unpack("<f", stream.read(4))
    bad = [f"{name} = {value}" for name, value in values.items() if not 0 < value < float("inf")]
    if bad:
        return Finding("scales", FAIL, f"{len(bad)} of {len(values)} not finite and positive: {bad[0]}", _EXPORT)
    ratios = []
    for name, gate in values.items():
        if name.endswith(f".{expert_tensors.GATE}.{expert_tensors.GLOBAL_SCALE}"):
            up = values.get(name.replace(f".{expert_tensors.GATE}.", f".{expert_tensors.UP}."))
            if up is not None:
                ratios.append(max(gate, up) / min(gate, up))
    unequal = sum(ratio > 1.00001 for ratio in ratios)
    share = unequal / len(ratios) if ratios else 0.0
    text = f"{len(values):,} finite and positive; gate and up differ in {100 * share:.1f} % of {len(ratios):,} experts"
    return Finding("scales", OK, text + (f", by up to {max(ratios):.2f} times" if unequal else ""))


def _block_scales(index: CheckpointIndex, seed: int, sampled: int) -> Finding:
    """A sample of the block scale tensors: none is NaN, negative, or zero throughout."""
    names = sorted(name for name in index.files if _EXPERTS in name and name.endswith(f".{expert_tensors.BLOCK_SCALE}"))
    chosen = random.Random(seed).sample(names, min(sampled, len(names)))
    for name in chosen:
        info = index.info(name)
        with open(index.directory / index.files[name], "rb") as stream:
            stream.seek(info.start)
            data = stream.read(info.end - info.start)
        if any(value in data for value in _UE4M3_NAN):
            return Finding("block scales", FAIL, f"{name} has NaN", _EXPORT)
        if max(data) > 0x7F:
            return Finding("block scales", FAIL, f"{name} has negative scales", _EXPORT)
        if not any(data):
            return Finding("block scales", NOTE, f"{name} is zero throughout: its projection computes nothing", _EXPORT)
    return Finding("block scales", OK, f"{len(chosen)} of {len(names):,} tensors read (seed {seed}), all in order")


_EXPORT = "download the checkpoint again, or export it again with ModelOpt"
