from __future__ import annotations

import time

import pytest
from checkpoint_cases import Checkpoint, config
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.checkpoint.validate import check_checkpoint
from nvfp4_megamoe.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path)


def refused(checkpoint, *words, **kwargs):
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(checkpoint.write(), **kwargs)
    for word in ("expected", *words):
        assert word in str(error.value), str(error.value)


def test_a_right_checkpoint(checkpoint):
    checkpoint.config["num_nextn_predict_layers"] = 1
    summary = check_checkpoint(checkpoint.write(), expert_parallel_size=2)
    assert (summary.layers, summary.nvfp4_layers, summary.experts) == (3, 3, 4)
    assert (summary.hidden, summary.intermediate) == (64, 32)
    assert (summary.shards, summary.tensors) == (3, len(checkpoint.map))
    assert summary.data_bytes == sum(f.stat().st_size for f in checkpoint.directory.glob("*.safetensors")) - sum(
        8 + int.from_bytes(f.read_bytes()[:8], "little") for f in checkpoint.directory.glob("*.safetensors")
    )
    assert str(summary).startswith("3 of 3 layers with 4 NVFP4 experts of 64 x 32")


def test_scalars_may_have_one_dimension(checkpoint):
    for name in list(checkpoint.map):
        if name.endswith(("weight_scale_2", "input_scale")):
            checkpoint.shards[checkpoint.map[name]][name] = ("F32", [1])
    check_checkpoint(checkpoint.write())


@pytest.mark.parametrize("kind", list(et.DTYPES))
@pytest.mark.parametrize("projection", et.PROJECTIONS)
def test_missing_tensor(checkpoint, projection, kind):
    name = f"layers.2.ffn.experts.3.{projection}.{kind}"
    file = checkpoint.map[name]
    checkpoint.drop(name)
    refused(checkpoint, name, "missing", "Download", str(checkpoint.directory), "" if kind == "weight" else file)


@pytest.mark.parametrize("kind", list(et.DTYPES))
@pytest.mark.parametrize("projection", et.PROJECTIONS)
def test_wrong_dtype_and_shape(checkpoint, projection, kind):
    name = f"layers.1.ffn.experts.0.{projection}.{kind}"
    file = checkpoint.map[name]
    dtype, shape = checkpoint.shards[file][name]
    for other in ((dtype, [*shape, 2]), (dtype, [*shape[:-1], 5]), ("I64", shape), ("I8", shape)):
        checkpoint.shards[file][name] = other
        refused(checkpoint, name, file, f"{other[0]} {other[1]}", f"{dtype} {shape}", "Download")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_unquantized_weights_under_a_promise_of_nvfp4(checkpoint, dtype):
    for name in [n for n in checkpoint.map if ".ffn.experts." in n]:
        if name.endswith(".weight"):
            rows, half = checkpoint.shards[checkpoint.map[name]][name][1]
            checkpoint.shards[checkpoint.map[name]][name] = (dtype, [rows, half * 2])
        else:
            checkpoint.drop(name)
    name = "layers.0.ffn.experts.0.w1.weight"
    refused(checkpoint, name, checkpoint.map[name], f"{dtype} [32, 64]", "not quantized", "config.json promises NVFP4")


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.ffn.experts.4.w1.weight",
        "layers.1.ffn.experts.0.w1.scale",
        "layers.1.ffn.experts.0.w1.bias",
        "layers.1.ffn.experts.0.w4.weight",
        "layers.1.ffn.experts.00.w1.weight",
        "layers.1.ffn.experts.w13_weight",
        "layers.3.ffn.experts.0.w1.weight",
        "layers.x.ffn.experts.0.w1.weight",
        "layers.01.ffn.experts.0.w1.weight",
    ],
)
def test_unknown_expert_tensor(checkpoint, name):
    checkpoint.set(name, "U8", [2, 2], layer=1)
    refused(checkpoint, name, checkpoint.map[name], "unknown expert tensor", "layers 0 to 2, experts 0 to 3")


