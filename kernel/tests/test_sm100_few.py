"""The SM100 kernels for few tokens: what they move, what they leave alone, and planted faults of their GEMM 2.

Their results are verified with the other kernels' in ``test_sm100_kernels.py``, faults of GEMM 1 in
``test_sm100_faults.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvfp4_megamoe.backends.sm100 import catalogue, layout
from nvfp4_megamoe.backends.sm100.layout import FEW_SLOTS
from nvfp4_megamoe.numerics import metrics
from ptx_model import ModelError, ProxyError, own_kernels
from ptx_model.configurations import GEMM2_LIMIT
from ptx_model.layer_cases import expected_output, gemm1, gemm2, make_case, oracle_images, quantize, sum_slots
from ptx_model.memory import GlobalMemory
from ptx_model.testing import needs_compiler

pytestmark = needs_compiler
compiled = own_kernels.host_object
ROWS, WEIGHTS, WEIGHT_SCALES = "argument 0", "argument 3", "argument 4"


class CountingMemory(GlobalMemory):
    """Counts how often every byte of a buffer is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, np.ndarray] = {}

    def gather(self, addresses, size):
        for address in addresses.astype(np.int64):
            for base, name, data in self._buffers:
                if base <= address < base + data.size:
                    counts = self.reads.setdefault(name, np.zeros(data.size, np.int64))
                    counts[address - base : address - base + size] += 1
        return super().gather(addresses, size)


def reads_by_expert(machine, name: str, experts: int) -> list[set[int]]:
    """How often the bytes of each expert's part of a buffer were read."""
    return [set(part.tolist()) for part in np.split(machine.memory.reads[name], experts)]


@pytest.mark.parametrize("first", [True, False])
def test_weights_are_read_once_for_every_part_of_an_experts_slots(monkeypatch, first):
    """No byte of an expert without slots; every byte once for up to 16 slots, twice for 17."""
    monkeypatch.setattr(own_kernels, "GlobalMemory", CountingMemory)
    case = make_case([16, 0, 1, 17], 512, 256, one_scale=True)
    if first:
        *_, machine = gemm1(case, *quantize(case), "gemm1_few16", 2)
    else:
        _, machine = gemm2(case, *oracle_images(case, 16), "gemm2_few16", 2)
    for name in (WEIGHTS, WEIGHT_SCALES):
        assert reads_by_expert(machine, name, 4) == [{1}, {0}, {1}, {2}]
    reads = machine.memory.reads[ROWS]
    if first:
        # Each of the 4 tiles of weight rows gathers the rows that have slots, and no other.
        used = torch.bincount(case.plan.a_row[: int((case.topk_ids >= 0).sum())], minlength=len(case.x)).numpy()
        assert (reads.reshape(len(case.x), -1) == 4 * used[:, None]).all()
    else:
        # Each of the 4 tiles reads parts of 16 rows: one of the first image, one of the second, two of the third.
        images = reads.reshape(-1, 128 // 16, 16 * 128)
        parts = [[4] + 7 * [0], [4] + 7 * [0], [4, 4] + 6 * [0]]
        assert (images[:3] == np.array(parts)[..., None]).all()
        assert not images[3:].any()


@pytest.mark.parametrize("slots", FEW_SLOTS)
def test_rows_without_a_slot_are_neither_written_nor_used(slots):
    case = make_case([3, 70], 512, 256, one_scale=False)
    out, out_scale, _ = gemm1(case, *quantize(case), f"gemm1_few{slots}", 2)
    codes, scale = layout.codes_of(out), layout.scales_of_parts(out_scale, slots)
    unused = torch.ones(len(codes), dtype=torch.bool)
    for expert in range(2):
        unused[case.rows_of(expert)[1]] = False
    assert (codes[unused] == 0xA5).all()
    assert (scale[unused] == 0xA5).all()
    # Codes of all bits and scales of NaN in those rows.
    right, right_scale = oracle_images(case, slots)
    codes, scale = layout.codes_of(right), layout.scales_of_parts(right_scale, slots)
    codes[unused], scale[unused] = 0xFF, 0x7F
    rows, _ = gemm2(case, layout.code_images(codes), layout.scale_parts(scale, slots), f"gemm2_few{slots}", 2)
    assert metrics.relative_l2(sum_slots(case, rows), expected_output(case)) <= GEMM2_LIMIT


@pytest.mark.parametrize("slots", FEW_SLOTS)
def test_batch_without_a_slot_writes_nothing(slots):
    case = make_case([0, 0], 512, 256, one_scale=False)
    out, out_scale, _ = gemm1(case, *quantize(case), f"gemm1_few{slots}", 2)
    assert (out == 0xA5).all()
    assert (out_scale == 0xA5).all()
    rows, _ = gemm2(case, *oracle_images(case, slots), f"gemm2_few{slots}", 2)
    assert not rows.any()


def test_stages_keep_three_latencies_of_weights_under_way():
    """docs/sm100-kernel.md: 54 KB a microsecond and SM, most of it weights."""
    under_way = {
        name: catalogue.stages(name) * (layout.CODE_BYTES + layout.SCALE_BYTES)
        for name in catalogue.NAMES
        if "few" in name
    }
    assert min(under_way.values()) >= 2.3 * 54000
    assert min(size for name, size in under_way.items() if "few16" in name) >= 3.4 * 54000


@pytest.fixture(scope="module")
def batch():
    """Several tiles for the one block, parts of several slots, and the images that the oracle has."""
    case = make_case([20, 9], 512, 256, one_scale=False)
    return case, oracle_images(case, 16)


def error_of(batch, monkeypatch, change, seed: int) -> float:
    """Relative L2 of GEMM 2 and the sum with changed PTX."""
    case, images = batch
    host = compiled("gemm2_few16")
    changed = host.with_ptx(change(host.ptx))
    monkeypatch.setattr(own_kernels, "host_object", lambda name: changed if "few" in name else compiled(name))
    rows, _ = gemm2(case, *images, "gemm2_few16", 1, seed=seed)
    return metrics.relative_l2(sum_slots(case, rows), expected_output(case))


def test_second_gemm_without_the_fence_before_its_stores(batch, monkeypatch):
    with pytest.raises(ProxyError, match=r"without fence\.proxy\.async"):
        error_of(batch, monkeypatch, lambda ptx: ptx.replace("fence.proxy.async.shared::cta;", ""), 0)


@pytest.mark.parametrize(
    "wait", ["cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"], ids=["reuse", "exit"]
)
def test_second_gemm_without_a_wait_for_its_stores(batch, monkeypatch, wait):
    """Lines of shared memory are written again while a store still reads them, or given up."""
    assert wait in compiled("gemm2_few16").ptx
    found = []
    for seed in range(8):
        try:
            found.append(error_of(batch, monkeypatch, lambda ptx: ptx.replace(wait, ""), seed) > GEMM2_LIMIT)
        except ModelError:
            found.append(True)
    assert any(found)


def test_second_gemm_with_a_wrong_alpha_of_one_expert(batch):
    case, images = batch
    kept = case.parameters.second.clone()
    case.parameters.second[1, 0] *= 1.25
    rows, _ = gemm2(case, *images, "gemm2_few16", 1)
    case.parameters.second.copy_(kept)
    assert metrics.relative_l2(sum_slots(case, rows), expected_output(case)) > 2 * GEMM2_LIMIT
