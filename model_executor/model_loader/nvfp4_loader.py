"""Loads DeepSeek-V4 with NVFP4 experts: only what this rank needs, in file order, while full layers are prepared.

The default for such checkpoints (``--load-format auto``). Every other model, and every other load format, is loaded as
vLLM does. docs/loading.md describes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nvfp4_megamoe.checkpoint.buffers import allocate_pageable
from nvfp4_megamoe.checkpoint.headers import read_header
from nvfp4_megamoe.checkpoint.read_plan import ReadPlan, plan_reads
from nvfp4_megamoe.checkpoint.reader import CheckpointReader
from nvfp4_megamoe.checkpoint.shard_file import Identity, identify
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.model_executor.nvfp4 import prepared, progress
from vllm.model_executor.nvfp4.preparer import LayerPreparer
from vllm.utils.mem_utils import release_device_memory_under_pressure

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.nvfp4.deliver import ExpertLayers

logger = init_logger(__name__)

_DIRECT_IO = "MEGA_MOE_DIRECT_IO"


class Nvfp4ModelLoader(DefaultModelLoader):
    """vLLM's default loader, with reading and delivery of NVFP4 DeepSeek-V4 weights replaced."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load ``model`` from its checkpoint.

        Raises:
            CheckpointError: a shard is missing, damaged, unreadable or changes meanwhile, or a tensor does not fit.
        """
        # Experts import the loaders' package: imported with this module they would find themselves half-made.
        from vllm.model_executor.nvfp4.deliver import ExpertLayers

        layers = ExpertLayers(model)
        if not len(layers):
            super().load_weights(model, model_config)
            return
        if reason := self._reason_for_vllms_own(model, model_config):
            logger.info("The checkpoint is read by vLLM's own loader: %s", reason)
            super().load_weights(model, model_config)
            return
        _, files, is_safetensors, _ = self._prepare_weights(model_config.model, None, model_config.revision, True, None)
        if not is_safetensors:
            raise ValueError(f"{model_config.model}: expected NVFP4 weights in .safetensors files, found {files[0]}")
        identities, plan = _plan(model, layers, [Path(file) for file in sorted(files)])
        layers.expect(model.hf_to_vllm_mapper.map_name(name) for batch in plan.batches for name, _ in batch.tensors)
        if absent := layers.without_tensors():
            logger.info("The checkpoint is read by vLLM's own loader: its names do not lead to %s", absent[0])
            super().load_weights(model, model_config)
            return
        self._load(model, layers, identities, plan)

    def _reason_for_vllms_own(self, model: torch.nn.Module, model_config: ModelConfig) -> str | None:
        """Why this model or this configuration needs vLLM's reading, or None."""
        load = self.load_config
        if not hasattr(model, "hf_to_vllm_mapper"):
            return f"{type(model).__name__} renames its tensors itself"
        if get_current_vllm_config().parallel_config.enable_eplb:
            return "expert load balancing places copies of experts on several ranks"
        if load.safetensors_load_strategy is not None:
            return f"--safetensors-load-strategy {load.safetensors_load_strategy}"
        if load.model_loader_extra_config:
            return "--model-loader-extra-config"
        if model_config.multimodal_config is not None and model_config.multimodal_config.mm_encoder_only:
            return "--mm-encoder-only"
        if getattr(model, "secondary_weights", ()):
            return f"{type(model).__name__} has further sources of weights"
        return None

    def _load(
        self, model: torch.nn.Module, layers: ExpertLayers, identities: dict[Path, Identity], plan: ReadPlan
    ) -> None:
        device = torch.device(self.load_config.device or get_current_vllm_config().device_config.device)
        rename = model.hf_to_vllm_mapper.map_name
        reader = CheckpointReader(plan, identities, direct=_direct_io(), allocate=_allocator(device))

        def prepare(module: RoutedExperts) -> None:
            with progress.phase(progress.PREPARE), device_loading_context(module, device):
                module.quant_method.process_weights_after_loading(module)
            release_device_memory_under_pressure(device)
            prepared.mark(module)

        self.counter_before_loading_weights = began = time.perf_counter()
        # Closed also when the model raises: the threads must not outlive the load.
        with LayerPreparer(prepare, device.type == "cpu") as preparer, closing(iter(reader)) as weights:
            counted = progress.stream_weights(preparer.watch(weights), plan, reader.counters)
            model.load_weights(layers.deliver(counted, rename, preparer.submit))
            layers.check_complete()
            _log_reads(plan, reader, time.perf_counter() - began)
        self.counter_after_loading_weights = time.perf_counter()
        _log_preparation(len(layers), preparer, self.counter_after_loading_weights - began)


def _plan(model: torch.nn.Module, layers: ExpertLayers, files: list[Path]) -> tuple[dict[Path, Identity], ReadPlan]:
    """Leave out what the model drops, what other pipeline stages hold, and other ranks' experts with all their scales.

    ``nvfp4_megamoe`` keeps input scales per expert: it needs none of an expert that it does not hold.
    """
    from vllm.model_executor.models.utils import is_pp_missing_parameter

    rename = model.hf_to_vllm_mapper.map_name

    def wanted(name: str) -> bool:
        mapped = rename(name)
        if mapped is None or is_pp_missing_parameter(mapped, model):
            return False
        return layers.is_local(mapped) is not False

    identities = {file: identify(file) for file in files}
    return identities, plan_reads((read_header(file) for file in files), wanted)


def _direct_io() -> bool:
    value = os.environ.get(_DIRECT_IO, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{_DIRECT_IO}={value!r}: expected 0 (through the page cache) or 1 (past it where possible)")
    return value == "1"


def _allocator(device: torch.device) -> Callable[[int], torch.Tensor]:
    if device.type != "cuda":
        return allocate_pageable
    index = torch.cuda.current_device() if device.index is None else device.index

    def allocate_pinned(size: int) -> torch.Tensor:
        with torch.cuda.device(index):  # a reader's thread would open a context on the first GPU
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    return allocate_pinned


def _log_reads(plan: ReadPlan, reader: CheckpointReader, seconds: float) -> None:
    counters = reader.counters
    fetched = counters.disk_bytes + counters.cached_bytes
    through = (
        f"through the page cache, because {counters.buffered_because}" if counters.buffered_because else "directly"
    )
    logger.info(
        "Read %d tensors, %.3f GB, in %.2f s, %.2f GB/s: %.3f GB from the disk (%s), %.3f GB from memory; skipped %d "
        "tensors, %.3f GB, that this rank does not need; reads were under way for %.2f s, waited %.2f s for them, "
        "%.0f MB of buffers",
        counters.tensors,
        counters.tensor_bytes / 1e9,
        seconds,
        fetched / 1e9 / seconds,
        counters.disk_bytes / 1e9,
        through,
        counters.cached_bytes / 1e9,
        plan.skipped_tensors,
        plan.skipped_bytes / 1e9,
        counters.read_seconds,
        counters.wait_seconds,
        counters.buffer_bytes / 1e6,
    )


def _log_preparation(layers: int, preparer: LayerPreparer, seconds: float) -> None:
    logger.info(
        "Prepared and tested %d layers in %.2f s beside the reads, %.2f s of it after the last tensor",
        layers,
        preparer.seconds,
        preparer.wait_seconds,
    )
    logger.info_once("Loading weights took %.2f seconds", seconds)
