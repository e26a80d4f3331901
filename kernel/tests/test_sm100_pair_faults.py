"""Planted faults in the two-block GEMM 2 that adds: the PTX model or the oracle must catch every one."""

from __future__ import annotations

import random
import re

import pytest
from nvfp4_megamoe.numerics import metrics
from ptx_model import Deadlock, ModelError, OutOfBounds, ProxyError, own_kernels
from ptx_model.configurations import GEMM2_LIMIT
from ptx_model.layer_cases import expected_output, gemm2, make_case, oracle_images
from ptx_model.testing import full, needs_compiler
from test_sm100_faults import without_wait

pytestmark = needs_compiler
NAME = "gemm2_pair_add"


@pytest.fixture(scope="module")
def layer():
    """A layer, the oracle's intermediate, its output, and the barrier waits that ran without a fault."""
    # Two pairs of tiles, the second with one half, by two column tiles; five steps of K pass four stages.
    case = make_case([300], 512, 1280, one_scale=False)
    images, expected = oracle_images(case), expected_output(case)
    out, machine = gemm2(case, *images, NAME, 2)
    assert metrics.relative_l2(out, expected) <= GEMM2_LIMIT
    waits = [ins.index for ins in machine.program.instructions if "try_wait" in ins.opcode]
    return case, images, expected, [number for number, index in enumerate(waits) if index in machine.visited]


def caught(layer, monkeypatch, change, errors) -> None:
    """The change is reported, or gives a wrong output, in one of several runs."""
    case, images, expected, _ = layer
    host = own_kernels.host_object(NAME)
    changed = change(host.ptx)
    assert changed != host.ptx
    with monkeypatch.context() as patch, pytest.raises(errors):
        patch.setattr(own_kernels, "host_object", lambda _: host.with_ptx(changed))
        for seed in range(6):
            assert metrics.relative_l2(gemm2(case, *images, NAME, 2, seed=seed)[0], expected) <= GEMM2_LIMIT


@pytest.mark.parametrize("share", [pytest.param(2, id="two"), pytest.param(1000, id="all", marks=full)])
def test_every_deleted_barrier_wait_is_caught(layer, monkeypatch, share):
    numbers = layer[-1]
    assert len(numbers) >= 5
    for number in random.Random(layer[0].seed).sample(numbers, min(share, len(numbers))):
        caught(layer, monkeypatch, without_wait(number), (ModelError, AssertionError))


@pytest.mark.parametrize(
    ("pattern", "replacement", "errors"),
    [
        pytest.param(r"(mapa[^;]*, )0;", r"\g<1>1;", ModelError, id="arrives at the wrong block"),
        pytest.param(r"BOTH, 3;", "BOTH, 1;", Deadlock, id="commits to one block"),
        pytest.param(r"(expect_tx[^;]*, )38912;", r"\g<1>38896;", Deadlock, id="expects too few bytes"),
        pytest.param(r"fence\.proxy\.async\.shared::cta;", "", ProxyError, id="no fence before the addition"),
        pytest.param(r"cp\.async\.bulk\.wait_group 0;", "", OutOfBounds, id="exits while shared memory is read"),
        pytest.param(r"cta_group::2(\.kind)", r"cta_group::1\1", ModelError, id="multiplies in one block"),
        pytest.param(r"\.add\.noftz\.bf16", "", ModelError, id="not an addition"),
    ],
)
def test_planted_faults_are_caught(layer, monkeypatch, pattern, replacement, errors):
    caught(layer, monkeypatch, lambda ptx: re.sub(pattern, replacement, ptx), errors)
