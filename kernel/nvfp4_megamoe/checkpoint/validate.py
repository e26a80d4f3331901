"""Whether a checkpoint's files can become the NVFP4 model that its config.json promises; headers only, in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.checkpoint.headers import TensorInfo
from nvfp4_megamoe.checkpoint.index import CheckpointIndex, read_index, read_json
from nvfp4_megamoe.errors import CheckpointError

CONFIG_FILE = "config.json"
_EXPERTS = ".ffn.experts."
_UNQUANTIZED = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class CheckpointSummary:
    """What was checked.

    Attributes:
        shards: number of safetensors files. tensors: in all of them. data_bytes: of all tensors.
        layers: of the model, without multi-token prediction. nvfp4_layers: those whose experts are NVFP4.
        experts: routed experts of a layer. hidden, intermediate: sizes of an expert.
    """

    shards: int
    tensors: int
    data_bytes: int
    layers: int
    nvfp4_layers: int
    experts: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return (
            f"{self.nvfp4_layers} of {self.layers} layers with {self.experts} NVFP4 experts of "
            f"{self.hidden} x {self.intermediate}, {self.tensors} tensors, {self.data_bytes / 2**30:.2f} GiB in "
            f"{self.shards} shard(s)"
        )


@dataclass(frozen=True)
class _Promise:
    """What config.json says about the experts."""

    layers: int
    draft_layers: int
    experts: int
    hidden: int
    intermediate: int
    ignore: tuple[str, ...]

    def is_nvfp4(self, layer: int) -> bool:
        return not any(fnmatchcase(f"layers.{layer}.ffn.experts", pattern) for pattern in self.ignore)


def check_checkpoint(path: str | Path, *, expert_parallel_size: int = 1) -> CheckpointSummary:
    """Check configuration, index, shard headers and the expert tensors of every layer; reads no tensor.

    Args:
        path: directory of the checkpoint.
        expert_parallel_size: ranks that the experts are divided among.

    Raises:
        CheckpointError: naming the tensor or setting, its file, what was expected and what to do.
    """
    directory = Path(path)
    config_path = directory / CONFIG_FILE
    promise = _read_promise(config_path, read_json(config_path))
    if expert_parallel_size < 1 or promise.experts % expert_parallel_size:
        raise CheckpointError(
            f"{config_path}: n_routed_experts is {promise.experts}; expected a multiple of the {expert_parallel_size} "
            "expert-parallel ranks. Serve with a number of ranks that divides the experts."
        )
    index = read_index(directory)
    nvfp4_layers = [layer for layer in range(promise.layers) if promise.is_nvfp4(layer)]
    for layer in nvfp4_layers:
        _check_layer(index, layer, promise, config_path)
    _refuse_unknown(index, promise, nvfp4_layers)
    return CheckpointSummary(
        shards=len(index.shards),
        tensors=len(index.files),
        data_bytes=index.data_bytes,
        layers=promise.layers,
        nvfp4_layers=len(nvfp4_layers),
        experts=promise.experts,
        hidden=promise.hidden,
        intermediate=promise.intermediate,
    )


def _read_promise(path: Path, config: dict[str, Any]) -> _Promise:
    def positive(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{path}: {key} is {value!r}; expected a positive integer. Use the config.json of the checkpoint."
            )
        return value

    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    method, algorithm = quantization.get("quant_method"), quantization.get("moe_quant_algo")
    if method != "fp8" or str(algorithm).upper() != "NVFP4":
        raise CheckpointError(
            f"{path}: quantization_config has quant_method {method!r} and moe_quant_algo {algorithm!r}; expected "
            "'fp8' and 'NVFP4'. Use the config.json that ModelOpt wrote beside the NVFP4 experts."
        )
    for where, size in _group_sizes(quantization):
        if size != et.BLOCK:
            raise CheckpointError(
                f"{path}: quantization_config {where} is {size!r}; expected {et.BLOCK}, the block of NVFP4. Export "
                f"the checkpoint with blocks of {et.BLOCK}."
            )
    layers = positive("num_hidden_layers")
    draft = config.get("num_nextn_predict_layers")
    ignore = quantization.get("ignore")
    promise = _Promise(
        layers=layers,
        draft_layers=draft if isinstance(draft, int) else 0,
        experts=positive("n_routed_experts"),
        hidden=positive("hidden_size"),
        intermediate=positive("moe_intermediate_size"),
        ignore=tuple(p for p in ignore if isinstance(p, str)) if isinstance(ignore, list) else (),
    )
    et.require_blocks(str(path), promise.hidden, promise.intermediate)
    return promise


def _group_sizes(quantization: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every statement of the block size of the experts, with its place."""
    if quantization.get("group_size") is not None:
        yield "group_size", quantization["group_size"]
    for section in ("quantized_layers", "config_groups"):
        entries = quantization.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            stated = entry.get("weights", entry) if isinstance(entry, dict) else {}
            if not isinstance(stated, dict) or stated.get("group_size") is None:
                continue
            if stated.get("quant_algo") == "NVFP4" or stated.get("num_bits") == 4:
                yield f"{section}[{name!r}] group_size", stated["group_size"]


