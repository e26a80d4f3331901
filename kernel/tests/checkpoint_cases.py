"""Safetensors files and DeepSeek-V4 NVFP4 checkpoints that are all headers: their data are holes in sparse files."""

from __future__ import annotations

import json
from pathlib import Path

from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.checkpoint.index import INDEX_FILE

Tensors = dict[str, tuple[str, list[int]]]  # safetensors dtype and shape by name

BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4, "I64": 8}


def write_shard(path: Path, tensors: Tensors, **change) -> dict:
    """Write a file for ``tensors``; ``change`` replaces a header entry, None drops it. Returns the header."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        begin, size = end, BYTES[dtype]
        for n in shape:
            size *= n
        end = begin + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    for name, entry in change.items():
        header[name] = entry
        if entry is None:
            del header[name]
    write_raw(path, json.dumps(header).encode(), end)
    return header


def write_raw(path: Path, header: bytes, data_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data_bytes)


def config(**change) -> dict:
    """config.json of a small checkpoint; ``quantization_config`` is updated rather than replaced."""
    quantization = {
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
        "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    } | change.pop("quantization_config", {})
    return {
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "n_routed_experts": 4,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "quantization_config": quantization,
    } | change


def experts(prefix: str, count: int, hidden: int, intermediate: int) -> Tensors:
    """The twelve tensors of each expert of a layer."""
    shapes = {
        f".{projection}.{kind}": (dtype, list(et.shape_of(projection, kind, hidden, intermediate)))
        for projection in et.PROJECTIONS
        for kind, dtype in et.HEADER_DTYPES.items()
    }
    return {f"{prefix}.{e}{suffix}": entry for e in range(count) for suffix, entry in shapes.items()}


def layer_tensors(cfg: dict, layer: int) -> Tensors:
    sizes = cfg["n_routed_experts"], cfg["hidden_size"], cfg["moe_intermediate_size"]
    other = {
        f"layers.{layer}.ffn.gate.weight": ("BF16", [sizes[0], sizes[1]]),
        f"layers.{layer}.ffn.shared_experts.w1.weight": ("F8_E4M3", [sizes[2], sizes[1]]),
        f"layers.{layer}.attn.wkv.weight": ("F8_E4M3", [sizes[1], sizes[1]]),
    }
    return experts(f"layers.{layer}.ffn.experts", *sizes) | other


class Checkpoint:
    """A checkpoint in memory, one shard a layer; change its parts, then ``write``."""

    def __init__(self, directory: Path, cfg: dict | None = None) -> None:
        self.directory = directory
        self.config = cfg or config()
        layers = self.config["num_hidden_layers"]
        files = [f"model-{i + 1:05}-of-{layers:05}.safetensors" for i in range(layers)]
        self.shards = {file: layer_tensors(self.config, i) for i, file in enumerate(files)}
        self.map = {name: file for file, tensors in self.shards.items() for name in tensors}

    def first(self, layer: int = 0) -> tuple[str, Tensors]:
        """File and tensors of a layer."""
        return list(self.shards.items())[layer]

    def set(self, name: str, dtype: str, shape: list[int], layer: int = 0) -> None:
        file, tensors = self.first(layer)
        tensors[name] = (dtype, shape)
        self.map[name] = file

    def drop(self, name: str) -> None:
        del self.shards[self.map.pop(name)][name]

    def write(self) -> Path:
        for file, tensors in self.shards.items():
            write_shard(self.directory / file, tensors)
        (self.directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": self.map}))
        (self.directory / "config.json").write_text(json.dumps(self.config))
        return self.directory
