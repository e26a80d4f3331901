"""Plans of reads: every wanted tensor once, in file order, and nothing of other ranks beyond small gaps."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvfp4_megamoe.checkpoint.headers import ShardHeader, TensorInfo
from nvfp4_megamoe.checkpoint.read_plan import ReadPlan, plan_reads

EXPERTS = 16
KINDS = {"weight": 4000, "weight_scale": 500, "weight_scale_2": 4, "input_scale": 4}


def shard(number: int, names_and_sizes: list[tuple[str, int]]) -> ShardHeader:
    tensors, end = {}, 100
    for name, size in names_and_sizes:
        tensors[name] = TensorInfo("U8", (size,), end, end + size)
        end += size
    return ShardHeader(Path(f"model-{number}.safetensors"), tensors, 100, end)


def checkpoint(seed: int, layers: int = 2, shards: int = 3) -> list[ShardHeader]:
    """Experts and other tensors of random sizes, in a random order over several files."""
    rng = random.Random(seed)
    tensors = [(f"layers.{layer}.attn.{i}", rng.randrange(0, 3000)) for layer in range(layers) for i in range(5)]
    for layer, expert, kind in itertools.product(range(layers), range(EXPERTS), KINDS):
        tensors.append((f"layers.{layer}.ffn.experts.{expert}.w1.{kind}", KINDS[kind]))
    if rng.random() < 0.7:
        rng.shuffle(tensors)
    cuts = sorted(rng.randrange(len(tensors)) for _ in range(shards - 1))
    pieces = [tensors[a:b] for a, b in itertools.pairwise([0, *cuts, len(tensors)])]
    return [shard(number, piece) for number, piece in enumerate(pieces)]


def expert(name: str) -> int | None:
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None


def names(plan: ReadPlan) -> list[str]:
    return [name for batch in plan.batches for name, _ in batch.tensors]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    ranks=st.sampled_from([1, 2, 3, 8]),
    round_robin=st.booleans(),
    batch_bytes=st.sampled_from([1, 5000, 20_000, 1 << 20]),
    max_gap=st.sampled_from([0, 10, 600, 5000]),
)
def test_ranks_together_read_every_expert_once_and_each_reads_its_own_in_file_order(
    seed: int, ranks: int, round_robin: bool, batch_bytes: int, max_gap: int
) -> None:
    shards = checkpoint(seed)
    everything = {name: info for header in shards for name, info in header.tensors.items()}
    experts_read: list[str] = []
    for rank in range(ranks):
        own = {e for e in range(EXPERTS) if (e % ranks if round_robin else e * ranks // EXPERTS) == rank}

        def wanted(name: str, own: set[int] = own) -> bool:
            return expert(name) is None or expert(name) in own

        plan = plan_reads(shards, wanted, batch_bytes, max_gap)
        read = names(plan)
        assert sorted(read) == sorted(filter(wanted, everything))
        experts_read += [name for name in read if expert(name) is not None]
        assert plan.tensors == len(read) and plan.tensors + plan.skipped_tensors == len(everything)
        assert plan.tensor_bytes + plan.skipped_bytes == sum(info.end - info.start for info in everything.values())
        assert [header.path for header in plan.shards] == list(dict.fromkeys(batch.path for batch in plan.batches))
        for path, group in itertools.groupby(plan.batches, lambda batch: batch.path):
            batches = list(group)
            assert path not in {batch.path for batch in plan.batches} - {path}
            for batch in batches:
                infos = [info for _, info in batch.tensors]
                assert (batch.start, batch.end) == (infos[0].start, infos[-1].end)
                assert len(infos) == 1 or batch.end - batch.start <= batch_bytes
                assert all(0 <= b.start - a.end <= max_gap for a, b in itertools.pairwise(infos))
            assert all(a.end <= b.start for a, b in itertools.pairwise(batches)), "reads go through a file forwards"
    assert sorted(experts_read) == sorted(name for name in everything if expert(name) is not None)


def test_a_file_without_a_wanted_tensor_is_not_opened() -> None:
    shards = [shard(0, [("a", 10)]), shard(1, [("b", 10)])]
    plan = plan_reads(shards, lambda name: name == "b")
    assert [header.path.name for header in plan.shards] == ["model-1.safetensors"]
    assert (plan.tensors, plan.skipped_tensors, plan.skipped_bytes) == (1, 1, 10)


@pytest.mark.parametrize("gap, batches", [(64, 1), (65, 2)])
def test_only_small_gaps_are_read_through(gap: int, batches: int) -> None:
    header = shard(0, [("a", 10), ("of another rank", gap), ("b", 10)])
    assert len(plan_reads([header], lambda name: len(name) == 1, max_gap_bytes=64).batches) == batches
