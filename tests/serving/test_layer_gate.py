"""A server whose kernels are wrong: strict does not serve, report serves, fallback serves what is right.

The faults are planted by a vLLM plugin, so that the server is the one that users start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.startup_cases import service

from .support import REPOSITORY, free_port, mean_difference, prompt_logprobs, prompt_tokens, running_server

TOLERANCE = 0.07  # as in test_logprobs.py

# FAULTY_LAYERS compute 1.25 times too much in FAULTY_PRECISION, as they would with a wrong global scale.
_PLUGIN = """
import os
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.moe import layer

def install():
    forward, prepare = CpuBackend.forward, CpuBackend.prepare
    layers = []

    def counted(self, weights):
        if self.precision == os.environ["FAULTY_PRECISION"]:
            self.faulty = str(len(layers)) in os.environ["FAULTY_LAYERS"]
            layers.append(self)
        prepare(self, weights)

    def wrong(self, x, topk_ids, topk_weights, expert_map, out, workspace):
        forward(self, x, topk_ids, topk_weights, expert_map, out, workspace)
        if getattr(self, "faulty", False):
            out.mul_(1.25)

    CpuBackend.prepare, CpuBackend.forward = counted, wrong
    print("a fault is planted", flush=True)
"""

# Stands for a backend of vLLM's own, none of which computes NVFP4 on a CPU: it takes what vLLM's "emulation" gets.
_EMULATION = """
import torch
from nvfp4_megamoe.moe.oracle import swiglu
from nvfp4_megamoe.numerics import nvfp4

def install():
    from vllm.model_executor.layers.fused_moe.experts.nvfp4_megamoe import Nvfp4MegaMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle

    class TorchExperts(Nvfp4MegaMoEExperts):
        @staticmethod
        def is_supported_config(cls, *rest):
            return True, None

        def process_weights_after_loading(self, layer):
            print("vLLM's own prepares", layer.layer_name, flush=True)

        def workspace_shapes(self, M, N, K, *rest):
            return (0,), (0,), (M, K)

        def apply(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, **rest):
            total = torch.zeros(hidden_states.shape)
            for e in range(w1.shape[0]):
                tokens, k = (topk_ids == e).nonzero(as_tuple=True)
                if len(tokens):
                    first = nvfp4.dequantize(w1[e], self.w1_scale[e], self.g1_alphas[e])
                    second = nvfp4.dequantize(w2[e], self.w2_scale[e], self.g2_alphas[e])
                    hidden = swiglu(hidden_states[tokens].float() @ first.T, self.moe_config.swiglu_limit)
                    total.index_add_(0, tokens, hidden @ second.T * topk_weights[tokens, k, None])
            output.copy_(total)

    original = oracle.backend_to_kernel_cls
    emulation = oracle.NvFp4MoeBackend.EMULATION
    oracle.backend_to_kernel_cls = lambda b: [TorchExperts] if b == emulation else original(b)
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with both plugins installed."""
    root = tmp_path_factory.mktemp("plugins")
    (root / "planted.py").write_text(_PLUGIN)
    (root / "emulated.py").write_text(_EMULATION)
    info = root / "planted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    entries = "[vllm.general_plugins]\nplanted = planted:install\nemulated = emulated:install\n"
    (info / "entry_points.txt").write_text(entries)
    return {"PYTHONPATH": str(root), "FAULTY_PRECISION": "w4a16", "FAULTY_LAYERS": "2"}


def refusal(model: Path, environment: dict[str, str]) -> str:
    """Start the server, expect it to end by itself with an error, and return its log."""
    command = [sys.executable, "scripts/serve_cpu.py", "--model", str(model), "--port", str(free_port())]
    ended = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    log = ended.stdout + ended.stderr
    assert ended.returncode != 0, f"the server served:\n{log[-3000:]}"
    assert "[serve] ready after" not in log
    return log


def difference(model: Path, log: Path, expected: list[float], environment: dict[str, str]) -> float:
    with running_server(model, log, environment=environment) as running:
        found = mean_difference(prompt_logprobs(running, prompt_tokens(300)), expected)
    print(f"mean |difference|: {found:.4f}")
    return found


def test_strict_does_not_serve_and_the_status_says_why(checkpoint: Path, plugins, tmp_path: Path) -> None:
    status = tmp_path / "status"
    environment = plugins | {"MEGA_MOE_STATUS_DIR": str(status), "MEGA_MOE_RUN_ID": "gate"}
    with service(status, tmp_path / "status.log", "--run-id", "gate") as watcher:
        log = refusal(checkpoint, environment)
        reason = watcher.get_until("/startupz", 500)
    assert "a fault is planted" in log
    for text in (log, reason):
        assert "layer test of model.layers.2." in text
        assert "on cpu (w4a16) failed: " in text
        assert "limit " in text
    assert "MEGA_MOE_LAYER_TEST=strict does not serve it" in log


def test_report_serves_what_is_wrong_and_says_so(checkpoint: Path, plugins, expected, tmp_path: Path) -> None:
    environment = plugins | {"MEGA_MOE_LAYER_TEST": "report"}
    difference(checkpoint, tmp_path / "log", expected[300], environment)
    text = (tmp_path / "log").read_text()
    assert text.count("SERVED ALL THE SAME") == 1
    assert "layer test of model.layers.2." in text


def test_fallback_to_another_precision_serves_what_is_right(checkpoint, plugins, expected, tmp_path: Path) -> None:
    environment = plugins | {
        "FAULTY_PRECISION": "w4a4",
        "FAULTY_LAYERS": "0123",
        "MEGA_MOE_PRECISION": "w4a4",
        "MEGA_MOE_LAYER_TEST": "fallback:cpu:w4a16",
    }
    found = difference(checkpoint, tmp_path / "log", expected[300], environment)
    text = (tmp_path / "log").read_text()
    assert text.count("This layer is served by cpu (w4a16), which passed") == 4
    assert found <= TOLERANCE, "W4A4 itself differs by more"


def test_fallback_to_vllms_own_serves_what_is_right(checkpoint, plugins, expected, tmp_path: Path) -> None:
    environment = plugins | {"MEGA_MOE_LAYER_TEST": "fallback:emulation"}
    found = difference(checkpoint, tmp_path / "log", expected[300], environment)
    text = (tmp_path / "log").read_text()
    assert text.count("This layer is served by vLLM's emulation, which is not tested") == 1
    assert text.count("vLLM's own prepares model.layers.2.") == 1
    assert found <= TOLERANCE


def test_a_fallback_that_cannot_serve_is_refused_before_the_load(checkpoint: Path) -> None:
    log = refusal(checkpoint, {"MEGA_MOE_LAYER_TEST": "fallback:marlin"})
    assert "MEGA_MOE_LAYER_TEST=fallback:marlin: " in log
    assert "does not support the deployment configuration" in log
    assert "NVFP4 experts run on" not in log, "that is logged when the first layer is prepared"


def test_vllms_own_is_refused_before_the_load_where_gate_and_up_scales_differ(unequal_checkpoint: Path) -> None:
    log = refusal(unequal_checkpoint, {"MEGA_MOE_LAYER_TEST": "fallback:humming"})
    assert "w1.weight_scale_2" in log and "w3.weight_scale_2 differ" in log
    assert "Starting to load model" not in log
