"""What NVFP4 experts need inside vLLM beside the adapter: checks, parameters, switches."""
