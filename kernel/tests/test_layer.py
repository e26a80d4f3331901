from __future__ import annotations

import dataclasses

import pytest
import torch
from moe_cases import GEOMETRY, Float32Backend, random_batch, random_map, random_weights
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.numerics import metrics

LIMIT = GEOMETRY.swiglu_limit
# Big enough for one lost block or row to be a small part of the whole, as in a real layer.
LARGER = MoEGeometry(num_experts=8, num_local_experts=8, top_k=3, hidden=256, intermediate=128, swiglu_limit=10.0)


def right(a: torch.Tensor, oracle: torch.Tensor) -> bool:
    """Noise of a right W4A16 backend: bfloat16 output, 2**-9 relative, and bfloat16 decisions on the intermediate."""
    return (
        metrics.calc_diff(a, oracle) < 5e-5
        and abs(metrics.norm_ratio(a, oracle) - 1) < 2e-3
        and metrics.worst_row(a, oracle)[1] < 2e-2
    )


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("local", [8, 3, 1, 0])
def test_a_right_backend_agrees_with_the_oracle(rng, tokens, local):
    geometry = dataclasses.replace(GEOMETRY, num_local_experts=local)
    weights = random_weights(geometry, rng)
    expert_map = None if local == GEOMETRY.num_experts else random_map(geometry, rng)
    layer = MoELayer(geometry, weights, Float32Backend(LIMIT))
    batch = random_batch(geometry, tokens, rng)
    got = layer(*batch, expert_map)
    assert got.dtype == torch.bfloat16
    assert right(got, moe_oracle(weights, *batch, expert_map, LIMIT, "w4a16"))


class Squared(Float32Backend):
    def combine(self, topk_weights):
        return topk_weights**2


class DroppedSlot(Float32Backend):
    """Loses the last slot of the first expert that has one."""

    def slots(self, topk_ids, expert_map):
        slots = super().slots(topk_ids, expert_map)
        first = int((slots.offsets.diff() > 0).nonzero()[0])
        order = slots.order.tolist()
        del order[int(slots.offsets[first + 1]) - 1]
        slots.offsets[first + 1 :] -= 1
        return slots._replace(order=torch.tensor(order, dtype=torch.int32))


class Faulty(Float32Backend):
    """Spoils its own copy of the weights."""

    def __init__(self, fault):
        super().__init__(LIMIT)
        self.fault = fault

    def prepare(self, weights):
        fields = {f.name: getattr(weights, f.name).clone() for f in dataclasses.fields(weights)}
        self.fault(fields)
        super().prepare(dataclasses.replace(weights, **fields))


def swap_nibbles(w):
    w["w13"] = (w["w13"] << 4) | (w["w13"] >> 4)


def gates_scale_for_up(w):
    w["w13_global"][:, 1] = w["w13_global"][:, 0]


def up_scale_off_by_a_quarter(w):
    w["w13_global"][:, 1] *= 1.25


def value_cast_scales(w):
    w["w2_scale"] = w["w2_scale"].view(torch.uint8).float().to(torch.float8_e4m3fn)


