"""Planted faults in the two-block GEMM 2 that adds: the PTX model or the oracle must catch every one."""

from __future__ import annotations

import re

import pytest
from nvfp4_megamoe.numerics import metrics
from ptx_model import Deadlock, ModelError, OutOfBounds, ProxyError, own_kernels
from ptx_model.configurations import GEMM2_LIMIT
from ptx_model.layer_cases import expected_output, gemm2, make_case, oracle_images
from ptx_model.testing import needs_compiler

pytestmark = needs_compiler
NAME = "gemm2_pair_add"


@pytest.fixture(scope="module")
def layer():
    """A layer, the oracle's intermediate, and its output."""
    # Two pairs of tiles, the second with one half, by two column tiles; five steps of K pass four stages.
    case = make_case([300], 512, 1280, one_scale=False)
    images, expected = oracle_images(case), expected_output(case)
    assert metrics.relative_l2(gemm2(case, *images, NAME, 2)[0], expected) <= GEMM2_LIMIT
    return case, images, expected


def caught(layer, monkeypatch, change, errors) -> None:
    """The change is reported, or gives a wrong output, in one of several runs."""
    case, images, expected = layer
    host = own_kernels.host_object(NAME)
    changed = change(host.ptx)
    assert changed != host.ptx
    with monkeypatch.context() as patch, pytest.raises(errors):
        patch.setattr(own_kernels, "host_object", lambda _: host.with_ptx(changed))
        for seed in range(8):
            out, _ = gemm2(case, *images, NAME, 2, seed=seed, lateness=1 if seed % 2 else 20)
            assert metrics.relative_l2(out, expected) <= GEMM2_LIMIT


WAIT = r"mbarrier\.try_wait[^;]*;\s*@\w+ bra PAST;\s*bra AGAIN;"


def without_waits(marker: str):
    """Delete every barrier wait whose first instruction of interest afterwards is ``marker``."""

    def change(ptx: str) -> str:
        waits = list(re.finditer(WAIT, ptx))
        ends = [wait.start() for wait in waits[1:]] + [len(ptx)]
        for wait, end in reversed(list(zip(waits, ends, strict=True))):
            found = re.search(r"expect_tx|mapa|tcgen05\.(?:cp|ld)", ptx[wait.end() : end])
            if (found[0] if found else "none") == marker:
                ptx = ptx[: wait.start()] + ptx[wait.end() :]
        return ptx

    return change


@pytest.mark.parametrize(
    "marker",
    [
        pytest.param("expect_tx", id="loads over a full stage"),
        pytest.param("tcgen05.cp", id="multiplies an empty stage"),
        pytest.param("mapa", id="reports an empty stage"),
        pytest.param("tcgen05.ld", id="stores an unfinished accumulator"),
        pytest.param("none", id="multiplies into a used accumulator"),
    ],
)
def test_deleted_barrier_waits_are_caught(layer, monkeypatch, marker):
    caught(layer, monkeypatch, without_waits(marker), (ModelError, AssertionError))


@pytest.mark.parametrize(
    ("pattern", "replacement", "errors"),
    [
        pytest.param(r"(mapa[^;]*, )0;", r"\g<1>1;", ModelError, id="arrives at the wrong block"),
        pytest.param(r"(BOTH, 3; tcgen)", "BOTH, 1; tcgen", Deadlock, id="commits to one block"),
        pytest.param(r"(BOTH, )3(; cp)", r"\g<1>1\2", Deadlock, id="brings scales to one block"),
        pytest.param(r"(expect_tx[^;]*, )38912;", r"\g<1>38896;", Deadlock, id="expects too few bytes"),
        pytest.param(r"fence\.proxy\.async\.shared::cta;", "", ProxyError, id="no fence before the addition"),
        pytest.param(r"cp\.async\.bulk\.wait_group 0;", "", OutOfBounds, id="exits while shared memory is read"),
        pytest.param(r"cta_group::2(\.kind)", r"cta_group::1\1", ModelError, id="multiplies in one block"),
        pytest.param(r"\.add\.noftz\.bf16", "", ModelError, id="not an addition"),
    ],
)
def test_planted_faults_are_caught(layer, monkeypatch, pattern, replacement, errors):
    caught(layer, monkeypatch, lambda ptx: re.sub(pattern, replacement, ptx), errors)
