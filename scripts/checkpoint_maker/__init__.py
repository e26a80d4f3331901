"""Writes DeepSeek-V4 checkpoints with random weights: geometry -> tensors -> formats -> shards."""
