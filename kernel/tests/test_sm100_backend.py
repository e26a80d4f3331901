"""Sm100Backend without a GPU: layouts, plan, errors, and the whole layer on the PTX model."""

from __future__ import annotations

import math

import pytest
import torch
from nvfp4_megamoe.backends.sm100 import backend, catalogue, driver, layout, objects, variants
from nvfp4_megamoe.backends.sm100.backend import Sm100Backend
from nvfp4_megamoe.backends.sm100.plan import max_tiles
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import metrics, scale_layout
from ptx_model.layer_cases import ModelLauncher, random_weights
from ptx_model.testing import needs_compiler

GEOMETRY = MoEGeometry(num_experts=6, num_local_experts=3, top_k=2, hidden=256, intermediate=256, swiglu_limit=1.5)


def prepared(rng, launcher=None, geometry: MoEGeometry = GEOMETRY, one_scale: bool = False):
    weights = random_weights(rng, geometry.num_local_experts, geometry.hidden, geometry.intermediate, one_scale)
    copy = ExpertWeights(**{name: value.clone() for name, value in vars(weights).items()})
    made = Sm100Backend(geometry, launcher=launcher or ModelLauncher(2))
    made.prepare(copy)
    return made, weights


def batch(rng, geometry: MoEGeometry, tokens: int):
    x = torch.randn(tokens, geometry.hidden, generator=rng).bfloat16()
    weight, ids = torch.rand(tokens, geometry.num_experts, generator=rng).topk(geometry.top_k)
    expert_map = torch.full((geometry.num_experts,), -1, dtype=torch.int32)
    chosen = torch.randperm(geometry.num_experts, generator=rng)[: geometry.num_local_experts]
    expert_map[chosen] = torch.arange(geometry.num_local_experts, dtype=torch.int32)
    return x, ids.to(torch.int32), weight, expert_map


@needs_compiler
@pytest.mark.parametrize(("one_scale", "tile"), [(True, "few16"), (False, "few16"), (False, "n128")])
def test_layer_equals_the_oracle(rng, one_scale, tile, monkeypatch):
    if tile == "n128":
        monkeypatch.setattr(variants, "FEW_MEAN", {16: 0})
    launcher = ModelLauncher(2, approximation_ulps=2)
    made, weights = prepared(rng, launcher, one_scale=one_scale)
    x, ids, weight, expert_map = batch(rng, GEOMETRY, 20)
    ids[3] = -1
    out = torch.full_like(x, torch.nan)
    made.forward(x, ids, weight, expert_map, out, torch.zeros(made.workspace_bytes(20), dtype=torch.uint8))
    expected = moe_oracle(weights, x, ids, weight, expert_map, GEOMETRY.swiglu_limit, "w4a4")
    assert metrics.relative_l2(out, expected) <= 5e-3
    assert not out[3].any()
    assert launcher.names == ["plan_one", "quantize_rows", f"gemm1_{tile}", f"gemm2_{tile}", "sum_slots"]


@needs_compiler
@pytest.mark.parametrize(("tokens", "tile"), [(20, "few32"), (256, "pair")])
def test_fused_sum_equals_the_oracle(rng, monkeypatch, tokens, tile):
    monkeypatch.setenv("NVFP4_SM100_SUM", "fused")
    geometry = MoEGeometry(num_experts=2, num_local_experts=1, top_k=2, hidden=256, intermediate=256, swiglu_limit=1.5)
    launcher = ModelLauncher(2)
    made, weights = prepared(rng, launcher, geometry)
    x, ids, weight, expert_map = batch(rng, geometry, tokens)
    ids[3] = -1
    out = torch.full_like(x, torch.nan)
    made.forward(x, ids, weight, expert_map, out, torch.zeros(made.workspace_bytes(tokens), dtype=torch.uint8))
    expected = moe_oracle(weights, x, ids, weight, expert_map, geometry.swiglu_limit, "w4a4")
    assert metrics.relative_l2(out, expected) <= 5e-3
    assert not out[3].any()
    assert launcher.names == ["plan_one", "quantize_rows", f"gemm1_{tile}", f"gemm2_{tile}_add"]


