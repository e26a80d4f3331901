"""Formats, layouts and error metrics of NVFP4; pure torch, any device, no state."""
