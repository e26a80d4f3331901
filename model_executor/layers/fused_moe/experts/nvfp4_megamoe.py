"""Adapter between vLLM's modular MoE and ``nvfp4_megamoe``: it passes tensors on and holds no arithmetic."""

from __future__ import annotations

import os

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.weights import ExpertWeights
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kNvfp4Dynamic, kNvfp4Static
from vllm.model_executor.nvfp4 import bisect, fallback, layer_gate, parameters

logger = init_logger(__name__)


def _geometry(config: FusedMoEConfig) -> MoEGeometry:
    return MoEGeometry(
        num_experts=config.num_experts,
        num_local_experts=config.num_local_experts,
        top_k=config.experts_per_token,
        hidden=config.hidden_dim,
        intermediate=config.intermediate_size_per_partition,
        swiglu_limit=config.swiglu_limit,
    )


def _precision() -> str | None:
    """The precision asked for with MEGA_MOE_PRECISION, or None for the backend's own choice."""
    value = os.environ.get("MEGA_MOE_PRECISION", "auto")
    return None if value == "auto" else value


def _backend() -> str | None:
    """The only backend to consider, named with MEGA_MOE_BACKEND, or None for the automatic choice."""
    value = os.environ.get("MEGA_MOE_BACKEND", "auto")
    return None if value == "auto" else value


class Nvfp4MegaMoEExperts(mk.FusedMoEExpertsModular):
    """NVFP4 routed experts on this project's kernels.

    Weights stay in the layer's own parameters in ModelOpt's layout: ``w13`` holds the gate rows and then the up
    rows, ``w13_weight_scale_2`` and ``w13_input_scale`` are [experts, 2] with a column for each. Activations arrive
    unquantized, so that a backend quantizes them per expert; the output is weighted and summed over a token's slots.
    """

    layer: MoELayer | None = None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        supported, reason = mk.FusedMoEExpertsModular.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return False, reason
        geometry, device = _geometry(moe_config), torch.device(moe_config.device)
        reason = select.unsupported_reason(geometry, device, _precision(), _backend())
        if reason is None:
            serving = (_backend(), _precision())
            fallback.refuse_impossible(geometry, moe_config, serving, weight_key, activation_key)
        return reason is None, reason

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # is_supported_config asks the kernels themselves, which need the geometry too

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return weight_key == kNvfp4Static and activation_key in (kNvfp4Dynamic, None)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    @staticmethod
    def mark_unloaded(layer: torch.nn.Module) -> None:
        """Fill the scales of ``layer`` with NaN, so that a tensor the loader never wrote is found."""
        parameters.mark_unloaded(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if get_current_vllm_config().load_config.load_format == "dummy":
            parameters.fill_dummy(layer)
        weights = ExpertWeights(
            w13=layer.w13_weight.data,
            w13_scale=layer.w13_weight_scale.data,
            w13_global=layer.w13_weight_scale_2.data,
            w13_input_scale=layer.w13_input_scale.data,
            w2=layer.w2_weight.data,
            w2_scale=layer.w2_weight_scale.data,
            w2_global=layer.w2_weight_scale_2.data,
            w2_input_scale=layer.w2_input_scale.data,
        )
        weights.validate(layer.layer_name)
        geometry = _geometry(self.moe_config)
        backend = select.select(geometry, weights.w13.device, _precision(), _backend())
        bisect.log_layer(layer.layer_name, weights)
        self.layer_name = layer.layer_name
        self.layer = layer_gate.prepare(layer, geometry, weights, backend)
        if self.layer is None:
            return  # a backend of vLLM's own has taken this object's place
        backend = self.layer.backend
        logger.info_once("NVFP4 experts run on nvfp4_megamoe: backend %s, %s", backend.name, backend.precision)

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        assert self.layer is not None
        # The second workspace: the first shares its storage with the output. Both count in activations, not bytes.
        element = self.moe_config.in_dtype.itemsize
        scratch = -(-self.layer.backend.workspace_bytes(M) // element)
        return (0,), (scratch,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:
            raise NotImplementedError(
                "nvfp4_megamoe weights a token's slots where they are summed; a model that weights the layer's input "
                "needs another --moe-backend"
            )
        assert self.layer is not None
        if bisect.STATIC_MOE:
            output.zero_()
            return
        bisect.log_call(self.layer_name, hidden_states, topk_ids, expert_map)
        self.layer(
            hidden_states, topk_ids, topk_weights, expert_map, out=output, workspace=workspace2.view(torch.uint8)
        )
