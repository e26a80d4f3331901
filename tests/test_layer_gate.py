"""The layer gate's settings, refusals and choices, without a server (tests/serving/test_layer_gate.py has one)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.selftest import LayerTestError
from vllm.model_executor.nvfp4 import fallback, gate_setting, layer_gate
from vllm.model_executor.nvfp4.gate_setting import Fallback, Setting, read_setting

from .made_checkpoint import Planted, made

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel" / "tests"))

from selftest_cases import GEOMETRY, Case

LAYER = "model.layers.5.ffn.experts"


def test_settings(monkeypatch):
    monkeypatch.delenv(gate_setting.VARIABLE, raising=False)
    assert read_setting() == Setting("strict")
    for value, setting in {
        "report": Setting("report"),
        "off": Setting("off"),
        "fallback:cpu": Setting("fallback", Fallback("cpu", None, True)),
        "fallback:sm90:w4a16": Setting("fallback", Fallback("sm90", "w4a16", True)),
        "fallback:flashinfer_cutedsl": Setting("fallback", Fallback("flashinfer_cutedsl", None, False)),
    }.items():
        monkeypatch.setenv(gate_setting.VARIABLE, value)
        assert read_setting() == setting


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Strict",
        "strict:",
        "off:cpu",
        "fallback",
        "fallback:",
        "fallback:sm42",
        "fallback:cpu:",
        "fallback:marlin:w4a16",
        "fallback:nvfp4_megamoe",
    ],
)
def test_unknown_settings_are_refused(monkeypatch, value):
    monkeypatch.setenv(gate_setting.VARIABLE, value)
    with pytest.raises(ValueError, match=f"MEGA_MOE_LAYER_TEST='{value}': expected"):
        read_setting()


def test_every_name_of_vllms_is_one_that_vllm_knows():
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import map_nvfp4_backend

    for name in gate_setting._VLLM:
        map_nvfp4_backend(name)


class Faulty(CpuBackend):
    """Overwrites its weights, and computes 1.25 times too much in the precision ``wrong``."""

    wrong = ("w4a16",)

    def prepare(self, weights: ExpertWeights) -> None:
        self.kept = ExpertWeights(**{name: tensor.clone() for name, tensor in vars(weights).items()})
        for tensor in vars(weights).values():
            tensor.view(torch.uint8).zero_()
        super().prepare(self.kept)

    def forward(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        super().forward(x, topk_ids, topk_weights, expert_map, out, workspace)
        out.mul_(1.25 if self.precision in self.wrong else 1.0)


@pytest.fixture
def case() -> Case:
    return Case(torch.Generator().manual_seed(5))


@pytest.fixture
def gate(case, monkeypatch, caplog_vllm):
    """Run the gate with a setting, on backends that are wrong in the precisions ``wrong``."""

    def run(setting: str, wrong: tuple[str, ...] = ("w4a16",), **layer):
        monkeypatch.setenv(gate_setting.VARIABLE, setting)
        monkeypatch.setattr(Faulty, "wrong", wrong)
        monkeypatch.setattr(layer_gate.select, "select", lambda g, device, precision, name: Faulty(g, precision))
        module = SimpleNamespace(layer_name=LAYER, expert_map=case.expert_map, **layer)
        return layer_gate.prepare(module, case.geometry, case.weights, Faulty(case.geometry))

    return run


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.mark.parametrize("setting", ["strict", "report", "fallback:cpu:w4a4"])
def test_a_right_layer_serves(gate, caplog_vllm, setting):
    assert gate(setting, wrong=()).backend.precision == "w4a16"
    assert "layer test" not in caplog_vllm.text, "a layer that passes is no news"


def test_strict_raises_with_the_whole_story_in_one_line(gate):
    with pytest.raises(LayerTestError, match=rf"layer test of {LAYER} on cpu \(w4a16\) failed: expert") as raised:
        gate("strict")
    assert "\n" not in str(raised.value) and "limit" in str(raised.value)
    assert raised.value.report.failures


def test_report_serves(gate, caplog_vllm):
    assert gate("report").backend.precision == "w4a16"
    assert "SERVED ALL THE SAME" in caplog_vllm.text and LAYER in caplog_vllm.text


def test_off_tests_nothing(gate, monkeypatch):
    monkeypatch.setattr(layer_gate, "LayerTest", None)
    assert gate("off").backend.precision == "w4a16"


def test_fallback_gets_the_weights_as_they_were_loaded(gate, case, caplog_vllm):
    before = {name: tensor.clone() for name, tensor in vars(case.weights).items()}
    served = gate("fallback:cpu:w4a4")
    assert served.backend.precision == "w4a4"
    for name, tensor in vars(served.backend.kept).items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert "This layer is served by cpu (w4a4), which passed" in caplog_vllm.text


def test_a_fallback_that_fails_too_stops(gate):
    with pytest.raises(LayerTestError, match=r"The fallback failed too: layer test of .* on cpu \(w4a4\) failed"):
        gate("fallback:cpu:w4a4", wrong=("w4a16", "w4a4"))


def test_vllms_own_is_refused_unequal_scales_after_the_load_too(gate):
    with pytest.raises(LayerTestError, match=r"fallback cannot serve it: gate and up scales of local expert\(s\)"):
        gate("fallback:marlin")


def test_hand_over(gate, case, monkeypatch):
    """vLLM's method is told to prepare the loaded tensors again, for the other backend."""
    case.weights.w13_global[:, 1] = case.weights.w13_global[:, 0]
    before = case.weights.w2.clone()
    seen = []
    method = SimpleNamespace(use_a16=False, moe=SimpleNamespace(moe_backend="auto"))
    method.process_weights_after_loading = lambda layer: seen.append((layer.layer_name, case.weights.w2.clone()))
    asked = []

    def choice(config, weight_key, activation_key):
        asked.append(config.moe_backend)
        return fallback.nvfp4.NvFp4MoeBackend.FLASHINFER_CUTEDSL, "its class"

    monkeypatch.setattr(fallback.nvfp4, "select_nvfp4_moe_backend", choice)
    assert gate("fallback:flashinfer_cutedsl", quant_method=method) is None
    assert asked == ["flashinfer_cutedsl"] and method.moe.moe_backend == "auto"
    assert (method.nvfp4_backend.value, method.experts_cls, method.use_global_sf) == (
        "FLASHINFER_CUTEDSL",
        "its class",
        True,
    )
    assert seen[0][0] == LAYER and torch.equal(seen[0][1], before)