def lose_one_block_of_gate(w):
    w["w13"][:, : w["w13"].shape[1] // 2, :8] = 0


def swap_gate_and_up(w):
    for name in ("w13", "w13_scale"):
        w[name] = w[name].roll(w[name].shape[1] // 2, dims=1)
    w["w13_global"] = w["w13_global"].flip(1)


def one_expert_off(w):
    w["w2_global"][3] *= 1.1


WEIGHT_FAULTS = [
    swap_nibbles,
    gates_scale_for_up,
    up_scale_off_by_a_quarter,
    value_cast_scales,
    lose_one_block_of_gate,
    swap_gate_and_up,
    one_expert_off,
]
FAULTS = {f.__name__: lambda f=f: Faulty(f) for f in WEIGHT_FAULTS} | {
    "squared routing weights": lambda: Squared(LIMIT),
    "dropped slot": lambda: DroppedSlot(LIMIT),
    "no clamp": lambda: Float32Backend(None),
    "clamp on the wrong side": lambda: Float32Backend(-LIMIT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_rejected(rng, fault):
    weights = random_weights(LARGER, rng)
    x, ids, routing = random_batch(LARGER, 24, rng)
    x = x * 4  # so that the clamp is reached
    oracle = moe_oracle(weights, x, ids, routing, None, LIMIT, "w4a16")
    assert right(MoELayer(LARGER, weights, Float32Backend(LIMIT))(x, ids, routing), oracle)
    assert not right(MoELayer(LARGER, weights, FAULTS[fault]())(x, ids, routing), oracle)


def test_one_zero_row_in_many_is_rejected(rng):
    weights = random_weights(GEOMETRY, rng)
    batch = random_batch(GEOMETRY, 64, rng)
    out = MoELayer(GEOMETRY, weights, Float32Backend(LIMIT))(*batch)
    out[17] = 0
    oracle = moe_oracle(weights, *batch, None, LIMIT, "w4a16")
    assert not right(out, oracle)
    assert metrics.worst_row(out, oracle) == (17, pytest.approx(1.0))


def test_out_and_workspace_are_used(rng):
    weights = random_weights(GEOMETRY, rng)
    seen = []

    class Recording(Float32Backend):
        def forward(self, x, topk_ids, topk_weights, expert_map, out, workspace):
            seen.append(workspace)
            super().forward(x, topk_ids, topk_weights, expert_map, out, workspace)

    layer = MoELayer(GEOMETRY, weights, Recording(LIMIT, scratch=100))
    batch = random_batch(GEOMETRY, 4, rng)
    out = torch.full((4, GEOMETRY.hidden), float("nan"), dtype=torch.bfloat16)
    workspace = torch.empty(400, dtype=torch.uint8)
    assert layer(*batch, out=out, workspace=workspace) is out and out.isfinite().all()
    assert torch.equal(layer(*batch), out)
    assert seen[0] is workspace and seen[1].numel() == 400 and seen[1].dtype == torch.uint8
    with pytest.raises(ValueError, match="399 bytes; float32 needs 400 for 4 tokens"):
        layer(*batch, workspace=workspace[:399])
    with pytest.raises(ValueError, match=r"workspace is torch.float32"):
        layer(*batch, workspace=workspace.float())
    MoELayer(GEOMETRY, weights, Recording(LIMIT))(*batch)
    assert seen[2] is None


def test_no_token(rng):
    layer = MoELayer(GEOMETRY, random_weights(GEOMETRY, rng), Float32Backend(LIMIT))
    assert layer(*random_batch(GEOMETRY, 0, rng)).shape == (0, GEOMETRY.hidden)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), "x is torch.float32; expected torch.bfloat16"),
        ("x", lambda t: t[:, :32], r"x has shape \(4, 32\); expected \(4, 64\)"),
        ("x", lambda t: t[0], r"x has shape \(64,\)"),
        ("x", lambda t: t.t().contiguous().t(), "x has strides"),
        ("x", lambda t: t.to("meta"), "x is on meta"),
        ("topk_ids", lambda t: t.to(torch.int16), "topk_ids is torch.int16; expected torch.int32 or torch.int64"),
        ("topk_ids", lambda t: t[:3], r"topk_ids has shape \(3, 3\); expected \(4, 3\)"),
        ("topk_ids", lambda t: t[:, :2], r"topk_ids has shape \(4, 2\); expected \(4, 3\)"),
        ("topk_weights", lambda t: t.bfloat16(), "topk_weights is torch.bfloat16; expected torch.float32"),
        ("topk_weights", lambda t: t.t().contiguous().t(), "topk_weights has strides"),
        ("expert_map", lambda t: t.long(), "expert_map is torch.int64; expected torch.int32"),
        ("expert_map", lambda t: t[:7], r"expert_map has shape \(7,\); expected \(8,\)"),
        ("out", lambda t: t.float(), "out is torch.float32; expected torch.bfloat16"),
        ("out", lambda t: t[:3], r"out has shape \(3, 64\); expected \(4, 64\)"),
    ],
)
def test_wrong_arguments_are_named(rng, name, change, message):
    layer = MoELayer(GEOMETRY, random_weights(GEOMETRY, rng), Float32Backend(LIMIT))
    arguments = random_batch(GEOMETRY, 4, rng)._asdict()
    arguments |= {"expert_map": random_map(GEOMETRY, rng), "out": torch.empty_like(arguments["x"])}
    layer(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


@pytest.mark.parametrize("field", ["num_local_experts", "hidden", "intermediate"])
def test_weights_of_another_geometry_are_refused(rng, field):
    geometry = dataclasses.replace(GEOMETRY, **{field: 16})
    with pytest.raises(ValueError, match="same configuration"):
        MoELayer(geometry, random_weights(GEOMETRY, rng), Float32Backend(LIMIT))
