"""What can be said about the benchmark for B200 owners without one: its checks, refusals and report."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sm100_checks
import sm100_moe
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.backends.sm100 import catalogue, objects, variants
from nvfp4_megamoe.moe.layer import MoELayer

SMALL = [check for check in sm100_checks.CHECKS if check.name.startswith("small")]


def on_cpu(geometry, weights):
    return MoELayer(geometry, weights, CpuBackend(geometry, "w4a4"))


@pytest.mark.parametrize("check", [SMALL[1], SMALL[-1]], ids=lambda check: check.name)
def test_right_layer_passes(rng, check):
    found = sm100_checks.run_check(check, on_cpu, "cpu", rng.initial_seed())
    assert found["passed"], found


def wrong_up(geometry, weights):
    weights.w13_global[:, 1] *= 1.25
    return on_cpu(geometry, weights)


def lost_row(geometry, weights):
    weights.w2_scale.view(torch.uint8)[:, 7] = 0
    return on_cpu(geometry, weights)


def unweighted(geometry, weights):
    layer = on_cpu(geometry, weights)
    forward = layer.backend.forward
    layer.backend.forward = lambda x, ids, w, *rest: forward(x, ids, w * w, *rest)
    return layer


def undropped(geometry, weights):
    layer = on_cpu(geometry, weights)
    forward = layer.backend.forward

    def kept(x, ids, w, expert_map, *rest):
        forward(x, ids.where(ids >= 0, expert_map.argmax().int()), w, expert_map, *rest)

    layer.backend.forward = kept
    return layer


def unsteady(geometry, weights):
    layer = on_cpu(geometry, weights)
    forward, columns = layer.backend.forward, itertools.count()

    def shaken(*args):
        forward(*args)
        args[4].view(torch.int16)[0, next(columns)] ^= 1  # the last bit: adding could be rounded away

    layer.backend.forward = shaken
    return layer


@pytest.mark.parametrize("build", [wrong_up, lost_row, unweighted, undropped, unsteady])
def test_wrong_layer_is_caught(rng, build):
    check = replace(SMALL[2], one_scale=True)
    found = sm100_checks.run_check(check, build, "cpu", rng.initial_seed())
    assert not found["passed"], found
    assert found["repeatable"] == (build is not unsteady)


def gemms(tokens: int, geometry) -> set[str]:
    """Names of the GEMMs that a batch can use."""
    seconds = {variants.second_variant(tokens, geometry, fused) for fused in (False, True)}
    return {variants.first_variant(tokens, geometry), *seconds}


@pytest.mark.parametrize("shape", [sm100_checks.SMALL, sm100_checks.PRO], ids=["small", "V4-Pro"])
def test_the_checks_reach_every_gemm(shape):
    checks = [check for check in sm100_checks.CHECKS if check.shape is shape]
    reached = set().union(*(gemms(check.tokens, check.geometry) for check in checks))
    assert reached == set().union(*(gemms(tokens, checks[0].geometry) for tokens in range(1, 4000)))
    assert reached <= set(catalogue.NAMES)


def test_refused_without_a_blackwell_gpu(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert sm100_moe.main(["--json", str(tmp_path / "r.json")]) == 2
    assert "needs a Blackwell GPU (compute capability 10.0) and finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "humming"], "unknown peers humming; choose from flashinfer_cutedsl"),
        (["--tokens", "0"], "at least"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        sm100_moe.parse(arguments)
    assert message in capsys.readouterr().err


def test_router_logits_give_the_batchs_routing(rng):
    weight, ids = torch.rand(20, 48, generator=rng).topk(6)
    weight = weight / weight.sum(1, keepdim=True)
    got, chosen = sm100_moe.router_logits(ids.int(), weight, 48).softmax(1).topk(6)
    assert torch.equal(chosen, ids)
    assert torch.allclose(got / got.sum(1, keepdim=True), weight, rtol=1e-5)


def fake_run(monkeypatch, passed: bool, peer_works: bool):
    """A run whose GPU parts are replaced: the order of the stages and the report stay."""
    check = {"check": "small", "relative_l2": 0.002, "passed": passed, "sums": "ordered"}
    monkeypatch.setattr(sm100_moe, "refusal", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(sm100_moe, "about", lambda seed: {"date": "2026-11-21", "device": "none", "seed": seed})
    monkeypatch.setattr(sm100_moe, "kernels", lambda: {"kernels": {"architecture": "sm_100a"}})
    monkeypatch.setattr(sm100_moe, "layer_test", lambda seed: [check])
    missing = {"flashinfer_trtllm": "no FlashInfer"}
    monkeypatch.setattr(sm100_moe, "everyone", lambda args: (["own ordered"], missing, None, None))
    monkeypatch.setattr(sm100_moe, "ceilings", lambda repeats: {"copy_tb_s": 7.0})

    def measure(contenders, weights, tokens, skewed, repeats, rng):
        common = {"tokens": tokens, "skewed": skewed, "experts": 48, "relative_l2": 0.003}
        peer = {"us": 300.0, "tb_s": 5.0, "tflop_s": 9.0} if peer_works else {"left_out": "wrong result"}
        own = {"contender": "own ordered", "us": 250.0, "tb_s": 6.3, "tflop_s": 10.0}
        return [own | common, {"contender": "flashinfer_cutedsl", **peer, **common}]

    monkeypatch.setattr(sm100_moe, "measure", measure)


def test_report_of_a_run(monkeypatch, tmp_path, capsys):
    fake_run(monkeypatch, passed=True, peer_works=True)
    assert sm100_moe.main(["--tokens", "8,64", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"]
    assert [row["tokens"] for row in report["rows"]] == [8, 8, 64, 64] * 2
    assert report["left_out"] == {"flashinfer_trtllm": "no FlashInfer"}
    out = capsys.readouterr()
    assert "| 64 | skewed | 250.0 | 300.0 | 6.30 | 0.90 | 10 | 1.20x |" in out.out
    assert "flashinfer_trtllm is left out: no FlashInfer" in out.err


def test_report_names_what_built_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("NVFP4_SM100_OBJECTS", str(tmp_path))
    objects.write(tmp_path, [], {"nvidia-cutlass-dsl": "4.8.0"})
    assert sm100_moe.kernels()["kernels"] == {"nvidia-cutlass-dsl": "4.8.0"}


def test_peer_that_fails_at_a_size_is_left_out_there(monkeypatch, capsys):
    fake_run(monkeypatch, passed=True, peer_works=False)
    assert sm100_moe.main(["--tokens", "8"]) == 0
    assert "| 8 | uniform | 250.0 | left out | 6.30 | 0.90 | 10 |  |" in capsys.readouterr().out


def test_nothing_is_timed_after_a_failed_layer_test(monkeypatch, tmp_path, capsys):
    fake_run(monkeypatch, passed=False, peer_works=True)
    assert sm100_moe.main(["--json", str(tmp_path / "r.json")]) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["passed"]
    assert "rows" not in report
    assert "nothing is timed" in capsys.readouterr().err


class Wrong:
    """A contender that returns zeros, or fails."""

    name, limit = "flashinfer_cutedsl", 0.08

    def __init__(self, error: Exception | None = None):
        self.error = error

    def reserve(self, batch):
        pass

    def __call__(self, x, *rest):
        if self.error:
            raise self.error
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("contender", "reason"),
    [(Wrong(), "wrong result: relative L2 1,"), (Wrong(RuntimeError("no kernel")), "RuntimeError: no kernel")],
)
def test_wrong_peer_has_a_reason_instead_of_a_time(rng, contender, reason):
    x = torch.randn(5, 16, generator=rng).bfloat16()
    found = sm100_moe.checked(contender, (x, None, None), x.double(), torch.arange(5))[1]
    assert found.startswith(reason)


def test_plot_is_a_png(tmp_path):
    rows = [
        {"contender": name, "tokens": t, "skewed": False, "us": t + 1.0}
        for name in ("own ordered", "flashinfer_cutedsl")
        for t in (1, 8)
    ]
    sm100_moe.plot({"rows": rows, "device": "none", "date": "2026-11-21"}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