def _check_layer(index: CheckpointIndex, layer: int, promise: _Promise, config_path: Path) -> None:
    """Look for the twelve tensors of every expert; expects no fault, so that the time is that of the look-ups."""
    wanted = [
        (f".{projection}.{kind}", et.HEADER_DTYPES[kind], shape, shape or (1,))
        for kind in et.DTYPES
        for projection in et.PROJECTIONS
        for shape in [et.shape_of(projection, kind, promise.hidden, promise.intermediate)]
    ]
    headers = {name: shard.tensors for name, shard in index.shards.items()}
    for expert in range(promise.experts):
        prefix = f"layers.{layer}{_EXPERTS}{expert}"
        for suffix, dtype, shape, also in wanted:
            name = prefix + suffix
            file = index.files.get(name)
            if file is None:
                raise _missing(index, name)
            info = headers[file][name]
            if info.dtype != dtype or (info.shape != shape and info.shape != also):
                raise _wrong(name, file, info, dtype, shape, config_path)


def _missing(index: CheckpointIndex, name: str) -> CheckpointError:
    stem, kind = name.rsplit(".", 1)
    beside = index.files.get(f"{stem}.{et.WEIGHT}")
    where = f"{index.directory} (its {et.WEIGHT} is in {beside})" if beside else str(index.directory)
    return et.fault(name, where, "the tensor is missing", f"{et.MEANING[kind]}, {et.HEADER_DTYPES[kind]}")


def _wrong(
    name: str, file: str, info: TensorInfo, dtype: str, shape: tuple[int, ...], config_path: Path
) -> CheckpointError:
    found, wanted = f"{info.dtype} {list(info.shape)}", f"{dtype} {list(shape)}"
    if name.endswith(f".{et.WEIGHT}") and info.dtype in _UNQUANTIZED:
        return et.fault(
            name,
            file,
            f"{found}, not quantized, although {config_path} promises NVFP4 experts (moe_quant_algo)",
            f"packed E2M1 codes, {wanted}",
            "Serve the NVFP4 export of this model, or this checkpoint with its own config.json.",
        )
    return et.fault(name, file, found, wanted)


def _refuse_unknown(index: CheckpointIndex, promise: _Promise, nvfp4_layers: list[int]) -> None:
    nvfp4 = {str(layer) for layer in nvfp4_layers}
    # Layers after the last are multi-token prediction under plain layers' names.
    left_alone = {str(layer) for layer in range(promise.layers + promise.draft_layers)} - nvfp4
    for name, file in index.files.items():
        head, found, rest = name.partition(_EXPERTS)
        if not found or not head.startswith("layers."):
            continue  # not a routed expert, or one of mtp.*
        layer = head.removeprefix("layers.")
        if layer in left_alone:
            continue
        tensor = et.parse(rest) if layer in nvfp4 else None
        if tensor is not None and tensor.expert < promise.experts:
            continue
        raise et.fault(
            name,
            file,
            "unknown expert tensor",
            f"only layers 0 to {promise.layers - 1}, experts 0 to {promise.experts - 1}, {', '.join(et.PROJECTIONS)}, "
            f"each with {', '.join(et.DTYPES)}",
            "Serve the checkpoint with its own config.json, or export it again with ModelOpt.",
        )