def test_prediction_layers_are_ignored(checkpoint):
    checkpoint.config["num_nextn_predict_layers"] = 1
    for name in ("mtp.0.ffn.experts.9.w1.scale", "mtp.0.e_proj.weight", "layers.3.ffn.experts.0.w1.scale"):
        checkpoint.set(name, "I8", [2, 2])
    check_checkpoint(checkpoint.write())


@pytest.mark.parametrize("pattern", ["layers.1.ffn.experts", "layers.1.*", "*.1.ffn.experts", "layers.[1].ffn.*"])
def test_layers_that_the_quantizer_left_out_are_skipped(checkpoint, pattern):
    for name in [n for n in checkpoint.first(1)[1] if ".ffn.experts." in n]:
        checkpoint.drop(name)
    checkpoint.set("layers.1.ffn.experts.0.w1.scale", "I8", [2, 2], layer=1)
    refused(checkpoint, "layers.1.ffn.experts.0.w1.weight", "missing")
    checkpoint.config["quantization_config"]["ignore"].append(pattern)
    assert check_checkpoint(checkpoint.write()).nvfp4_layers == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "modelopt"}, "quant_method 'modelopt'"),
        ({"moe_quant_algo": None}, "moe_quant_algo None"),
        ({"moe_quant_algo": "MXFP4"}, "moe_quant_algo 'MXFP4'"),
        ({"group_size": 32}, "group_size is 32"),
        ({"quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 8}}}, "group_size is 8"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}, "group_size is 32"),
    ],
)
def test_quantization_config(tmp_path, change, words):
    checkpoint = Checkpoint(tmp_path, config(quantization_config=change))
    refused(checkpoint, "config.json", words, "NVFP4")


def test_quantization_config_may_be_terse(tmp_path):
    cfg = config()
    cfg["quantization_config"] = {"quant_method": "fp8", "moe_quant_algo": "nvfp4", "group_size": None}
    check_checkpoint(Checkpoint(tmp_path, cfg).write())
    other = {"config_groups": {"g": {"weights": {"num_bits": 8, "group_size": 128}}}, "quantized_layers": None}
    check_checkpoint(Checkpoint(tmp_path, config(quantization_config=other)).write())
    refused(Checkpoint(tmp_path, cfg | {"quantization_config": None}), "moe_quant_algo None")


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "hidden_size", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [None, 0, -4, "64", 2.5, True])
def test_geometry_must_be_stated(checkpoint, key, value):
    checkpoint.config[key] = value
    refused(checkpoint, "config.json", f"{key} is {value!r}", "positive integer")


@pytest.mark.parametrize(
    ("key", "what"), [("hidden_size", "hidden size"), ("moe_intermediate_size", "intermediate size")]
)
def test_k_must_divide_into_blocks(checkpoint, key, what):
    checkpoint.config[key] = 40
    refused(checkpoint, "config.json", f"{what} is 40", "multiple of 16")


@pytest.mark.parametrize("ranks", [3, 8, 0, -1])
def test_experts_must_divide_over_the_ranks(checkpoint, ranks):
    refused(checkpoint, "n_routed_experts is 4", f"{ranks} expert-parallel ranks", expert_parallel_size=ranks)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unreadable_config(checkpoint, text):
    path = checkpoint.write() / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json.*expected.*Download"):
        check_checkpoint(checkpoint.directory)


def test_truncated_shard(checkpoint):
    file, _ = checkpoint.first(1)
    path = checkpoint.write() / file
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(size - 100)
    with pytest.raises(CheckpointError, match=f"{file} is truncated: expected {size} bytes.*found {size - 100} bytes"):
        check_checkpoint(checkpoint.directory)


def test_the_full_model_takes_seconds(tmp_path):
    """61 layers of 384 experts, 281,088 expert tensors; the data are holes of 0.8 TB in all."""
    cfg = config(num_hidden_layers=61, n_routed_experts=384, hidden_size=7168, moe_intermediate_size=3072)
    Checkpoint(tmp_path, cfg).write()
    started = time.process_time()
    summary = check_checkpoint(tmp_path, expert_parallel_size=8)
    taken = time.process_time() - started
    print(f"checked {summary} in {taken:.2f} s of CPU time")
    assert summary.tensors == 61 * (384 * 12 + 3) and taken < 10
