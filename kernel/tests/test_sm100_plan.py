"""The plan: its torch reference against its definition, and the kernel on the PTX model against the reference."""

from __future__ import annotations

import pytest
import torch
from nvfp4_megamoe.backends.sm100.plan import CLUSTER, MAX_EXPERTS, Plan, max_tiles, plan_launch, plan_shapes
from nvfp4_megamoe.moe.routing import make_slots
from ptx_model import ModelError, own_kernels
from ptx_model.reference_plan import make_plan
from ptx_model.testing import full, needs_compiler

UNWRITTEN = -77


@pytest.mark.parametrize("one_scale", [True, False])
def test_reference_covers_every_slot_once(rng, one_scale):
    tokens, top_k, experts = 700, 3, 5
    ids = torch.rand(tokens, experts + 2, generator=rng).topk(top_k).indices
    ids[ids >= experts] = -1
    ids[ids == 2] = -1
    plan = make_plan(ids, None, experts, one_scale)
    slots = make_slots(ids, None, experts)
    covered = torch.zeros(ids.numel(), dtype=torch.int64)
    for index in range(int(plan.num_tiles)):
        expert, first, count, image, begin, end, *_ = plan.tiles[index].tolist()
        assert first <= index < first + count
        assert image == first
        low = begin + (index - first) * 128
        covered[low : min(low + 128, end)] += 1
        for slot in range(low, min(low + 128, end)):
            flat = int(plan.order[slot])
            token, source_expert = plan.source[plan.a_row[slot]].tolist()
            assert ids[flat // top_k, flat % top_k] == expert
            assert token == flat // top_k
            assert source_expert == (0 if one_scale else expert)
    images = []
    for index in range(int(plan.num_pairs)):
        expert, first, count, image, begin, end, *_ = plan.pairs[index].tolist()
        assert (begin, end) == tuple(slots.offsets[expert : expert + 2].tolist())
        assert count == -(-(end - begin) // 256)
        halves = [2 * (index - first) + rank for rank in range(2)]
        images += [image + half for half in halves if begin + half * 128 < end]
    assert images == list(range(int(plan.num_tiles)))
    used = int(slots.offsets[-1])
    assert (covered[:used] == 1).all()
    assert not covered[used:].any()
    assert torch.equal(plan.here.bool(), (ids >= 0).flatten())


@pytest.mark.parametrize("slots", [1, 3, 127, 128, 129, 5000])
def test_max_tiles_suffices_for_any_routing(rng, slots):
    for experts in (1, 2, 48):
        for _ in range(20):
            counts = torch.bincount(torch.randint(0, experts, (slots,), generator=rng), minlength=experts)
            assert int((-(-counts // 128)).sum()) <= max_tiles(slots, experts)


def executed(ids, expert_map, experts: int, one_scale: bool, name: str | None = None, **options) -> Plan:
    """The kernel's plan; ``name`` instead of the choice by size."""
    shapes = plan_shapes(*ids.shape, experts, one_scale)
    plan = Plan(**{key: torch.full(shape, UNWRITTEN, dtype=torch.int32) for key, shape in shapes.items()})
    chosen, blocks, args = plan_launch(plan, ids, expert_map, experts, one_scale)
    if name is not None:
        chosen, blocks = name, CLUSTER if name == "plan_cluster" else 1
    own_kernels.execute(chosen, [*args, blocks], **options)
    return plan


def differences(got: Plan, expected: Plan) -> list[str]:
    """Names of the tensors that differ, rows of a table that do not count left out."""
    counted = {"tiles": int(expected.num_tiles), "pairs": int(expected.num_pairs)}
    found = []
    for key, value in got._asdict().items():
        rows = counted.get(key, len(value))
        if not torch.equal(value[:rows], getattr(expected, key)[:rows]) or (value[rows:] != UNWRITTEN).any():
            found.append(key)
    return found


def uniform(rng, tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """int64 [T, K] of 0 to experts - 1 and dropped ids, some of each slot's 2 * experts + 2 candidates."""
    return torch.rand(tokens, 2 * experts + 2, generator=rng).topk(top_k).indices


ROUTINGS = {
    "few": lambda rng: (uniform(rng, 5, 2, 3), 3),
    "one-token": lambda rng: (uniform(rng, 1, 6, 48), 48),
    "one-slot": lambda rng: (torch.zeros(1, 1, dtype=torch.int64), 1),
    "one-expert": lambda rng: (torch.full((700, 1), 2), 4),
    "last-expert": lambda rng: (torch.full((300, 2), 47), 48),
    "no-local-slot": lambda rng: (torch.full((50, 2), -1), 3),
    "empty-experts": lambda rng: (uniform(rng, 300, 3, 20).clamp(min=13), 20),
    "boundaries": lambda rng: (torch.tensor([0] * 128 + [1] * 129 + [3] * 256 + [4] * 257)[:, None], 5),
    "many-experts": lambda rng: (uniform(rng, 100, 8, MAX_EXPERTS), MAX_EXPERTS),
}


IN_A_CLUSTER = ("few", "one-expert", "empty-experts", "many-experts")


@needs_compiler
@pytest.mark.parametrize(
    ("routing", "name"),
    [(routing, "plan_one") for routing in ROUTINGS] + [(routing, "plan_cluster") for routing in IN_A_CLUSTER],
)
def test_kernel_equals_the_reference(rng, routing, name):
    ids, experts = ROUTINGS[routing](rng)
    for one_scale, dtype in ((True, torch.int64), (False, torch.int32)):
        ids = ids.to(dtype)
        got = executed(ids, None, experts, one_scale, name, seed=rng.initial_seed())
        assert differences(got, make_plan(ids, None, experts, one_scale)) == []


@needs_compiler
@pytest.mark.parametrize("one_scale", [True, False])
def test_kernel_follows_the_expert_map(rng, one_scale):
    """Other ranks' experts, padding, ids that no expert has (also in the upper half of 64 bits), and wrong entries."""
    known, experts = 40, 7
    ids = torch.randint(0, known, (90, 4), generator=rng)
    ids[3], ids[7, 1], ids[8, 2], ids[9, 0], ids[10, 3] = -1, known, 2**31 - 1, -(2**31), 2**32 + 3
    expert_map = torch.full((known,), -1, dtype=torch.int32)
    expert_map[torch.randperm(known, generator=rng)[:experts]] = torch.arange(experts, dtype=torch.int32)
    expert_map[5], expert_map[6] = experts, -9
    got = executed(ids, expert_map, experts, one_scale)
    assert differences(got, make_plan(ids, expert_map, experts, one_scale)) == []
    narrow = ids.clamp(max=2**31 - 1).to(torch.int32)
    got = executed(narrow, expert_map, experts, one_scale)
    assert differences(got, make_plan(narrow, expert_map, experts, one_scale)) == []


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(1500, 48), pytest.param(8192, 48, marks=full), pytest.param(8192, 384, marks=full)],
)
def test_kernel_at_the_size_of_a_prefill(rng, tokens, experts):
    ids = uniform(rng, tokens, 6, experts)
    got = executed(ids, None, experts, False, seed=rng.initial_seed())
    assert differences(got, make_plan(ids, None, experts, False)) == []


def test_size_of_the_launch_follows_from_the_shapes(rng):
    plan = Plan(*[torch.zeros(1)] * 8)
    for tokens, expected in ((1, ("plan_one", 1)), (682, ("plan_one", 1)), (683, ("plan_cluster", CLUSTER))):
        name, blocks, _ = plan_launch(plan, uniform(rng, tokens, 6, 48), None, 48, True)
        assert (name, blocks) == expected


@needs_compiler
@pytest.mark.parametrize("old", ["bar.sync", "barrier.cluster.arrive", "shfl.sync.up", "ld.shared::cluster"])
def test_planted_faults_are_caught(rng, monkeypatch, old):
    """Barriers and exchanges that are left out show as a wrong plan, a deadlock or a read of undefined memory."""
    host = own_kernels.host_object("plan_cluster")
    changed = _without(host.ptx, old)
    monkeypatch.setattr(own_kernels, "host_object", lambda name: host.with_ptx(changed))
    ids = uniform(rng, 900, 6, 12)
    expected = make_plan(ids, None, 12, False)
    with pytest.raises((ModelError, AssertionError)):
        for seed in range(4):
            assert differences(executed(ids, None, 12, False, "plan_cluster", seed=seed), expected) == []


def _without(ptx: str, old: str) -> str:
    """Barriers deleted, a shuffle by another distance, a remote read from the own block."""
    lines = []
    for line in ptx.splitlines():
        if old in line:
            if old.startswith("bar"):
                continue
            line = line.replace(", 1, 0, ", ", 2, 0, ") if "shfl" in old else line.replace("::cluster", "::cta")
        lines.append(line)
    changed = "\n".join(lines)
    assert changed != ptx
    return changed
