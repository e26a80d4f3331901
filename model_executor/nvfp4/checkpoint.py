"""Check an NVFP4 checkpoint against its own configuration before any engine process reads a weight."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from . import progress

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


def check_before_load(vllm_config: VllmConfig) -> None:
    """Refuse a checkpoint whose files cannot become the model that its config.json promises.

    Reads shard headers only, and for some settings of the layer test two scalars of each expert. Reads nothing for
    checkpoints without NVFP4 experts, for dummy weights and for model names that are not a local directory: those are
    checked after loading, layer by layer.

    Raises:
        nvfp4_megamoe.errors.CheckpointError: naming file, tensor, expectation and remedy.
        ValueError: MEGA_MOE_LAYER_TEST is unknown, or names a fallback that cannot serve this checkpoint.
    """
    progress.withdraw_refusals()
    model = vllm_config.model_config
    quantization = getattr(model.hf_config, "quantization_config", None) or {}
    if str(quantization.get("moe_quant_algo", "")).upper() != "NVFP4":
        return
    directory = Path(model.model)
    readable = vllm_config.load_config.load_format != "dummy" and directory.is_dir()
    from nvfp4_megamoe.checkpoint.validate import check_checkpoint

    from .gate_setting import read_setting, refuse_unequal_scales

    started = time.monotonic()
    parallel = vllm_config.parallel_config
    # Without expert parallelism vLLM still asks that the experts divide over the tensor-parallel ranks.
    ranks = parallel.tensor_parallel_size * (parallel.data_parallel_size if parallel.enable_expert_parallel else 1)
    try:
        read_setting()
        if not readable:
            return
        summary = check_checkpoint(directory, expert_parallel_size=ranks)
        refuse_unequal_scales(directory)
    except ValueError as error:  # CheckpointError, or a setting that cannot be followed
        progress.announce_refusal(vllm_config, str(error))
        raise
    logger.info("NVFP4 checkpoint checked in %.1f s: %s", time.monotonic() - started, summary)