def test_choice_of_the_sum(monkeypatch):
    assert not Sm100Backend(GEOMETRY).fused
    assert Sm100Backend(GEOMETRY, sums="fused").fused
    ordered, fused = (Sm100Backend(GEOMETRY, sums=sums).workspace_bytes(64) for sums in ("ordered", "fused"))
    assert ordered - fused == 64 * 2 * 256 * 2
    monkeypatch.setenv("NVFP4_SM100_SUM", "sometimes")
    with pytest.raises(UnsupportedError, match="NVFP4_SM100_SUM is 'sometimes'; expected ordered or fused"):
        Sm100Backend(GEOMETRY)


@pytest.mark.parametrize("rows", [128, 384])
def test_images_are_invertible_and_follow_the_closed_forms(rng, rows):
    packed = torch.randint(0, 256, (rows, 256), generator=rng, dtype=torch.uint8)
    images = layout.code_images(packed)
    assert torch.equal(layout.codes_of(images), packed)
    r, byte = rows - 5, 200
    chunk = byte % 128 // 16 ^ r % 8
    assert images[r // 128, byte // 128, r % 128 * 128 + chunk * 16 + byte % 16] == packed[r, byte]
    scale = torch.randint(0, 256, (rows, 32), generator=rng, dtype=torch.uint8)
    images = layout.scale_images(scale)
    assert torch.equal(layout.scales_of(images), scale)
    assert torch.equal(images.flatten(), scale_layout.swizzle(scale).flatten())


@pytest.mark.parametrize("slots", layout.FEW_SLOTS)
def test_scale_parts_are_invertible_and_follow_the_closed_form(rng, slots):
    scale = torch.randint(0, 256, (256, 32), generator=rng, dtype=torch.uint8)
    parts = layout.scale_parts(scale, slots)
    assert parts.shape == (2, 2, 128 // slots, layout.part_scale_bytes(slots))
    assert torch.equal(layout.scales_of_parts(parts, slots), scale)
    row, group = 128 + 77, 27
    at = group % 16 // 4 * 16 * min(slots, 32) + row % slots % 32 * 16 + row % slots // 32 * 4 + group % 4
    assert parts[1, 1, 77 // slots, at] == scale[row, group]


def test_gate_and_up_alternate_in_groups_of_16(rng):
    rows = torch.arange(512)[:, None]
    mixed = layout.interleave_gate_up(rows).flatten()
    assert mixed[:16].tolist() == list(range(16))
    assert mixed[16:32].tolist() == list(range(256, 272))
    assert sorted(mixed.tolist()) == list(range(512))


@pytest.mark.parametrize("shape", [(100, 256), (128, 250)])
def test_shape_that_is_no_whole_image(shape):
    with pytest.raises(UnsupportedError, match="multiples of 128 rows and 256 columns"):
        layout.check_shape(*shape, "weights")


class Recorder:
    """A launcher that executes nothing."""

    def __init__(self):
        self.calls = []

    def launch(self, name, blocks, args):
        self.calls.append((name, blocks, args))


@pytest.mark.parametrize(
    ("tokens", "tiles", "blocks"),
    [
        (1, ("few16", "few16"), 147),
        (24, ("few16", "few16"), 147),
        (25, ("few32", "few32"), 147),
        (64, ("few64", "few64"), 147),
        (142, ("n128", "n128"), 147),
        (384, ("n256", "n128"), 147),
        (768, ("pair", "pair"), 146),
    ],
)
def test_variant_follows_the_shapes_alone(rng, tokens, tiles, blocks):
    recorder = Recorder()
    made, _ = prepared(rng, recorder)
    made.blocks = 147
    x, ids, weight, expert_map = batch(rng, GEOMETRY, tokens)
    workspace = torch.zeros(made.workspace_bytes(tokens), dtype=torch.uint8)
    for routed in (ids, torch.full_like(ids, -1)):
        made.forward(x, routed, weight, expert_map, torch.empty_like(x), workspace)
    for sequence in (recorder.calls[:5], recorder.calls[5:]):
        assert [call[:2] for call in sequence[2:4]] == [(f"gemm{i + 1}_{tiles[i]}", blocks) for i in range(2)]
        assert sequence[1][1] == tokens * (1 if made.parameters.one_scale else 2)
        for called, _, args in sequence:
            kinds = "".join("q" if isinstance(a, torch.Tensor) else "f" if isinstance(a, float) else "i" for a in args)
            assert kinds == catalogue.arguments(called)[:-1]


def test_parts_are_large_enough_for_nearly_every_expert():
    """Poisson's distribution of an expert's slots at the largest mean of each part size."""
    for slots, mean in variants.FEW_MEAN.items():
        within = sum(math.exp(-mean + count * math.log(mean) - math.lgamma(count + 1)) for count in range(slots + 1))
        assert 1 - within < 0.01
    assert tuple(variants.FEW_MEAN) == layout.FEW_SLOTS


@pytest.mark.parametrize("experts", [48, 384])
def test_fewer_tokens_never_need_a_larger_workspace(experts):
    geometry = MoEGeometry(
        num_experts=384, num_local_experts=experts, top_k=6, hidden=7168, intermediate=3072, swiglu_limit=10.0
    )
    made = Sm100Backend(geometry)
    last = variants.most_few_tokens(geometry)
    sizes = [made.workspace_bytes(tokens) for tokens in (1, 7, 512, 513, 1344, last, last + 1, last + 99, 5000)]
    assert sizes == sorted(sizes)
    assert [bool(variants.few_slots(tokens, geometry)) for tokens in (1, last, last + 1)] == [True, True, False]
    for tokens in (1, 512, 1344, last):
        slots = variants.few_slots(tokens, geometry)
        images = max_tiles(tokens * 6, experts) * 12
        needed = images * 128 // slots * layout.part_scale_bytes(slots)
        assert made._parts(tokens)["inter_scales"][1][0] >= needed


def test_prepare_needs_no_second_copy(rng):
    made, _ = prepared(rng)
    assert made.weights.w13.shape == (3, 512, 128)


def test_workspace_is_enough_and_checked(rng):
    made, _ = prepared(rng)
    views = made._carve(torch.zeros(made.workspace_bytes(50), dtype=torch.uint8), 50)
    assert views["slot_rows"].shape == (100, 256)
    x, ids, weight, expert_map = batch(rng, GEOMETRY, 4)
    with pytest.raises(UnsupportedError, match="the workspace has 10 bytes"):
        made.forward(x, ids, weight, expert_map, torch.empty_like(x), torch.zeros(10, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("x", lambda t: t.float(), "x: expected"),
        ("x", lambda t: t[:, :128], "x: expected"),
        ("ids", lambda t: t.float(), "topk_ids: expected"),
        ("weight", lambda t: t[:, :1], "topk_weights: expected"),
        ("map", lambda t: t.long(), "expert_map: expected"),
    ],
)
def test_wrong_arguments_are_named(rng, which, change, message):
    made, _ = prepared(rng)
    x, ids, weight, expert_map = batch(rng, GEOMETRY, 4)
    args = {"x": x, "ids": ids, "weight": weight, "map": expert_map}
    args[which] = change(args[which])
    with pytest.raises(UnsupportedError, match=message):
        made.forward(*args.values(), torch.empty_like(x), torch.zeros(made.workspace_bytes(4), dtype=torch.uint8))


def test_unsupported_devices_and_shapes(monkeypatch):
    needs = "the sm100 backend needs a Blackwell GPU (compute capability 10.0)"
    assert Sm100Backend.unsupported_reason(GEOMETRY, torch.device("cpu")) == f"{needs}, not cpu"
    for found in ((9, 0), (10, 3)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        reason = Sm100Backend.unsupported_reason(GEOMETRY, torch.device("cuda:1"))
        assert reason == f"{needs}; cuda:1 has {found[0]}.{found[1]}"
    assert "multiples of 256" in backend.shape_problem(4, 384, 256)
    assert backend.shape_problem(513, 512, 256) == "513 local experts; the kernels take 1 to 512"
    assert "1 to 512" in backend.shape_problem(0, 512, 256)
    assert backend.shape_problem(48, 7168, 3072) is None
    assert backend.shape_problem(32, 4096, 2048) is None
    with pytest.raises(RuntimeError, match="before prepare"):
        Sm100Backend(GEOMETRY).forward(*[None] * 6)


def test_geometry_that_no_kernel_fits_is_refused_where_the_objects_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(objects, "read", dict)
    device = torch.device("cuda:0")
    for inter, reason in ((384, "hidden 512 and intermediate 384 must be multiples of 256"), (256, None)):
        geometry = MoEGeometry(8, 8, 2, 512, inter, None)
        assert Sm100Backend.unsupported_reason(geometry, device) == reason


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values two bytes past an address of 16 bytes."""
    raw = torch.zeros(tensor.nbytes + 32, dtype=torch.uint8)
    begin = -raw.data_ptr() % 16 + 2
    view = raw[begin : begin + tensor.nbytes].view(torch.uint8)
    view = view.view(tensor.dtype) if tensor.dtype.itemsize <= 2 else view
    return view.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ["w13", "w13_scale", "w2", "w2_scale"])
def test_misaligned_weights_are_named(rng, name):
    weights = random_weights(rng, 3, 256, 256, False)
    changed = ExpertWeights(**{**vars(weights), name: misaligned(getattr(weights, name))})
    with pytest.raises(UnsupportedError, match=f"{name} must be contiguous, aligned to 16 bytes"):
        Sm100Backend(GEOMETRY, launcher=Recorder()).prepare(changed)


@pytest.mark.parametrize("which", ["x", "out"])
def test_misaligned_activations_are_named(rng, which):
    made, _ = prepared(rng, Recorder())
    x, ids, weight, expert_map = batch(rng, GEOMETRY, 4)
    args = {"x": x, "out": torch.empty_like(x)}
    args[which] = misaligned(args[which])
    workspace = torch.zeros(made.workspace_bytes(4), dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match=f"{which} must be contiguous and aligned to 16 bytes"):
        made.forward(args["x"], ids, weight, expert_map, args["out"], workspace)


def test_no_token_launches_nothing(rng):
    recorder = Recorder()
    made, _ = prepared(rng, recorder)
    x, ids, weight, expert_map = (t[:0] if i < 3 else t for i, t in enumerate(batch(rng, GEOMETRY, 1)))
    made.forward(x, ids, weight, expert_map, torch.empty_like(x), None)
    assert recorder.calls == []


@pytest.mark.parametrize("sums", ["ordered", "fused"])
def test_everything_lies_in_the_given_tensors(rng, sums):
    """No launch reads or writes memory that the call allocated: a CUDA graph can be replayed."""
    recorder = Recorder()
    made, _ = prepared(rng, recorder)
    made.fused = sums == "fused"
    x, ids, weight, expert_map = batch(rng, GEOMETRY, 40)
    out, workspace = torch.empty_like(x), torch.zeros(made.workspace_bytes(40), dtype=torch.uint8)
    made.forward(x, ids, weight, expert_map, out, workspace)
    given = [x, ids, weight, expert_map, out, workspace, *vars(made.weights).values(), *made.parameters[:3]]
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in given]
    used = []
    for _, _, args in recorder.calls:
        for tensor in (arg for arg in args if isinstance(arg, torch.Tensor)):
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            assert any(low <= begin and end <= high for low, high in spans)
            used.append((begin, end))
    parts = made._carve(workspace, 40).values()
    assert all((p.data_ptr(), p.data_ptr() + p.nbytes) in used for p in parts)


def test_objects_that_were_not_built(tmp_path):
    with pytest.raises(UnsupportedError, match=r"python -m nvfp4_megamoe\.backends\.sm100\.build"):
        objects.read(tmp_path)


def test_manifest_round_trip_and_missing_file(tmp_path):
    item = objects.KernelObject("k", "entry", 128, 0, 1, 32, "qif")
    objects.write(tmp_path, [item], {"architecture": "sm_100a"})
    with pytest.raises(UnsupportedError, match=r"k\.cubin"):
        objects.read(tmp_path)
    (tmp_path / "k.cubin").write_bytes(b"")
    assert objects.read(tmp_path) == {"k": item}


def test_argument_kinds_are_checked():
    item = objects.KernelObject("k", "entry", 128, 0, 1, 32, "qif")
    tensor = torch.zeros(4)
    values = driver.argument_values(item, [tensor, 3, math.inf])
    assert [value.value for value in values] == [tensor.data_ptr(), 3, math.inf]
    with pytest.raises(TypeError, match="takes arguments qif, got qii"):
        driver.argument_values(item, [tensor, 3, 4])
