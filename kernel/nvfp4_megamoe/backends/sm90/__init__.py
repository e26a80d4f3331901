"""Hopper (SM90): NVFP4 weights decoded in registers, BF16 activations (W4A16). See docs/sm90-kernel.md."""
