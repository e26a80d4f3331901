"""Planted faults in the compiled kernels: the PTX model or the oracle must catch every one."""

from __future__ import annotations

import random
import re

import pytest
import torch
from ptx_model import Deadlock, ModelError, ProxyError, UndefinedRead, own_kernels
from ptx_model.layer_cases import codes_equal, gemm1, make_case, quantize
from ptx_model.testing import full, needs_compiler

pytestmark = needs_compiler
compiled = own_kernels.host_object
# Share of equal codes: in these small batches one rounding tie is more than the 0.01 % that a kernel may differ by.
RIGHT = 0.9995


@pytest.fixture(scope="module", params=[("gemm1_n128", [150]), ("gemm1_few16", [20, 16])], ids=lambda param: param[0])
def layer(request):
    """A kernel of GEMM 1, a layer, its quantized activations, and the barrier waits that ran without a fault."""
    name, counts = request.param
    # Five steps of K: the compiler's loop of four and its rest both run.
    case = make_case(counts, 1280, 256, one_scale=False)
    codes, scale = quantize(case)
    out, out_scale, machine = gemm1(case, codes, scale, name, 1)
    assert codes_equal(case, out, out_scale) >= RIGHT
    waits = [ins.index for ins in machine.program.instructions if "try_wait" in ins.opcode]
    return name, case, codes, scale, [number for number, index in enumerate(waits) if index in machine.visited]


def run(layer, monkeypatch, change=lambda ptx: ptx, **options) -> float:
    """Share of right codes with changed PTX."""
    name, case, codes, scale, _ = layer
    host = compiled(name)
    changed = change(host.ptx)
    assert changed != host.ptx or options
    monkeypatch.setattr(own_kernels, "host_object", lambda _: host.with_ptx(changed))
    out, out_scale, _ = gemm1(case, codes, scale, name, 1, **options)
    return codes_equal(case, out, out_scale)


def caught(layer, monkeypatch, change, errors) -> None:
    """The change is reported, or gives wrong codes, in one of several runs."""
    with pytest.raises(errors):
        for seed in range(6):
            assert run(layer, monkeypatch, change, seed=seed) >= RIGHT


def without_wait(number: int):
    """Delete the n-th mbarrier wait of the program: its branch back is never taken."""

    def change(ptx: str) -> str:
        waits = list(re.finditer(r"mbarrier\.try_wait[^;]*;\s*@(\w+) bra PAST;\s*bra AGAIN;", ptx))
        found = waits[number]
        return ptx[: found.start()] + ptx[found.end() :]

    return change


@pytest.mark.parametrize("share", [pytest.param(2, id="two"), pytest.param(1000, id="all", marks=full)])
def test_every_deleted_barrier_wait_is_caught(layer, monkeypatch, share):
    """Loads that do not wait for an empty stage, multiplications that do not wait for a full one, and so on."""
    numbers = layer[-1]
    assert len(numbers) >= 6
    for number in random.Random(layer[1].seed).sample(numbers, min(share, len(numbers))):
        caught(layer, monkeypatch, without_wait(number), (ModelError, AssertionError))


@pytest.mark.parametrize("difference", [-16, 16])
def test_wrong_transaction_count(layer, monkeypatch, difference):
    def change(ptx: str) -> str:
        return re.sub(r"(expect_tx[^;]*, )18432;", lambda m: f"{m[1]}{18432 + difference};", ptx)

    with pytest.raises(Deadlock, match="try_wait"):
        run(layer, monkeypatch, change)


def test_missing_proxy_fence(layer, monkeypatch):
    with pytest.raises(ProxyError, match=r"without fence\.proxy\.async"):
        run(layer, monkeypatch, lambda ptx: ptx.replace("fence.proxy.async.shared::cta;", ""))


def test_missing_wait_for_gathered_copies(layer, monkeypatch):
    caught(layer, monkeypatch, lambda ptx: re.sub(r"cp\.async\.wait_group \d;", "", ptx), (UndefinedRead, ProxyError))


def test_missing_tmem_load_wait(layer, monkeypatch):
    assert run(layer, monkeypatch, lambda ptx: ptx.replace("tcgen05.wait::ld.sync.aligned;", "")) < 0.5


def test_weights_that_were_not_arranged(layer, monkeypatch):
    name, case, codes, scale, _ = layer
    for which in ("w13", "w13_scale"):
        kept = getattr(case.arranged, which).clone()
        getattr(case.arranged, which).copy_(getattr(case.weights, which))
        out, out_scale, _ = gemm1(case, codes, scale, name, 1)
        getattr(case.arranged, which).copy_(kept)
        assert codes_equal(case, out, out_scale) < 0.9


def test_gates_scale_used_for_up(layer, monkeypatch):
    name, case, codes, scale, _ = layer
    kept = case.parameters.first.clone()
    case.parameters.first[:, 1] = case.parameters.first[:, 0]
    out, out_scale, _ = gemm1(case, codes, scale, name, 1)
    case.parameters.first.copy_(kept)
    assert codes_equal(case, out, out_scale) < 0.99
    assert torch.equal(case.parameters.first, kept)
