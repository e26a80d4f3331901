"""The backend that takes over a layer that failed its test: whether it can, asked before the load, and how."""

from __future__ import annotations

from copy import copy

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kNvfp4Dynamic, kNvfp4Static

from .gate_setting import FALLBACK, ONE_SCALE, VARIABLE, read_setting

logger = init_logger(__name__)


def refuse_impossible(
    geometry: MoEGeometry,
    config: FusedMoEConfig,
    serving: tuple[str | None, str | None],
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
) -> None:
    """Refuse a setting that could not be followed if a layer failed, while the model is made.

    Args:
        geometry: of a layer on this rank.
        config, weight_key, activation_key: of the same layer, as vLLM states them.
        serving: name and precision that the serving backend is chosen with, None for the automatic choice.

    Raises:
        ValueError: the setting is unknown, or its fallback cannot serve this layer or this deployment.
    """
    setting = read_setting()
    if setting.mode != FALLBACK:
        return
    other = setting.fallback
    assert other is not None
    where = f"{VARIABLE}=fallback:{other.backend}" + (f":{other.precision}" if other.precision else "")
    parallel = config.moe_parallel_config
    if parallel.enable_eplb:
        raise ValueError(
            f"{where}: expert load balancing moves weights between ranks, which must all have one layout. Use strict"
        )
    if other.is_ours:
        device = torch.device(config.device)
        if reason := select.unsupported_reason(geometry, device, other.precision, other.backend):
            raise ValueError(f"{where}: {reason}")
        name, precision = serving
        chosen = select.select(geometry, device, precision, name)
        instead = select.select(geometry, device, other.precision, other.backend)
        if (chosen.name, chosen.precision) == (instead.name, instead.precision):
            raise ValueError(f"{where}: that is what serves. Name another backend or another precision")
        return
    if parallel.dp_size > 1:
        raise ValueError(
            f"{where}: data-parallel ranks exchange activations in one form, and a layer may fail on one rank alone. "
            "Choose a fallback of ours, or strict"
        )
    logger.info_once("%s: asking vLLM whether its %s could take over a layer that fails its test", where, other.backend)
    _vllms_choice(other.backend, config, weight_key, activation_key)


def hand_over(layer: torch.nn.Module, weights: ExpertWeights, backend: str) -> None:
    """Let vLLM's ``backend`` prepare and serve ``layer``, whose parameters hold ``weights`` as loaded.

    Raises:
        ValueError: vLLM's backend would compute with other scales than the checkpoint's, or supports the layer no more.
    """
    unequal = (weights.w13_global[:, 0] != weights.w13_global[:, 1]).nonzero().flatten().tolist()
    if unequal:
        raise ValueError(f"gate and up scales of local expert(s) {unequal[:4]} differ. {ONE_SCALE}")
    method = layer.quant_method
    activation_key = None if method.use_a16 else kNvfp4Dynamic
    method.nvfp4_backend, method.experts_cls = _vllms_choice(backend, method.moe, kNvfp4Static, activation_key)
    method.use_global_sf = nvfp4.is_global_sf_supported_for_nvfp4_backend(method.nvfp4_backend)
    method.process_weights_after_loading(layer)


def _vllms_choice(
    backend: str, config: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
) -> tuple[nvfp4.NvFp4MoeBackend, type[mk.FusedMoEExperts]]:
    """What vLLM takes for ``--moe-backend backend``; its ValueError says why it takes nothing."""
    try:
        config = copy(config)  # not replaced: that would undo how vLLM has rounded its sizes since it was made
        config.moe_backend = backend
        return nvfp4.select_nvfp4_moe_backend(config, weight_key, activation_key)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}=fallback:{backend}: {error}") from error
