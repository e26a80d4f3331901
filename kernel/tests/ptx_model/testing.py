"""What the tests that use the model share: fresh seeds, and the mark of the set that CI leaves out.

``SM100_FULL=1 pytest kernel/tests/test_ptx_model*.py kernel/tests/test_sm100*.py`` runs everything.
"""

from __future__ import annotations

import importlib.util
import os
import random

import pytest

full = pytest.mark.skipif(not os.environ.get("SM100_FULL"), reason="not in the reduced set: set SM100_FULL=1")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None,
    reason="nvidia-cutlass-dsl is not installed: pip install -r requirements/sm100.txt",
)


def fresh_seed() -> int:
    """Seed of this test, fresh or from TEST_SEED; pytest prints it with a failure."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().getrandbits(31))
    print(f"TEST_SEED={seed}")
    return seed
