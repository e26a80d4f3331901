"""PyTorch implementations of the ``torch.ops._C`` operators that DeepSeek-V4 needs on a CPU.

vLLM ships these operators compiled for AVX512_BF16 hosts only. ``register.register_missing_ops`` provides the absent
ones under the same names and schemas, so that vLLM's own model code runs unchanged on any x86-64 CPU;
``metadata_kernels.register_metadata_kernels`` does the same for the Triton kernels that build attention metadata.

The package imports nothing but torch and NumPy: it is loaded while vLLM is still choosing its platform.
"""
