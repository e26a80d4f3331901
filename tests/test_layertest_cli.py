"""scripts/layertest.py: what it prints, writes and returns for right and wrong kernels, ranks and arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.backends.cpu.backend import CpuBackend

from .made_checkpoint import SCRIPTS, made

sys.path.insert(0, str(SCRIPTS))

import layertest
from layer_testing.checkpoint import Source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of eight experts."""
    directory = tmp_path_factory.mktemp("layertest") / "checkpoint"
    made(directory)
    return directory


def run(*arguments: object) -> int:
    return layertest.main([str(argument) for argument in arguments])


def test_right_layers_pass_as_a_user_runs_it(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPTS / "layertest.py"), str(checkpoint), "--json", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[-1] == "3 layer(s) on cpu (w4a16): all passed"
    assert "3/3" in ended.stderr, "a progress bar"
    content = json.loads(report.read_text())
    assert content["passed"] and content["format"] == 1
    assert content["versions"]["torch"] == torch.__version__
    assert content["device"]["type"] == "cpu" and content["device"]["name"]
    assert content["date"].startswith("20") and content["geometry"]["num_local_experts"] == 8
    assert [layer["layer"] for layer in content["layers"]] == [f"layers.{n}.ffn.experts" for n in range(3)]
    measured = content["layers"][0]["measurements"]
    assert {1, 8, 2048} < {m["tokens"] for m in measured}
    assert all(m["passed"] and 0 <= m["value"] <= m["limit"] for m in measured)


def test_a_wrong_kernel_is_named_and_the_status_is_1(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    forward = CpuBackend.forward

    def wrong(self, x, topk_ids, topk_weights, expert_map, out, workspace):
        forward(self, x, topk_ids, topk_weights, expert_map, out, workspace)
        out[:, 7] = 0

    monkeypatch.setattr(CpuBackend, "forward", wrong)
    report = tmp_path / "report.json"
    assert run(checkpoint, "--layers", "1-2", "--json", report, "--quiet") == 1
    printed = capsys.readouterr().out
    assert "layers.1.ffn.experts on cpu (w4a16): expert " in printed
    assert "output channel 7" in printed and "2 FAILED" in printed
    content = json.loads(report.read_text())
    assert not content["passed"]
    assert [layer["layer"] for layer in content["layers"]] == ["layers.1.ffn.experts", "layers.2.ffn.experts"]


def test_each_rank_tests_its_own_experts(checkpoint: Path, tmp_path: Path) -> None:
    subjects = []
    for rank in range(2):
        report = tmp_path / f"{rank}.json"
        options = ("--ranks", 2, "--rank", rank, "--experts", "all", "--precision", "w4a4", "--layers", 0)
        assert run(checkpoint, *options, "--json", report, "--quiet") == 0
        content = json.loads(report.read_text())
        assert content["layers"][0]["backend"] == "cpu (w4a4)"
        measured = content["layers"][0]["measurements"]
        subjects.append({m["subject"] for m in measured if m["metric"] == "calc_diff"} - {"routing"})
    assert subjects == [{f"expert {e}" for e in range(4)}, {f"expert {e}" for e in range(4, 8)}]


def test_a_rank_reads_its_experts_as_the_checkpoint_has_them(checkpoint: Path) -> None:
    whole = Source(checkpoint, 1, 0).read(1, torch.device("cpu"))
    part = Source(checkpoint, 4, 2)
    weights = part.read(1, torch.device("cpu"))
    assert part.expert_ids == [4, 5]
    for name, tensor in vars(weights).items():
        expected = getattr(whole, name)[4:6]
        assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), name
    assert part.expert_map(torch.device("cpu")).tolist() == [-1] * 4 + [0, 1] + [-1] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "sm42"), "There is no backend 'sm42'; expected one of: cpu, sm90, sm100"),
        (("--backend", "sm100"), "the sm100 backend needs a Blackwell GPU"),
        (("--precision", "w3a3"), "precision 'w3a3' is not one of"),
        (("--layers", "1,9"), "layer(s) [9] have no NVFP4 experts; layers [0, 1, 2] have"),
        (("--ranks", "3"), "expected a multiple of the 3 expert-parallel ranks"),
        (("--ranks", "2", "--rank", "2"), "--rank 2: expected 0 to 1"),
        (("--device", "cuda:99"), "--device cuda:99: PyTorch"),
    ],
)
def test_what_cannot_be_tested_is_said_and_the_status_is_2(checkpoint, capsys, arguments, words) -> None:
    assert run(checkpoint, *arguments, "--quiet") == 2
    assert words in capsys.readouterr().err


def test_a_directory_without_a_checkpoint(tmp_path, capsys) -> None:
    assert run(tmp_path, "--quiet") == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--layers", "2-1"), ("--layers", "x"), ("--experts", "0"), ("--ranks", "0")])
def test_malformed_arguments(checkpoint, arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        run(checkpoint, *arguments)
    assert ended.value.code == 2
