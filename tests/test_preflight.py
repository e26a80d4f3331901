"""scripts/preflight.py: each check on a machine or checkpoint that passes, and on one that must not."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from preflight_checks import gpus, host, model, software  # noqa: E402
from preflight_checks.finding import FAIL, GIB, NOTE, OK, SKIPPED  # noqa: E402

LAYERS, EXPERTS, HIDDEN, INTER = 2, 4, 32, 16
CONFIG = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": LAYERS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
    "swiglu_limit": 10.0,
    "compress_ratios": [0, 4],
    "quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
}

Tensors = dict[str, tuple[str, list[int], bytes]]


def tensors() -> Tensors:
    """A small checkpoint: every expert's twelve tensors, and one dense weight."""
    result: Tensors = {"embed.weight": ("BF16", [8, HIDDEN], bytes(16 * HIDDEN))}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for projection in ("w1", "w2", "w3"):
                rows, columns = (HIDDEN, INTER) if projection == "w2" else (INTER, HIDDEN)
                name = f"layers.{layer}.ffn.experts.{expert}.{projection}"
                result[f"{name}.weight"] = ("U8", [rows, columns // 2], bytes(rows * columns // 2))
                result[f"{name}.weight_scale"] = ("F8_E4M3", [rows, columns // 16], b"\x38" * (rows * columns // 16))
                result[f"{name}.weight_scale_2"] = ("F32", [], struct.pack("<f", 5e-5))
                result[f"{name}.input_scale"] = ("F32", [], struct.pack("<f", 3e-3))
    return result


def write(directory: Path, content: Tensors, config: dict[str, object] = CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    header, data = {}, b""
    for name, (dtype, shape, payload) in content.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


def levels(findings: list) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def check(directory: Path, ranks: int = 2, sampled: int = 1000):
    return model.check(directory, ranks, 0, sampled)


def test_a_good_checkpoint_passes(tmp_path: Path) -> None:
    findings, index = check(write(tmp_path / "m", tensors()))
    assert levels(findings) == {"checkpoint": OK, "scales": OK, "block scales": OK}
    assert "48 finite and positive; gate and up differ in 0.0 % of 8 experts" in findings[1].found
    assert "24 of 24 tensors" in findings[2].found and index is not None


def test_files_that_cannot_be_the_model_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", tensors())
    assert "multiple of the 3" in check(directory, ranks=3)[0][0].found
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    findings, index = check(directory)
    assert index is None and findings[0].level == FAIL and "truncated" in findings[0].found
    missing = tensors()
    del missing["layers.1.ffn.experts.3.w3.input_scale"]
    findings, index = check(write(tmp_path / "n", missing))
    assert index is None and "layers.1.ffn.experts.3.w3.input_scale" in findings[0].found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", ["weight_scale_2", "input_scale"])
def test_a_scale_that_is_no_positive_number_is_found(tmp_path: Path, value: float, kind: str) -> None:
    content = tensors()
    name = f"layers.1.ffn.experts.2.w2.{kind}"
    content[name] = ("F32", [], struct.pack("<f", value))
    findings, _ = check(write(tmp_path / "m", content))
    assert levels(findings)["scales"] == FAIL and name in findings[1].found


def test_unequal_gate_and_up_are_counted(tmp_path: Path) -> None:
    content = tensors()
    content["layers.0.ffn.experts.1.w3.weight_scale_2"] = ("F32", [], struct.pack("<f", 2e-4))
    found = check(write(tmp_path / "m", content))[0][1]
    assert found.level == OK and "differ in 12.5 % of 8 experts, by up to 4.00 times" in found.found


@pytest.mark.parametrize("byte, level", [(b"\x7f", FAIL), (b"\xff", FAIL), (b"\xb8", FAIL), (b"\x00", NOTE)])
def test_a_bad_block_scale_in_the_sample_is_found(tmp_path: Path, byte: bytes, level: str) -> None:
    content = tensors()
    name = "layers.0.ffn.experts.0.w1.weight_scale"
    dtype, shape, data = content[name]
    content[name] = (dtype, shape, byte * len(data) if level == NOTE else data[:5] + byte + data[6:])
    directory = write(tmp_path / "m", content)
    found = check(directory)[0][2]
    assert (found.check, found.level) == ("block scales", level) and name in found.found
    assert check(directory, sampled=0)[0][2].level == OK, "nothing is read without a sample"


def test_memory_is_weights_kv_cache_and_scratch(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", tensors())
    index = check(directory)[1]
    experts = LAYERS * EXPERTS * 3 * (HIDDEN * INTER // 2 + HIDDEN * INTER // 16 + 8)
    cache = 2 * 128 * 584 + 4096 // 4 * (584 + 132)
    assert model.kv_cache_bytes(CONFIG, 4096) == cache
    dense = 16 * HIDDEN
    least = experts // 2 + dense // 2 + cache + (6 << 30)

    def judged(available: int):
        return model.memory(index, directory, 2, 4096, available, 1.0, "on GPU")

    assert judged(least - 1).level == FAIL and judged(least).level == NOTE
    assert judged(least + dense // 2).level == OK
    assert model.memory(index, directory, 2, 4096, experts + dense + 2 * cache, 1.0, "RAM").level == OK
    assert model.memory(index, directory, 2, 4096, experts + dense + 2 * cache - 1, 1.0, "RAM").level == FAIL


H200 = "NVIDIA H200, 9.0, 143771, 143000, 580.95.05"
MATRIX = "\x1b[4m\tGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-95\nGPU1\tNV18\t X \t0-95\n\nLegend:\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a nvidia-smi that prints what it is given."""

    def install(*rows: str, matrix: str = MATRIX, status: int = 0) -> list[gpus.Gpu]:
        (tmp_path / "rows").write_text("\n".join(rows) + "\n")
        (tmp_path / "matrix").write_text(matrix)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\ncase "$1" in topo) cat {tmp_path}/matrix;; *) cat {tmp_path}/rows; exit {status};; esac\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return gpus.query()[0]

    return install


def test_two_good_gpus(smi) -> None:
    found = gpus.check(smi(H200, H200), "", 2, "13.0")
    assert levels(found) == {"GPU count": OK, "GPU architecture": OK, "driver": OK, "NVLink": OK}


def test_too_few_old_busy_unlinked_gpus_and_an_old_driver(smi) -> None:
    old = "NVIDIA A100, 8.0, 81920, 40000, 550.1"
    found = gpus.check(smi(old, matrix=MATRIX.replace("NV18", "SYS")), "", 2, "13.0")
    assert levels(found) == {
        "GPU count": FAIL,
        "GPU architecture": FAIL,
        "driver": FAIL,
        "GPU memory free": NOTE,
        "NVLink": NOTE,
    }
    assert "580" in next(finding.remedy for finding in found if finding.check == "driver")
    assert all(finding.remedy for finding in found)
    assert levels(gpus.check(smi(H200, H200, matrix=""), "", 2, "13.0"))["NVLink"] == NOTE


def test_without_a_gpu(smi, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.check(*gpus_without_tool(monkeypatch), 1, None)[0].level == SKIPPED
    failed = gpus.check(*gpus_without_tool(monkeypatch), 1, "13.0")[0]
    assert failed.level == FAIL and "not installed" in failed.found


def test_a_broken_driver_is_said(smi) -> None:
    smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", status=9)
    cards, why = gpus.query()
    assert cards == [] and why.startswith("nvidia-smi failed") and "couldn't communicate" in why
    smi("garbage")
    assert gpus.query()[0] == [] and "garbage" in gpus.query()[1]


def gpus_without_tool(monkeypatch: pytest.MonkeyPatch) -> tuple[list[gpus.Gpu], str]:
    monkeypatch.setenv("PATH", "/nonexistent")
    return gpus.query()


def test_shared_memory_and_directories(tmp_path: Path) -> None:
    total = host.shutil.disk_usage(tmp_path).total
    assert host.shared_memory(tmp_path, 2).level == OK
    assert host.shared_memory(tmp_path, total // GIB + 1).level == FAIL
    assert host.shared_memory(tmp_path / "none", 2).level == FAIL
    assert host.writable("cache", tmp_path / "a" / "b", 0, 0).level == OK
    free = host.shutil.disk_usage(tmp_path).free
    assert host.writable("cache", tmp_path, 0, 2 * free).level == NOTE
    assert host.writable("cache", tmp_path, 2 * free, 2 * free).level == FAIL
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o755)
    assert host.writable("cache", tmp_path / "file" / "x").level == FAIL
    assert host.writable("cache", Path("/proc/1/nothing")).level == FAIL


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, level in ((host.resource.RLIM_INFINITY, OK), (64 << 20, NOTE)):
        monkeypatch.setattr(host.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert host.locked_memory(8, True).level == level
    assert host.locked_memory(8, False).level == SKIPPED
    assert 0 < host.available_memory() < 1 << 50


def test_patches_go_by_patch_vllms_own_verdict() -> None:
    def verdict(code: int, output: str):
        return software.patches([sys.executable, "-c", f"import sys; print({output!r}); sys.exit({code})"])

    good = json.dumps({"version": "0.32.0", "summary": "all 31 files as the repository has them", "error": None})
    bad = json.dumps({"version": None, "summary": None, "error": "vLLM is not installed"})
    assert verdict(0, good).level == OK
    assert verdict(1, good).level == FAIL
    assert verdict(2, bad) == ("patches", FAIL, "vLLM: vLLM is not installed", "")
    assert verdict(0, "Traceback").level == FAIL


@pytest.mark.parametrize("broken", [False, True])
def test_the_program_prints_a_table_or_json_and_an_exit_status(tmp_path: Path, broken: bool) -> None:
    content = tensors()
    if broken:
        content["layers.0.ffn.experts.0.w1.input_scale"] = ("F32", [], struct.pack("<f", float("nan")))
    directory = write(tmp_path / "m", content)
    command = [sys.executable, str(SCRIPTS / "preflight.py"), str(directory), "--no-patches", "--cache", str(tmp_path)]
    command += ["--status-dir", "0", "--max-model-len", "256"] + ([] if broken else ["--json"])
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == int(broken), result.stdout + result.stderr
    if broken:
        assert "FAIL    scales" in result.stdout and "1 failure(s)" in result.stdout and "NOT ready" in result.stdout
    else:
        report = json.loads(result.stdout)
        assert report["ok"] and {each["check"] for each in report["findings"]} >= {
            "GPU",
            "checkpoint",
            "memory",
            "backend",
        }
