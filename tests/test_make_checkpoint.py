"""What make_checkpoint.py writes: every format holds the same weights, and planted properties are as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.numerics import e2m1, metrics, nvfp4

from . import made_checkpoint as mc

Tensors = dict[str, torch.Tensor]
MATRIX = ".weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The weights that every format quantizes."""
    return mc.made(tmp_path_factory.mktemp("bf16") / "model", "bf16")


def quantized(tensors: Tensors, expert: bool) -> list[str]:
    """Names, without suffix, of the experts' matrices or of the other quantized ones."""
    ends = (".weight_scale", ".scale")
    names = {name.rsplit(".", 1)[0] for name in tensors if name.endswith(ends)}
    return sorted(name for name in names if (".ffn.experts." in name) == expert)


def as_fp8(weight: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 in 128 x 128 blocks, block by block."""
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(weight.shape[0] // 128, weight.shape[1] // 128)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            factor = weight[block].float().abs().max() / 448
            scale[row, column] = 2.0 ** torch.ceil(torch.log2(factor)) if power_of_two else factor
            result[block] = (weight[block].float() / scale[row, column]).to(torch.float8_e4m3fn)
    return result, scale


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "fp8"])
def test_linear_layers_are_the_same_weights_in_fp8(tmp_path: Path, plain: Tensors, fmt: str) -> None:
    tensors = mc.made(tmp_path / "model", fmt)
    names = quantized(tensors, expert=False)
    assert len(names) == 3 * 8 + 1  # wq_a, wq_b, wkv, wo_a, wo_b, three shared, one indexer
    for name in names:
        weight, scale = as_fp8(plain[name + MATRIX], power_of_two=fmt != "fp8")
        assert torch.equal(tensors[name + MATRIX].view(torch.uint8), weight.view(torch.uint8)), name
        stored = tensors[name + ".scale"]
        assert stored.dtype == (torch.float32 if fmt == "fp8" else torch.float8_e8m0fnu)
        assert torch.equal(stored.float(), scale), name


def test_nvfp4_experts_are_the_quantized_weights(tmp_path: Path, plain: Tensors) -> None:
    tensors = mc.made(tmp_path / "model", "nvfp4")
    names = quantized(tensors, expert=True)
    assert len(names) == 3 * 8 * 3
    for name in names:
        want = nvfp4.quantize(plain[name + MATRIX])
        assert torch.equal(tensors[name + ".weight"], want.packed), name
        assert torch.equal(tensors[name + ".weight_scale"].view(torch.uint8), want.block_scale.view(torch.uint8)), name
        assert torch.equal(tensors[name + ".weight_scale_2"], want.global_scale), name
        assert tensors[name + ".weight_scale_2"].shape == tensors[name + ".input_scale"].shape == ()
        assert tensors[name + ".input_scale"].dtype == torch.float32
        assert tensors[name + ".input_scale"] > 0


def test_mxfp4_experts_are_the_quantized_weights(tmp_path: Path, plain: Tensors) -> None:
    tensors = mc.made(tmp_path / "model", "mxfp4")
    for name in quantized(tensors, expert=True):
        blocks = plain[name + MATRIX].float().unflatten(-1, (-1, 32))
        scale = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 6))
        codes = e2m1.encode(blocks / scale).flatten(-2)
        assert tensors[name + MATRIX].dtype == torch.int8
        assert torch.equal(tensors[name + MATRIX].view(torch.uint8), e2m1.pack(codes)), name
        assert torch.equal(tensors[name + ".scale"].float(), scale.squeeze(-1)), name


def test_fp8_experts_are_the_quantized_weights(tmp_path: Path, plain: Tensors) -> None:
    tensors = mc.made(tmp_path / "model", "fp8")
    for name in quantized(tensors, expert=True):
        weight, scale = as_fp8(plain[name + MATRIX], power_of_two=False)
        assert torch.equal(tensors[name + MATRIX].view(torch.uint8), weight.view(torch.uint8)), name
        assert torch.equal(tensors[name + ".scale"], scale), name


@pytest.mark.parametrize("ratio", [1.0, 1.25])
def test_dequantized_holds_the_values_of_the_checkpoint(tmp_path: Path, plain: Tensors, ratio: float) -> None:
    planted = mc.Planted(gate_up_ratio=ratio, vary_ratio=ratio != 1.0)
    stored = mc.made(tmp_path / "stored", planted=planted)
    values = mc.made(tmp_path / "values", dequantize=True, planted=planted)
    assert set(values) == set(plain)
    for name in quantized(stored, expert=True):
        fields = (stored[name + suffix] for suffix in (".weight", ".weight_scale", ".weight_scale_2"))
        assert torch.equal(values[name + MATRIX], nvfp4.dequantize(*fields)), name
    for name in quantized(stored, expert=False):
        scale = stored[name + ".scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(values[name + MATRIX].float(), stored[name + MATRIX].float() * scale), name
    for name in set(stored) & set(values):
        if not any(name.startswith(matrix + ".") for expert in (0, 1) for matrix in quantized(stored, bool(expert))):
            assert torch.equal(stored[name], values[name]), name


def test_planted_gate_up_ratio_changes_scales_and_not_weights(tmp_path: Path, plain: Tensors) -> None:
    for ratio in (1.25, 0.5):
        tensors = mc.made(tmp_path / str(ratio), planted=mc.Planted(gate_up_ratio=ratio))
        for name in quantized(tensors, expert=True):
            fields = [tensors[name + suffix] for suffix in (".weight", ".weight_scale", ".weight_scale_2")]
            assert metrics.relative_l2(nvfp4.dequantize(*fields), plain[name + MATRIX]) < 0.12, name
            if name.endswith(".w1"):
                up = tensors[name.removesuffix("w1") + "w3.weight_scale_2"]
                assert up / fields[2] == pytest.approx(ratio, rel=1e-6), name


def test_ratio_can_vary_by_expert(tmp_path: Path) -> None:
    tensors = mc.made(tmp_path / "model", planted=mc.Planted(gate_up_ratio=4.0, vary_ratio=True))
    ratios = {
        round(float(tensors[name + "w3.weight_scale_2"] / tensors[name + "w1.weight_scale_2"]), 4)
        for name in {name.removesuffix("w1") for name in quantized(tensors, expert=True) if name.endswith("w1")}
    }
    assert ratios == {0.25, 0.5, 2.0, 4.0}


def test_input_scales_spread_as_asked(tmp_path: Path) -> None:
    def scales(spread: float) -> torch.Tensor:
        tensors = mc.made(tmp_path / str(spread), planted=mc.Planted(input_scale_spread=spread))
        return torch.stack([tensors[name + ".input_scale"] for name in quantized(tensors, True) if "w2" not in name])

    assert len(scales(1.0).unique()) == 1
    spread = scales(10.0)
    assert 4.0 < spread.max() / spread.min() <= 10.0 * (1 + 1e-6)
    assert len(spread.unique()) > 0.9 * len(spread)


def test_weights_have_structure(plain: Tensors, tmp_path: Path) -> None:
    tensors = mc.made(tmp_path / "model")
    names = quantized(tensors, expert=True)
    assert len({float(tensors[name + ".weight_scale_2"]) for name in names}) >= 12
    assert len({plain[name + MATRIX].view(torch.int16).numpy().tobytes() for name in names}) == len(names)
    scales = torch.cat([tensors[name + ".weight_scale"].float().flatten() for name in names])
    low, high = torch.quantile(scales, torch.tensor([0.01, 0.99]))
    assert high / low > 4
    assert scales.min() > 0
    assert scales.max() == 448


def test_hash_layer_names_distinct_experts(plain: Tensors) -> None:
    table = plain["layers.0.ffn.gate.tid2eid"]
    assert table.shape == (512, 6)
    assert table.dtype == torch.int64
    assert all(len(row.unique()) == 6 for row in table)
    assert set(table.flatten().tolist()) == set(range(8))
    assert "layers.0.ffn.gate.bias" not in plain
    assert "layers.1.ffn.gate.bias" in plain


def test_configuration(tmp_path: Path) -> None:
    for fmt, dequantize in (("nvfp4", False), ("mxfp4", False), ("fp8", False), ("bf16", False), ("nvfp4", True)):
        directory = tmp_path / f"{fmt}-{dequantize}"
        mc.made(directory, fmt, dequantize)
        config = json.loads((directory / "config.json").read_text())
        assert config["architectures"] == ["DeepseekV4ForCausalLM"]
        assert config["compress_ratios"] == [0, 4, 128, 0]
        assert (config["n_routed_experts"], config["num_hash_layers"]) == (8, 1)
        quantization = config.get("quantization_config")
        assert (quantization is None) == (dequantize or fmt == "bf16")
        assert (directory / "hf_quant_config.json").exists() == (fmt == "nvfp4" and not dequantize)
        if quantization:
            assert quantization["quant_method"] == "fp8"
            assert quantization["weight_block_size"] == [128, 128]
            assert quantization.get("moe_quant_algo") == ("NVFP4" if fmt == "nvfp4" else None)
            assert config["expert_dtype"] == ("fp8" if fmt == "fp8" else "fp4")
    modelopt = json.loads((tmp_path / "nvfp4-False" / "hf_quant_config.json").read_text())
    assert modelopt["producer"]["name"] == "modelopt"
    assert set(modelopt["quantization"]["quantized_layers"]) == {f"layers.{i}.ffn.experts" for i in range(3)}


def test_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    mc.made(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "The answer to everything: 42, naïve 漢字 🙂\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 512
    for token, number in (("<｜begin▁of▁sentence｜>", 0), ("<｜end▁of▁sentence｜>", 1)):
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
    for token in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
