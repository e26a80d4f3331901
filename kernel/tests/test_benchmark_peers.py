"""What the side-by-side benchmark does before it times: contenders are built as served, checked, and reported."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import moe_peers
import peers
import peers_report
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle

GEOMETRY = MoEGeometry(num_experts=8, num_local_experts=8, top_k=2, hidden=256, intermediate=128, swiglu_limit=10.0)


def batch_and_oracle(weights, rng, tokens=9):
    batch = moe_peers.make_batch(GEOMETRY, tokens, True, rng)
    return batch, moe_oracle(weights, *batch, None, GEOMETRY.swiglu_limit, "w4a16")


@pytest.fixture
def weights(rng):
    return moe_peers.random_weights(GEOMETRY, rng.initial_seed(), "cpu")


def test_a_layer_built_by_vllm_from_the_same_tensors_agrees_with_the_oracle(weights, rng):
    pytest.importorskip("vllm")
    contender = peers.VllmContender(GEOMETRY, weights, "nvfp4_megamoe", max_tokens=16)
    batch, expected = batch_and_oracle(weights, rng)
    contender.reserve(9)
    error = moe_peers.relative_l2(contender(*batch), expected)
    assert error <= moe_peers.LIMITS["w4a16"]
    assert contender.preparation.first_seconds > 0


def test_own_layer_leaves_the_shared_tensors_alone(weights, rng):
    before = {name: tensor.clone() for name, tensor in peers.loaded_parameters(weights).items()}
    contender = peers.OwnContender(GEOMETRY, weights, "w4a16")
    batch, expected = batch_and_oracle(weights, rng)
    contender.reserve(9)
    moe_peers.check(contender, weights, batch, expected, torch.arange(9))
    for name, tensor in peers.loaded_parameters(weights).items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("fault", ["wrong weight", "nan"])
def test_a_wrong_result_is_never_timed(weights, rng, fault):
    contender = peers.OwnContender(GEOMETRY, weights, "w4a16")
    contender.reserve(9)
    batch, expected = batch_and_oracle(weights, rng)
    if fault == "nan":
        wrong = (batch[0].index_fill(0, torch.tensor([3]), float("nan")), *batch[1:])
    else:
        wrong = (*batch[:2], batch[2].flip(1))
    with pytest.raises(SystemExit, match="wrong result of own w4a16 at 9 tokens"):
        moe_peers.check(contender, weights, wrong, expected, torch.arange(9))


def test_contenders_that_cannot_run_are_left_out_with_their_reason(weights):
    found, missing = moe_peers.make_contenders(("w4a16", "marlin", "w4a3"), GEOMETRY, weights, 16)
    assert [contender.name for contender in found] == ["own w4a16"]
    assert set(missing) == {"marlin", "w4a3"}
    assert "w4a3" in missing["w4a3"]


def result():
    rows = []
    for skewed in (False, True):
        for tokens in (1, 64):
            for name, us in (("own w4a16", 100.0), ("own w4a8", 80.0 + tokens), ("marlin", 200.0), ("humming", 150.0)):
                rows.append(
                    {"contender": name, "tokens": tokens, "skewed": skewed, "us": us, "tb_s": 2.0, "tflop_s": 50.0}
                )
    preparation = {"own w4a16": {"seconds": 0.01, "first_seconds": 0.02, "extra_gib": 0.03}}
    ceilings = {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0, "fp8_tflop_s": 1400.0}
    return {"date": "2026-11-21", "device": "none", "rows": rows, "ceilings": ceilings, "preparation": preparation}


def test_the_table_compares_our_best_with_the_better_peer():
    lines = peers_report.table(result()).splitlines()
    assert lines[2] == "| 1 | uniform | 100.0 | 81.0 | 200.0 | 150.0 | 2.00 | 0.50 | 50 | 0.04 | 1.85x |"
    assert lines[5] == "| 64 | skewed | 100.0 | 144.0 | 200.0 | 150.0 | 2.00 | 0.50 | 50 | 0.06 | 1.50x |"
    assert lines[-1] == "| own w4a16 | 0.010 | 0.020 | 0.030 |"


def test_the_plot_is_a_png(tmp_path):
    peers_report.plot(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
