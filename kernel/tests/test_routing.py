from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_megamoe.moe.routing import make_slots
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Raises on every operator whose result the host has to wait for."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == f or name.startswith(f + "_") for f in self.FORBIDDEN), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def reference(topk_ids: list[list[int]], expert_map: list[int] | None, num_local: int) -> list[list[int]]:
    """Flat indices of each local expert, and of no local expert in the last list."""
    groups: list[list[int]] = [[] for _ in range(num_local + 1)]
    flat = [e for row in topk_ids for e in row]
    for index, expert in enumerate(flat):
        local = expert
        if expert_map is not None:
            local = expert_map[expert] if 0 <= expert < len(expert_map) else -1
        groups[local if 0 <= local < num_local else num_local].append(index)
    return groups


def check(ids: torch.Tensor, expert_map: torch.Tensor | None, num_local: int) -> None:
    with NoHostSync():
        order, offsets = make_slots(ids, expert_map, num_local)
    assert order.dtype == offsets.dtype == torch.int32
    assert order.shape == (ids.numel(),) and offsets.shape == (num_local + 1,)
    groups = reference(ids.tolist(), None if expert_map is None else expert_map.tolist(), num_local)
    bounds = [*offsets.tolist(), ids.numel()]
    assert bounds[0] == 0
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == groups


@st.composite
def cases(draw):
    experts = draw(st.integers(0, 12))
    tokens, top_k = draw(st.integers(0, 20)), draw(st.integers(1, 6))
    ids = draw(st.lists(st.integers(-2, experts + 2), min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).reshape(tokens, top_k)
    if draw(st.booleans()):
        return ids, None, experts
    here = draw(st.lists(st.sampled_from(range(experts)), unique=True) if experts else st.just([]))
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    for local, expert in enumerate(here):
        expert_map[expert] = local
    return ids, expert_map, len(here)


@given(cases())
def test_slots_are_those_of_the_reference(case):
    check(*case)


@pytest.mark.parametrize("rank", range(8))
@pytest.mark.parametrize("placement", ["linear", "round robin", "random"])
def test_true_geometry_on_every_rank(rng, rank, placement):
    experts = torch.arange(384)
    owner = {"linear": experts // 48, "round robin": experts % 8, "random": torch.randperm(384, generator=rng) % 8}
    mine = (owner[placement] == rank).nonzero().flatten()
    expert_map = torch.full((384,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(48, dtype=torch.int32)
    ids = torch.rand((257, 384), generator=rng).topk(6).indices
    check(ids.to(torch.int32), expert_map, 48)


def test_no_token_and_no_local_expert():
    nothing = torch.full((16,), -1, dtype=torch.int32)
    ids = torch.arange(12).reshape(4, 3)
    check(ids, nothing, 0)
    check(ids, nothing, 2)
    check(ids[:0], nothing, 2)
    check(ids[:0], None, 0)


def test_one_expert_gets_everything():
    check(torch.full((64, 6), 3, dtype=torch.int32), None, 8)


def test_ids_beyond_int32_are_dropped():
    check(torch.tensor([[2**40, 1], [-(2**40), 0]]), None, 2)
    check(torch.tensor([[2**40, 1], [-(2**40), 0]]), torch.tensor([1, 0], dtype=torch.int32), 2)


@pytest.mark.parametrize("with_map", [True, False])
def test_runs_without_data(with_map):
    """On the meta device every read of a value raises, so nothing here can wait for one."""
    ids = torch.empty((5, 6), dtype=torch.int32, device="meta")
    expert_map = torch.empty(384, dtype=torch.int32, device="meta") if with_map else None
    order, offsets = make_slots(ids, expert_map, 48)
    assert order.shape == (30,) and offsets.shape == (49,)


def test_the_guard_sees_a_host_sync():
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.arange(3).sum().item()
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.arange(3).bincount()
