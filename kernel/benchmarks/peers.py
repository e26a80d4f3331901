"""MoE layers that are timed side by side: this project's, in each precision, and vLLM's own for NVFP4 weights.

Every contender gets the same checkpoint tensors, activations and routing. vLLM takes the gate's global scale for the up
projection too, so the weights given to it must have both equal.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, fields

import torch
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.weights import ExpertWeights

PEERS = ("marlin", "humming")  # vLLM's NVFP4 backends for Hopper, by their --moe-backend names
_GIB = 1 << 30


class UnavailableError(RuntimeError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Preparation:
    """What bringing the loaded tensors into a contender's layout costs.

    Attributes:
        seconds: wall time of the second of two layers, which compiles nothing any more.
        first_seconds: of the first one.
        extra_gib: peak device memory above what stays allocated afterwards; 0 on a device without that count.
    """

    seconds: float
    first_seconds: float
    extra_gib: float


class OwnContender:
    """This project's layer, as ``select`` chooses it for the device.

    Raises:
        UnavailableError: no backend computes ``geometry`` in ``precision`` on this device.
    """

    def __init__(self, geometry: MoEGeometry, weights: ExpertWeights, precision: str) -> None:
        device = weights.w13.device
        if reason := select.unsupported_reason(geometry, device, precision):
            raise UnavailableError(reason)
        self.name = f"own {precision}"
        self.preparation, self.layer = _prepare_twice(lambda: self._prepare(geometry, weights, precision), device)
        self.backend = self.layer.backend.name

    @staticmethod
    def _prepare(geometry: MoEGeometry, weights: ExpertWeights, precision: str):
        copies = ExpertWeights(**{f.name: getattr(weights, f.name).clone() for f in fields(weights)})
        backend = select.select(geometry, weights.w13.device, precision)
        return lambda: MoELayer(geometry, copies, backend)

    def reserve(self, tokens: int) -> None:
        """Allocate what calls of ``tokens`` tokens need."""
        device = self.layer._device
        self.out = torch.empty((tokens, self.layer.geometry.hidden), dtype=torch.bfloat16, device=device)
        self.workspace = torch.empty(self.layer.backend.workspace_bytes(tokens), dtype=torch.uint8, device=device)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """[T, H] bfloat16 for x bfloat16 [T, H], topk_ids int32 [T, K], topk_weights float32 [T, K]."""
        return self.layer(x, topk_ids, topk_weights, out=self.out, workspace=self.workspace)


class VllmContender:
    """A NVFP4 MoE layer of the installed vLLM with one of its backends, built as the model builds it.

    Raises:
        UnavailableError: vLLM is not installed, or refuses this backend here.
    """

    def __init__(self, geometry: MoEGeometry, weights: ExpertWeights, moe_backend: str, max_tokens: int) -> None:
        self.name = self.backend = moe_backend
        device = weights.w13.device
        try:
            self._config = vllm_config(moe_backend, max_tokens)
            with self._context(), _defaults(device):
                build = lambda: self._prepare(geometry, weights)  # noqa: E731
                self.preparation, (self._layer, self._method) = _prepare_twice(build, device)
        except (ImportError, NotImplementedError, ValueError, RuntimeError, AssertionError) as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    def _prepare(self, geometry: MoEGeometry, weights: ExpertWeights):
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        quantization = ModelOptNvFp4Config(
            is_checkpoint_nvfp4_serialized=True, kv_cache_quant_algo=None, exclude_modules=[], group_size=16
        )
        layer = FusedMoEFactory(
            num_experts=geometry.num_experts,
            top_k=geometry.top_k,
            hidden_size=geometry.hidden,
            intermediate_size=geometry.intermediate,
            params_dtype=torch.bfloat16,
            quant_config=quantization,
            prefix=f"{self.name}.{time.monotonic_ns()}.experts",  # vLLM refuses a name used before
            renormalize=True,
            swiglu_limit=geometry.swiglu_limit,
        ).routed_experts
        for name, tensor in loaded_parameters(weights).items():
            getattr(layer, name).data.copy_(tensor)

        def convert():
            layer.quant_method.process_weights_after_loading(layer)
            return layer, layer.quant_method

        return convert

    @contextlib.contextmanager
    def _context(self):
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._config):
            yield

    def reserve(self, tokens: int) -> None:
        """vLLM's workspaces grow at the first call."""
        self._tokens = tokens

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See ``OwnContender``."""
        from vllm.forward_context import set_forward_context

        with self._context(), set_forward_context(None, self._config, num_tokens=len(x)):
            return self._method.apply(self._layer, x, topk_weights, topk_ids, None, None)


def loaded_parameters(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """``weights`` under the names of vLLM's parameters."""
    return {
        "w13_weight": weights.w13, "w13_weight_scale": weights.w13_scale,
        "w13_weight_scale_2": weights.w13_global, "w13_input_scale": weights.w13_input_scale,
        "w2_weight": weights.w2, "w2_weight_scale": weights.w2_scale,
        "w2_weight_scale_2": weights.w2_global, "w2_input_scale": weights.w2_input_scale,
    }  # fmt: skip


def vllm_config(moe_backend: str, max_tokens: int):
    """A configuration for single layers on one device, and the process group that they ask for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    config = VllmConfig(kernel_config=KernelConfig(moe_backend=moe_backend))
    config.scheduler_config.max_num_batched_tokens = max_tokens
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                address = "tcp://{}:{}".format(*probe.getsockname())
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, address, 0, backend)
        ensure_model_parallel_initialized(1, 1)
        if not is_workspace_manager_initialized():
            init_workspace_manager(device)
    return config


def _prepare_twice(build, device: torch.device):
    """Build, then convert, two equal layers one after the other; the second one is kept and measured.

    ``build()`` allocates the loaded tensors and returns the function that converts them and gives the layer.
    """
    convert = build()
    first_seconds, _, layer = _measured(convert, device)
    del layer, convert
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seconds, extra, layer = _measured(build(), device)
    return Preparation(seconds, first_seconds, extra / _GIB), layer


def _measured(convert, device: torch.device):
    if device.type != "cuda":
        begin = time.perf_counter()
        result = convert()
        return time.perf_counter() - begin, 0, result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = convert()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), result


@contextlib.contextmanager
def _defaults(device: torch.device):
    """vLLM builds parameters on the default device in the default dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)
