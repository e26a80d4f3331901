"""What the GEMMs for many slots read: every operand of a tile once, by count on the PTX model."""

from __future__ import annotations

import numpy as np
import pytest
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, SCALE_BYTES
from ptx_model import own_kernels
from ptx_model.layer_cases import gemm1, gemm2, make_case, oracle_images, quantize
from ptx_model.testing import needs_compiler
from test_sm100_few import ROWS, WEIGHT_SCALES, WEIGHTS, CountingMemory, reads_by_expert

pytestmark = needs_compiler
COUNTS = [128, 0, 1, 129, 300]
# Reads of an expert's weights: one for each tile of 128 slots, or of 256 in pairs.
TILES, PAIRS = [1, 0, 1, 2, 3], [1, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemm1_n128", TILES),
        ("gemm1_n256", TILES),
        ("gemm1_pair", PAIRS),
        ("gemm2_n128", TILES),
        ("gemm2_pair_add", PAIRS),
    ],
)
def test_weights_are_read_once_for_every_tile_of_slots(monkeypatch, name, expected):
    """Codes and scales; a pair's blocks share both."""
    monkeypatch.setattr(own_kernels, "GlobalMemory", CountingMemory)
    case = make_case(COUNTS, 256, 256, one_scale=True)
    if name.startswith("gemm1"):
        *_, machine = gemm1(case, *quantize(case), name, 2)
    else:
        _, machine = gemm2(case, *oracle_images(case), name, 2)
    for operand in (WEIGHTS, WEIGHT_SCALES):
        assert reads_by_expert(machine, operand, len(COUNTS)) == [{count} for count in expected]


def test_pairs_move_no_more_than_two_tiles_need(monkeypatch):
    """GEMM 2, 256 slots by 256 weight rows: within 5 % of one read of every operand."""
    monkeypatch.setattr(own_kernels, "GlobalMemory", CountingMemory)
    case = make_case([256], 256, 256, one_scale=True)
    _, machine = gemm2(case, *oracle_images(case), "gemm2_pair", 2)
    operands = (ROWS, "argument 1", WEIGHTS, WEIGHT_SCALES)
    moved = sum(int(np.sum(machine.memory.reads[name])) for name in operands)
    assert moved <= 1.05 * 4 * (CODE_BYTES + SCALE_BYTES)
