"""Fresh random inputs for every run, with the seed in the report of a failing test."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import settings

settings.register_profile("kernel", deadline=None, print_blob=True)
settings.load_profile("kernel")

# Tensors here are small: more threads only wait for one another, tenfold so where other processes use the cores.
torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """Generator seeded afresh, or from TEST_SEED to repeat a run."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().getrandbits(31))
    print(f"TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
