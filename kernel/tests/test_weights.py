from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from moe_cases import GEOMETRY, PREFIX, random_tensors, random_weights
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.errors import CheckpointError
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4

LOCAL = [5, 0, 2]
LOCAL_GEOMETRY = dataclasses.replace(GEOMETRY, num_local_experts=len(LOCAL))
FILE = "model-00002-of-00003.safetensors"
LAYER = "model.layers.3.ffn.experts"


def build(tensors, ids=LOCAL, geometry=LOCAL_GEOMETRY, source=FILE):
    return ExpertWeights.from_checkpoint(tensors, PREFIX, ids, geometry, source)


def refused(tensors, name, *words, **kwargs):
    """The error names the tensor, the file, every one of ``words``, an expectation and a remedy."""
    with pytest.raises(CheckpointError) as error:
        build(tensors, **kwargs)
    message = str(error.value)
    for word in (name, FILE, "expected", "checkpoint", *words):
        assert word in message, message
    return message


def test_every_tensor_lands_in_its_place(rng):
    tensors = random_tensors(GEOMETRY, rng)
    w = build(tensors)
    assert (w.num_experts, w.hidden, w.intermediate) == (3, GEOMETRY.hidden, GEOMETRY.intermediate)
    rows = GEOMETRY.intermediate
    for local, expert in enumerate(LOCAL):
        for half, projection in enumerate(("w1", "w3")):
            name = f"{PREFIX}.{expert}.{projection}"
            part = slice(half * rows, (half + 1) * rows)
            values = nvfp4.dequantize(w.w13[local, part], w.w13_scale[local, part], w.w13_global[local, half])
            assert torch.equal(values, _values(tensors, name))
            assert w.w13_input_scale[local, half] == tensors[f"{name}.input_scale"]
        name = f"{PREFIX}.{expert}.w2"
        values = nvfp4.dequantize(w.w2[local], w.w2_scale[local], w.w2_global[local])
        assert torch.equal(values, _values(tensors, name))
        assert w.w2_input_scale[local] == tensors[f"{name}.input_scale"]
    w.validate(LAYER)


def _values(tensors, name):
    return nvfp4.dequantize(*(tensors[f"{name}.{kind}"] for kind in ("weight", "weight_scale", "weight_scale_2")))


def test_scalars_may_have_one_dimension(rng):
    tensors = random_tensors(GEOMETRY, rng)
    flat = {name: t.reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
    for a, b in zip(_fields(build(flat)), _fields(build(tensors)), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _fields(weights):
    return [getattr(weights, f.name) for f in dataclasses.fields(weights)]


def test_other_layers_and_ranks_are_left_alone(rng):
    tensors = random_tensors(GEOMETRY, rng)
    tensors["layers.3.ffn.shared_experts.w1.weight"] = torch.zeros(1)
    tensors["layers.30.ffn.experts.0.w1.weight"] = torch.zeros(1)
    del tensors[f"{PREFIX}.7.w1.weight"]
    tensors[f"{PREFIX}.6.w1.weight_scale_2"] = torch.tensor(math.nan)
    build(tensors)


@pytest.mark.parametrize("kind", list(et.DTYPES))
@pytest.mark.parametrize("projection", et.PROJECTIONS)
def test_missing_tensor(rng, projection, kind):
    tensors = random_tensors(GEOMETRY, rng)
    name = f"{PREFIX}.2.{projection}.{kind}"
    del tensors[name]
    refused(tensors, name, "missing", "Download", source=lambda n: FILE)
    with pytest.raises(CheckpointError, match="in the checkpoint: the tensor is missing"):
        build(tensors, source={n: FILE for n in tensors}.__getitem__)


@pytest.mark.parametrize(
    "suffix", ["8.w1.weight", "0.w4.weight", "0.w1.bias", "0.w1.scale", "00.w1.weight", "w1.weight"]
)
def test_unknown_tensor(rng, suffix):
    tensors = random_tensors(GEOMETRY, rng)
    tensors[f"{PREFIX}.{suffix}"] = torch.zeros(1)
    refused(tensors, f"{PREFIX}.{suffix}", "unknown expert tensor", "experts 0 to 7")


@pytest.mark.parametrize("kind", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("projection", et.PROJECTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -0.01])
def test_bad_scalar(rng, projection, kind, value):
    tensors = random_tensors(GEOMETRY, rng)
    name = f"{PREFIX}.2.{projection}.{kind}"
    tensors[name] = torch.tensor(value)
    refused(tensors, name, f"the value is {value:g}", "finite number above zero")
    weights = random_weights(LOCAL_GEOMETRY, rng, LOCAL)
    weights.projection(projection)[kind][2] = value
    assert_invalid(weights, projection, kind, f"the value is {value:g}")


@pytest.mark.parametrize("projection", et.PROJECTIONS)
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x7F, "1 NaN block"),
        (0xFF, "1 NaN block"),
        (0x80, "sign bit set"),
        (0xB8, "sign bit set"),
        (0x00, "zero block"),
    ],
)
def test_bad_block_scale(rng, projection, bits, words):
    tensors = random_tensors(GEOMETRY, rng)
    name = f"{PREFIX}.2.{projection}.weight_scale"
    tensors[name].view(torch.uint8)[-1, -1] = bits
    tensors[f"{PREFIX}.2.{projection}.weight"][-1, -1] = 0x70
    refused(tensors, name, words, "expected")
    weights = random_weights(LOCAL_GEOMETRY, rng, LOCAL)
    weights.projection(projection)["weight_scale"][2].view(torch.uint8)[-1, -1] = bits
    assert_invalid(weights, projection, "weight_scale", words)


