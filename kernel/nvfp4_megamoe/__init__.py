"""NVFP4 mixture-of-experts numerics, layer and kernels for DeepSeek-V4; depends on torch, not on vLLM."""

__version__ = "0.1.0"
