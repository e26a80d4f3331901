"""The Hopper GEMM kernels, executed on the PTX model against the oracle; planted faults must be noticed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.backends.sm90 import build
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.numerics.metrics import relative_l2
from ptx_model import Deadlock, ModelError, ProxyError, UndefinedRead
from ptx_model.wgmma import HazardError
from sm90_model import BF16, DOWN, E4M3, GATE_UP, Kernel, Slots, execute, expected

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from moe_peers import random_weights

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")

LIMIT = 0.004  # one rounding to bfloat16
SWIGLU_LIMIT = 10.0
GATHERS = Kernel(GATE_UP, BF16, 4, 2, 16, 16, 8)
TILED = Kernel(GATE_UP, BF16, 2, 2, 48, 32, 8)
DOWNWARD = Kernel(DOWN, E4M3, 2, 2, 48, 48, 8)
WIDE = Kernel(DOWN, E4M3, 2, 1, 256, 256, 32)


def error_of(kernel: Kernel, rng: torch.Generator, plant: Callable = lambda p: p) -> float:
    """Relative L2 of one projection: odd numbers of units and k blocks, an empty expert, one of two tiles, stream-K."""
    counts = (kernel.widest // 3, 0, kernel.widest + 3)
    g = MoEGeometry(3, 3, 1, hidden=640, intermediate=384, swiglu_limit=SWIGLU_LIMIT)
    weights = random_weights(g, rng.initial_seed() % 2**31, "cpu")
    weights.w13_global[:, 1] *= 1.7
    slots = Slots.of(counts, kernel.widest + 9, rng)
    shape = (kernel.widest + 9, g.hidden) if kernel.phase == GATE_UP else (slots.capacity, g.intermediate)
    x = torch.randn(shape, generator=rng).bfloat16()
    out = execute(kernel, weights, x, slots, 4, SWIGLU_LIMIT, rng.initial_seed(), plant)
    mine = torch.zeros(slots.capacity, dtype=torch.bool)
    for e in range(len(counts)):
        mine[slots.rows(e)] = True
    assert out[~mine].view(torch.int16).eq(-1).all(), "a row that is no slot's was written"
    return relative_l2(out[mine], expected(kernel, weights, x, slots, SWIGLU_LIMIT)[mine])


def tries(rng: torch.Generator) -> Iterator[torch.Generator]:
    """Generators for several tries, each with values and a schedule of its own: one may happen to hide a fault."""
    for _ in range(5):
        yield torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=rng)))


@pytest.mark.parametrize("kernel", [GATHERS, TILED, DOWNWARD, WIDE])
def test_against_the_oracle(kernel: Kernel, rng: torch.Generator) -> None:
    assert error_of(kernel, rng) <= LIMIT


@pytest.mark.parametrize(
    ("kernel", "pattern", "instead", "errors"),
    [
        (GATHERS, r"wgmma\.wait_group\.sync\.aligned 1;", "", (HazardError, UndefinedRead, Deadlock)),
        (DOWNWARD, r"wait_group\.sync\.aligned 1;", "wait_group.sync.aligned 4;", (HazardError, UndefinedRead)),
        (GATHERS, r"fence\.proxy\.async\.shared::cta;", "", (ProxyError,)),
    ],
)
def test_planted_faults(kernel: Kernel, pattern: str, instead: str, errors: tuple, rng: torch.Generator) -> None:
    def plant(text: str) -> str:
        changed, count = re.subn(pattern, instead, text)
        assert count
        return changed

    with pytest.raises(errors):
        for each in tries(rng):
            error_of(kernel, each, plant)


def test_a_stage_that_was_read_too_early_must_be_read_again(rng: torch.Generator) -> None:
    def believe(text: str) -> str:
        changed, count = re.subn(r"(mbarrier\.test_wait[^;]*;\s*selp\.u32 \S+) 1, 0,", r"\1 1, 1,", text)
        assert count
        return changed

    for each in tries(rng):
        try:
            error = error_of(WIDE, each, believe)
        except ModelError:
            return
        if not error <= LIMIT:
            return
    pytest.fail("every try hid it")