def refuse(setting: str, monkeypatch, serving=(None, None), **parallel: object) -> None:
    monkeypatch.setenv(gate_setting.VARIABLE, setting)
    parallel = SimpleNamespace(**{"enable_eplb": False, "dp_size": 1, **parallel})
    config = SimpleNamespace(device="cpu", moe_parallel_config=parallel)
    fallback.refuse_impossible(GEOMETRY, config, serving, None, None)


@pytest.mark.parametrize(
    ("setting", "options", "words"),
    [
        ("fallback:sm90", {}, "fallback:sm90: .*needs a Hopper GPU"),
        ("fallback:cpu:w3a3", {}, "precision 'w3a3' is not one of"),
        ("fallback:cpu", {}, "fallback:cpu: that is what serves"),
        ("fallback:cpu:w4a4", {"serving": (None, "w4a4")}, "that is what serves"),
        ("fallback:cpu:w4a4", {"enable_eplb": True}, "expert load balancing"),
        ("fallback:marlin", {"dp_size": 2}, "data-parallel ranks"),
    ],
)
def test_a_fallback_that_cannot_serve_is_refused(monkeypatch, setting, options, words):
    with pytest.raises(ValueError, match=words):
        refuse(setting, monkeypatch, **options)


def test_a_fallback_that_can_serve_is_not_refused(monkeypatch):
    for setting in ("strict", "report", "off", "fallback:cpu:w4a4"):
        refuse(setting, monkeypatch)
    refuse("fallback:cpu", monkeypatch, serving=("cpu", "w4a4"))


def test_unequal_scales_are_found_in_the_checkpoint(monkeypatch, tmp_path):
    equal, unequal = tmp_path / "equal", tmp_path / "unequal"
    made(equal)
    made(unequal, planted=Planted(gate_up_ratio=1.25))
    monkeypatch.setenv(gate_setting.VARIABLE, "fallback:humming")
    gate_setting.refuse_unequal_scales(equal)
    with pytest.raises(ValueError, match=r"layers.0.ffn.experts.0.w1.weight_scale_2 and .*w3.weight_scale_2 differ"):
        gate_setting.refuse_unequal_scales(unequal)
    monkeypatch.setenv(gate_setting.VARIABLE, "fallback:cpu")
    gate_setting.refuse_unequal_scales(unequal)
