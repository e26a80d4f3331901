"""The six metadata kernels against loops written from what each program of the Triton kernel stores."""

from __future__ import annotations

import inspect
from importlib import util

import pytest
import torch

from . import portable_cases as cases

# isort: split
from cpu_portable_ops import metadata_kernels as kernels

RUBBISH = 1_000_000_007


class Batch:
    """Decode requests of one token before prefills, one of them empty; block tables hold rubbish past each length."""

    def __init__(self, block: int = 8) -> None:
        g = cases.generator()
        self.block = block
        self.query = torch.tensor([1, 1, 1, 5, 0, 23])
        self.context = torch.tensor([30, 0, 17, 40, 9, 3])
        self.num_decodes = 3
        self.seq_lens = (self.query + self.context).int()
        self.start = torch.cat((torch.zeros(1), self.query.cumsum(0))).int()
        self.tokens = int(self.query.sum())
        self.request = torch.repeat_interleave(torch.arange(6), self.query).int()
        self.table = torch.full((6, 9), RUBBISH, dtype=torch.int32)
        self.order = torch.randperm(60, generator=g)
        for r, length in enumerate(self.seq_lens.tolist()):
            used = -(-length // block)
            self.table[r, :used] = self.order[8 * r : 8 * r + used].int()

    def positions(self):
        for t, r in enumerate(self.request.tolist()):
            yield t, r, int(self.seq_lens[r]) - int(self.query[r]) + t - int(self.start[r])


@pytest.mark.parametrize("mapped", [31, 20])
def test_token_request_mapping(mapped: int):
    batch = Batch()
    assert batch.tokens == 31
    output = torch.full((40,), -5, dtype=torch.int32)
    kernels.token_request_mapping(batch.start, output, 6, mapped, 36, num_warps=4)
    expected = [int(batch.request[t]) if t < min(mapped, 31) else 0 for t in range(36)]
    if mapped == 31:
        assert output[:31].tolist() == expected[:31]
    assert output.tolist() == expected + [-5] * 4


@pytest.mark.parametrize("part", ["decode", "prefill"])
@pytest.mark.parametrize("image", [False, True])
def test_window_indices(part: str, image: bool):
    batch = Batch()
    window, width = 8, 8 + (4 if image else 0)
    offset = 0 if part == "decode" else 3
    rows = 40 if part == "decode" else batch.tokens - 3
    valid = torch.ones(batch.tokens, dtype=torch.bool)
    valid[[1, 12]] = False
    left, right = torch.zeros(40, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    left[6], right[6] = 10, 1  # deep in its context, so that the window does widen
    replay = torch.tensor([0, 0, 0, 0, 0, 2], dtype=torch.int32)
    indices = torch.full((rows, 1, width), 99, dtype=torch.int32)
    lens = torch.full((rows,), 99, dtype=torch.int32)
    kernels.swa_indices_and_lens(
        indices, width, lens, window, width, left, right, batch.start, batch.seq_lens, batch.request, valid,
        batch.table, 9, batch.block, replay, offset, image, 1024,
    )  # fmt: skip
    for t, r, position in batch.positions():
        if t < offset:
            continue
        wider, further = (max(int(left[t]) - window + 1, 0), int(right[t])) if image else (0, 0)
        first = max(position - window + 1 - wider, 0, int(replay[r]))
        places = range(first, position + further + 1) if valid[t] else range(0)
        slots = [int(batch.table[r, p // batch.block]) * batch.block + p % batch.block for p in places]
        assert lens[t - offset] == len(places)
        assert indices[t - offset, 0].tolist() == (slots + [-1] * width)[:width]
    assert (indices[batch.tokens - offset :] == 99).all()


def test_prefill_gather_lens():
    batch = Batch()
    replay = torch.tensor([0, 0, 0, 35, 0, 0], dtype=torch.int32)
    out = torch.full((5,), -5, dtype=torch.int32)
    kernels.prefill_gather_lens(out, batch.seq_lens, batch.start, replay, 3, 3, 8, 4)
    expected = [int(batch.query[r]) + min(max(int(batch.context[r] - replay[r]), 0), 7) for r in (3, 4, 5)]
    assert out.tolist() == [*expected, -5, -5]


@pytest.mark.parametrize("world,interleave", [(1, 1), (2, 8)])
def test_compressed_slots(world: int, interleave: int):
    batch, ratio, block = Batch(), 4, 2
    slots = torch.arange(100)
    slots[6] = -1  # ends a window
    out = torch.full((40,), -5, dtype=torch.int64)
    table = torch.where(batch.table == RUBBISH, 0, batch.table)
    table = torch.cat((table, torch.randint(0, 60, (6, 9), dtype=torch.int32)), dim=1)
    kernels.compressed_slot_mapping(
        out, slots, batch.start, batch.seq_lens, table, 18, block, world, interleave, ratio, -1, 1024
    )
    for t, r, position in batch.positions():
        local = position // (interleave * world) * interleave + position % interleave
        row = local // ratio
        done = (position + 1) % ratio == 0 and slots[t] != -1
        assert out[t] == (int(table[r, row // block]) * block + row % block if done else -1)
    assert (out[batch.tokens :] == -5).all()


def test_compressed_slots_of_nothing():
    empty = torch.zeros(2, dtype=torch.int32)
    out = torch.full((3,), -5, dtype=torch.int64)
    table = torch.full((1, 1), RUBBISH, dtype=torch.int32)
    kernels.compressed_slot_mapping(out, out, empty, empty[:1], table, 1, 2, 1, 1, 4, -1, 1024)
    assert (out == -5).all()


def test_uniform_decode():
    seq_lens = torch.tensor([9, 0, 5], dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    lens, expanded, ones = (torch.full(s, -5, dtype=torch.int32) for s in ((8,), (8, 6), (8,)))
    kernels.prepare_uniform_decode(seq_lens, lens, table, 4, expanded, 6, ones, 2, 1024)
    assert lens.tolist() == [8, 9, 0, 0, 4, 5, -5, -5]
    assert expanded[:6, :4].tolist() == table.repeat_interleave(2, 0).tolist()
    assert (expanded[6:] == -5).all()
    assert ones.tolist() == [1] * 6 + [-5, -5]


@pytest.mark.parametrize("part", [slice(0, 28), slice(3, 17)])
@pytest.mark.parametrize("rank,world", [(0, 1), (0, 2), (1, 2)])
def test_prefill_chunk(part: slice, rank: int, world: int):
    query, seq_lens = torch.tensor([5, 0, 23]), torch.tensor([45, 9, 26], dtype=torch.int32)
    start = torch.cat((torch.zeros(1), query.cumsum(0))).int()
    total = torch.cat((torch.zeros(1), (seq_lens // 4).cumsum(0))).int()
    row_start = total + 100
    owner = torch.full((int(total[-1]) + 2,), -5, dtype=torch.int32)
    first, last = (torch.full((part.stop - part.start,), -5, dtype=torch.int32) for _ in range(2))
    kernels.build_prefill_chunk_metadata(
        start, seq_lens, total, row_start, owner, first, last, part.start, part.stop, rank, world, 2, 1024, 4
    )
    for t in range(part.start, part.stop):
        r = next(r for r in range(3) if start[r] <= t < start[r + 1])
        rows = (int(seq_lens[r]) - int(query[r]) + t - int(start[r]) + 1) // 4
        if world > 1:
            rows = sum(1 for i in range(rows) if i // 2 % world == rank)
        assert first[t - part.start] == row_start[r]
        assert last[t - part.start] == row_start[r] + rows
    assert owner.tolist() == [r for r in range(3) for _ in range(int(seq_lens[r]) // 4)] + [-5, -5]


@pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed: nothing to compare names with")
def test_parameters_are_those_of_the_kernels():
    """The dispatcher passes launch arguments by name only where all names agree."""
    from vllm.triton_utils import dispatcher

    for name, function in kernels.REPLACEMENTS.items():
        if function is kernels.token_request_mapping:
            continue  # launched with positional arguments
        host, attribute = dispatcher._resolve_kernel(name)
        kernel = getattr(host, attribute)
        original = getattr(kernel, "arg_names", None) or inspect.signature(getattr(kernel, "func", kernel)).parameters
        assert tuple(inspect.signature(function).parameters) == tuple(original), name