def assert_invalid(weights, projection, kind, words):
    for ids, which in ((None, "local expert 2"), ([7, 40, 41], "expert 41")):
        with pytest.raises(CheckpointError) as error:
            weights.validate(LAYER, ids)
        for word in (LAYER, which, f"{projection}.{kind}", words, "expected", "Download"):
            assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("projection", et.PROJECTIONS)
def test_zero_scale_over_zero_codes_is_right(rng, projection):
    weights = random_weights(LOCAL_GEOMETRY, rng, LOCAL)
    part = weights.projection(projection)
    part["weight_scale"][1].view(torch.uint8)[3, 1] = 0
    part["weight"][1][3, 8:16] = 0x80  # -0 is zero too
    weights.validate(LAYER)
    for byte in range(8, 16):
        for code in (0x01, 0x90):
            part["weight"][1][3, byte] = code
            with pytest.raises(CheckpointError, match="1 zero block"):
                weights.validate(LAYER)
        part["weight"][1][3, byte] = 0
    part["weight"][1][3, 7] = part["weight"][1][3, 16] = 0x77  # its neighbours do not count
    weights.validate(LAYER)


@pytest.mark.parametrize("kind", list(et.DTYPES))
def test_wrong_dtype(rng, kind):
    for other in (torch.bfloat16, torch.int8, torch.float64):
        tensors = random_tensors(GEOMETRY, rng)
        name = f"{PREFIX}.5.w3.{kind}"
        tensors[name] = tensors[name].to(other)
        refused(tensors, name, str(other), str(et.DTYPES[kind]))


@pytest.mark.parametrize("kind", list(et.DTYPES))
def test_wrong_shape(rng, kind):
    for change in (lambda t: t[..., :-1] if t.ndim else t.expand(2), lambda t: t[None] if t.ndim else t.reshape(1, 1)):
        tensors = random_tensors(GEOMETRY, rng)
        name = f"{PREFIX}.0.w2.{kind}"
        tensors[name] = change(tensors[name])
        shape = list(et.shape_of("w2", kind, GEOMETRY.hidden, GEOMETRY.intermediate))
        refused(tensors, name, str(list(tensors[name].shape)), str(shape))


@pytest.mark.parametrize(("field", "what"), [("hidden", "hidden size"), ("intermediate", "intermediate size")])
@pytest.mark.parametrize("size", [0, 8, 40, 47])
def test_k_must_divide_into_blocks(rng, field, what, size):
    geometry = dataclasses.replace(LOCAL_GEOMETRY, **{field: size})
    with pytest.raises(CheckpointError, match=f"{PREFIX}.*{what} is {size}.*multiple of 16"):
        build(random_tensors(GEOMETRY, rng), geometry=geometry)
    if size % 2 == 0:
        with pytest.raises(CheckpointError, match=f"{LAYER}.*{what} is {size}.*multiple of 16"):
            ExpertWeights.empty(2, geometry.hidden, geometry.intermediate).validate(LAYER)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 8], [-1, 0, 1]])
def test_expert_ids_must_fit(rng, ids):
    with pytest.raises(ValueError, match=r"xpert ids"):
        build(random_tensors(GEOMETRY, rng), ids=ids)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ExpertWeights)])
def test_validate_refuses_wrong_types_and_shapes(rng, field):
    weights = random_weights(LOCAL_GEOMETRY, rng, LOCAL)
    tensor = getattr(weights, field)
    wrong = [tensor.float().double(), tensor[:2], tensor.unsqueeze(-1)]
    if tensor.ndim > 1:
        wrong.append(tensor.transpose(0, 1).contiguous().transpose(0, 1))
    for other in wrong:
        with pytest.raises(CheckpointError, match=LAYER):
            dataclasses.replace(weights, **{field: other}).validate(LAYER)
    weights.validate(LAYER)


def test_no_local_expert_is_valid():
    ExpertWeights.empty(0, 64, 48).validate(LAYER)


def test_validate_needs_little_memory():
    """Eight experts of 1.5 MiB packed: the scratch must not grow with the number of experts, nor dequantize one."""
    weights = ExpertWeights.empty(8, 1024, 1024)
    for name in ("w13", "w2"):
        getattr(weights, name).fill_(0x11)
        getattr(weights, f"{name}_scale").fill_(1.0)
        getattr(weights, f"{name}_global").fill_(1.0)
        getattr(weights, f"{name}_input_scale").fill_(1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        weights.validate(LAYER)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 3 * weights.w2[0].numel()
