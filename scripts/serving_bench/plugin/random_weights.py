"""vLLM plugin: ``--load-format dummy`` fills a DeepSeek-V4 model with weights that behave like a trained model's.

vLLM's own dummy weights leave packed tensors as they were in memory and make hidden states so small that every token is
routed to the same experts: a benchmark of them measures a batch that no user sends. Here every activation keeps the
size of its input, the router chooses different experts for different tokens, and a name's values are the same in every
process: stock and patched vLLM hold equal weights, and ranks get equal shards of what is divided among them.
"""

from __future__ import annotations

import math
import zlib

import torch

_FP8_STD = 32.0
_BLOCK = 128

# Of the routed experts; the patched vLLM's own dummy loading sets the same values (model_executor/nvfp4/parameters.py).
_EXPERT_GLOBAL = 5e-5
_EXPERT_INPUT = 8.0 / (6 * 448)
_EXPERT_CODES = ("w13_weight", "w2_weight")
_EXPERT_SCALES = ("w13_weight_scale", "w2_weight_scale")

_ROUTER_GAIN = 3.0  # standard deviation of a router logit
_GAINS = (("wo_b", 0.25), ("shared_experts.down_proj", 0.03), ("compressor", 0.3), ("lm_head", 1.6))


def install() -> None:
    """Replace the loader behind ``--load-format dummy``."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader("dummy")
    class RandomWeightsLoader(DummyModelLoader):
        def load_weights(self, model, model_config) -> None:
            parameters = dict(model.named_parameters())
            for name, parameter in parameters.items():
                if name.endswith(".tid2eid"):
                    fill_hash_table(name, parameter.data, len(parameters[name.replace("tid2eid", "weight")]))
                else:
                    fill(name, parameter.data)


def fill(name: str, tensor: torch.Tensor) -> None:
    """Give ``tensor``, the parameter called ``name`` in vLLM's model, its values in place."""
    kind = name.rsplit(".", 1)[-1]
    if kind in _EXPERT_CODES and tensor.dtype == torch.uint8:
        tensor.random_(0, 256, generator=_generator(tensor, 0))
    elif kind in _EXPERT_SCALES and tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).random_(0x50, 0x78, generator=_generator(tensor, 1))
    elif kind.endswith("weight_scale_2"):
        tensor.fill_(_EXPERT_GLOBAL)
    elif kind.endswith("input_scale"):
        tensor.fill_(_EXPERT_INPUT)
    elif "scale" in kind and tensor.ndim == 2:  # of a linear layer, one for each block of 128 x 128
        columns = tensor.shape[1] * _BLOCK
        tensor.copy_(torch.full(tensor.shape, _power_of_two(_gain(name) / math.sqrt(columns)), device=tensor.device))
    elif tensor.dtype == torch.float8_e4m3fn:
        _normal(name, tensor, _FP8_STD)
    elif not tensor.is_floating_point():
        tensor.zero_()
    elif kind.endswith("_fn") or kind == "ape":
        _normal(name, tensor, 0.02)
    elif kind.endswith("_base"):
        _normal(name, tensor, 0.1)
    elif kind.endswith("_scale") and "hc_" in kind:
        tensor.fill_(0.1)
    elif kind in ("attn_sink", "bias", "e_score_correction_bias"):
        _normal(name, tensor, 0.01)
    elif tensor.ndim == 2:
        _normal(name, tensor, 1.0 if "embed" in name else _gain(name) / math.sqrt(tensor.shape[1]))
    else:
        tensor.fill_(1.0)  # norms, and scales of whole tensors


def fill_hash_table(name: str, tensor: torch.Tensor, experts: int) -> None:
    """Give each token id, a row of ``tensor``, different ones of ``experts`` experts."""
    generator = _generator(tensor, zlib.crc32(name.encode()))
    for rows in tensor.split(1 << 14):
        draws = torch.rand((len(rows), experts), device=tensor.device, generator=generator)
        rows.copy_(draws.argsort(dim=1)[:, : rows.shape[1]])


def _gain(name: str) -> float:
    """Standard deviation of a linear layer's output for inputs of standard deviation 1."""
    if name.endswith("gate.weight"):
        return _ROUTER_GAIN
    return next((gain for part, gain in _GAINS if part in name), 1.0)


def _power_of_two(value: float) -> float:
    """What both kinds of block scales hold exactly, times what brings FP8 codes to standard deviation 1."""
    return 2.0 ** round(math.log2(value / _FP8_STD))


def _normal(name: str, tensor: torch.Tensor, std: float) -> None:
    generator = _generator(tensor, zlib.crc32(name.encode()))
    flat = tensor.view(-1)
    for part in flat.split(1 << 26):  # float32 of a large embedding would not fit beside the weights
        values = torch.randn(part.shape, device=tensor.device, generator=generator).mul_(std)
        part.copy_(values.clamp_(-448, 448) if tensor.dtype == torch.float8_e4m3fn else values)


def _generator(tensor: torch.Tensor, seed: int) -> torch.Generator:
    return torch.Generator(device=tensor.device).manual_seed(seed)
