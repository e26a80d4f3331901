"""Attention, caches and indexer of the portable CPU operators, against float64 loops over poisoned buffers."""

from __future__ import annotations

import pytest
import torch

from . import portable_cases as cases
from . import portable_reference as ref
from .portable_reference import BF16, close

# isort: split
from cpu_portable_ops import attention, chunking, compressor, fp8, hyper_connection, indexer, mla_cache


def same_codes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for the rare value that rounding before quantisation moves across a tie."""
    step = (actual.int() - expected.int()).abs()
    assert int(step.max()) <= 1, f"codes differ by {int(step.max())}"
    assert int((step > 0).sum()) <= 2 + 1e-3 * step.numel(), f"{int((step > 0).sum())} of {step.numel()} codes differ"


class Unchanged:
    """A byte tensor in which only marked positions may change."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.before = tensor, tensor.clone()
        self.free = torch.zeros(tensor.shape, dtype=torch.bool)

    def check(self) -> None:
        kept = ~self.free
        assert torch.equal(self.tensor[kept], self.before[kept]), "bytes outside the written rows changed"


def test_e4m3_decoding_covers_every_code():
    codes = torch.arange(256, dtype=torch.uint8)
    finite = (codes & 0x7F) != 0x7F
    expected = torch.tensor([ref.e4m3_value(code) for code in range(256)])
    assert torch.equal(fp8.decode_e4m3(codes)[finite], expected[finite])
    scale = torch.tensor([0.25, 8.0, 1.0, 2.0])
    assert torch.equal(fp8.decode_e4m3(codes, scale)[finite], (expected * scale.repeat_interleave(64))[finite])


def test_e4m3_encoding_rounds_to_nearest_even():
    g = cases.generator()
    values = torch.tensor([ref.e4m3_value(code) for code in range(127)])
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, ties, torch.tensor([1e9, 0.0, 2**-6, 2**-6 - 2**-11]), torch.randn(300, generator=g) * 50))
    x = torch.cat((x, -x))
    assert fp8.encode_e4m3(x).view(torch.uint8).tolist() == [ref.e4m3_code(v) for v in x.tolist()]
    flushed = fp8.encode_e4m3(x, flush_subnormals=True).view(torch.uint8)
    small = x.abs() < 2**-6
    assert torch.equal(flushed[~small], fp8.encode_e4m3(x).view(torch.uint8)[~small])
    assert torch.equal(flushed[small], torch.signbit(x[small]).to(torch.uint8) * 128)


def test_scale_exponents_at_and_around_powers_of_two():
    amax = 448 * torch.exp2(torch.arange(-12, 6).float())
    amax = torch.cat((amax, amax * (1 + 2**-8), amax * (1 - 2**-8), torch.tensor([0.0])))
    exponent = fp8.power_of_two_exponent(amax, 1e-4)
    assert exponent.tolist() == [ref.power_of_two(v, 1e-4) for v in amax.tolist()]
    floor = float(torch.tensor(2.0**-10).nextafter(torch.tensor(1.0)))  # the least number above a power of two
    assert fp8.power_of_two_exponent(torch.zeros(1), floor).tolist() == [-9]
    assert torch.equal(fp8.exponent_to_scale(exponent), torch.exp2(exponent.float()))
    assert torch.equal(fp8.decode_e8m0((exponent + 127).to(torch.uint8)), torch.exp2(exponent.float()))


def test_query_norm_and_window_insert():
    case = cases.qnorm_insert(cases.generator())
    cache, block = case["swa_kv_cache_2d"], case["cache_block_size"]
    watch = Unchanged(cache)
    out = attention.fused_qnorm_rope_kv_insert_cpu(**case)
    for t in range(out.shape[0]):
        angles = case["cos_sin_cache"][case["positions"][t]]
        for h in range(case["q"].shape[1]):
            expected = ref.rotated(ref.rms_normed(case["q"][t, h].double().tolist(), case["eps"]), angles)
            close(out[t, h], expected, BF16)
    assert torch.equal(out[:, case["q"].shape[1] :], torch.zeros_like(out[:, case["q"].shape[1] :]))
    for t, slot in enumerate(case["slot_mapping"].tolist()):
        if slot >= 0:
            row = ref.rotated(case["kv"][t].double().tolist(), case["cos_sin_cache"][case["positions"][t]])
            _check_mla_row(watch, slot, block, ref.mla_row(row[:448], row[448:], flush=True))
    watch.check()


def _check_mla_row(watch: Unchanged, slot: int, block: int, expected: tuple) -> None:
    page, offset = divmod(slot, block)
    data = slice(576 * offset, 576 * offset + 576)
    scale = slice(576 * block + 8 * offset, 576 * block + 8 * offset + 8)
    codes, rope, scales = expected
    same_codes(watch.tensor[page, data][:448], torch.tensor(codes, dtype=torch.uint8))
    close(watch.tensor[page, data][448:].clone().view(torch.bfloat16), rope, 2 * BF16)
    assert watch.tensor[page, scale].tolist() == scales
    watch.free[page, data] = watch.free[page, scale] = True


@pytest.mark.parametrize("aligned", [True, False])
def test_cache_reads_back_what_it_wrote(aligned: bool):
    g = cases.generator()
    cache = cases.pages(3, 4 * 584, padding=64 if aligned else 61)
    slots = torch.tensor([11, 0, 5])
    nope, rope = torch.randn(3, 448, generator=g).bfloat16(), torch.randn(3, 64, generator=g).bfloat16()
    mla_cache.write(cache, slots, 4, nope, rope, flush_subnormals=False)
    row = mla_cache.read(cache, slots, 4)
    close(row, [ref.mla_read(cache, slot, 4) for slot in slots.tolist()], 0, 0)
    close(row[:, :448], nope, 0.07, 4.5e-3)
    with pytest.raises(ValueError, match="fp8_ds_mla"):
        mla_cache.read(cache[:, :-1], slots, 4)


@pytest.mark.parametrize(
    "tokens,compressed,spread", [(1, 5, False), (6, 5, False), (6, 0, False), (9, 5, True), (9, 0, True)]
)
def test_sparse_attention(tokens: int, compressed: int, spread: bool):
    case = cases.flash_mla(cases.generator(), tokens, compressed=compressed, spread=spread)
    if tokens > 3:
        case["window_slots"][2] = -1
        case["compressed_slots"][2] = -1
        case["window_slots"][3, 1] = case["window_slots"][3, 0]  # a slot named twice counts twice
        case["attn_sink"][1] = -torch.inf
    attention.flash_mla_with_kvcache_cpu(**case)
    for t in range(tokens):
        rows = []
        for name in ("window", "compressed"):
            cache, block = case[f"{name}_cache_2d"], case[f"{name}_block_size"]
            picked = [s for s in case[f"{name}_slots"][t].tolist() if 0 <= s < cache.shape[0] * block]
            rows += [ref.mla_read(cache, slot, block) for slot in picked]
        for h in range(case["q"].shape[1]):
            expected = ref.attend(case["q"][t, h].double().tolist(), rows, float(case["attn_sink"][h]), case["scale"])
            close(case["out"][t, h], expected, BF16, 1e-4)


@pytest.mark.parametrize("tokens", [1, 200])
def test_sparse_attention_reads_selected_rows_only(tokens: int):
    """Every row that no token selects is NaN; 200 tokens cross a step's border."""
    g = cases.generator()
    case = cases.flash_mla(g, tokens)
    for name in ("window", "compressed"):
        cache, block = case[f"{name}_cache_2d"], case[f"{name}_block_size"]
        case[f"{name}_slots"] = case[f"{name}_slots"].where(case[f"{name}_slots"] % 3 > 0, -1)
        for slot in range(0, cache.shape[0] * block, 3):
            cache[slot // block, 576 * block + 8 * (slot % block) :][:8] = cases.POISON
    attention.flash_mla_with_kvcache_cpu(**case)
    assert torch.isfinite(case["out"]).all()


def test_dense_and_gathered_attention_agree(monkeypatch):
    case = cases.flash_mla(cases.generator(), 150)
    attention.flash_mla_with_kvcache_cpu(**case)
    dense = case["out"].clone()
    monkeypatch.setattr(attention, "_DENSE_RATIO", 0)
    attention.flash_mla_with_kvcache_cpu(**case)
    close(case["out"], dense, 2 * BF16, 1e-4)


def test_distinct_slots_near_and_far():
    g = cases.generator()
    near = torch.randint(-1, 40, (6, 9), generator=g)
    for slots in (near, near * 1_000_003):
        rows, place = attention._distinct(slots)
        assert rows.tolist() == sorted(set(slots.flatten().tolist()))
        assert torch.equal(rows[place], slots)


def test_inverse_rotation():
    case = cases.inverse_rope(cases.generator())
    out = attention.inverse_gptj_rope_o_proj_cpu(**case)
    for t in range(5):
        for h in range(3):
            angles = case["cos_sin_cache"][case["positions"][t]]
            close(out[t, h], ref.rotated(case["o"][t, h].double().tolist(), angles, inverse=True))


@pytest.mark.parametrize("width,ratio", [(1024, 4), (512, 128)])
def test_partial_states(width: int, ratio: int):
    case = cases.save_states(cases.generator(), width, ratio)
    state, block = case["state_cache"], case["state_cache"].shape[1]
    compressor.save_partial_states_cpu(**case)
    used = torch.zeros(state.shape[:2], dtype=torch.bool)
    for t, slot in enumerate(case["slot_mapping"].tolist()):
        if slot >= 0:
            row = state[slot // block, slot % block]
            assert torch.equal(row[:width], case["kv"][t])
            assert torch.equal(row[width:], case["score"][t] + case["ape"][int(case["positions"][t]) % ratio])
            used[slot // block, slot % block] = True
    assert state[~used].isnan().all()


@pytest.mark.parametrize("ratio,tokens", [(4, 14), (128, 130), (4, 1), (4, 2)])
def test_compressed_rows(ratio: int, tokens: int):
    case = cases.compress(cases.generator(), 512, ratio, tokens)
    watch = Unchanged(case["kv_cache_2d"])
    compressor.compress_norm_rope_store_cpu(**case)
    for t, row in _compressed(case, 512):
        expected = ref.mla_row(row[:448], row[448:], flush=False)
        _check_mla_row(watch, int(case["kv_slot_mapping"][t]), case["kv_cache_block_size"], expected)
    watch.check()


def _compressed(case: dict, dim: int):
    """Token and normalised, rotated row of every window that ends and has a slot."""
    ratio = case["compress_ratio"]
    for t, position in enumerate(case["positions"].tolist()):
        if (position + 1) % ratio == 0 and case["kv_slot_mapping"][t] >= 0:
            row = ref.pooled(case["state_cache"], case["gather_slots"][t].tolist(), ratio, dim)
            row = ref.rms_normed(row, case["rms_norm_eps"])
            row = [a * b for a, b in zip(row, case["rms_norm_weight"].tolist(), strict=True)]
            yield t, ref.rotated(row, case["cos_sin_cache"][position // ratio * ratio])


def test_compressed_indexer_rows():
    case = cases.compress(cases.generator(), 128, 4, 30)
    cache, block = case["kv_cache_2d"], case["kv_cache_block_size"]
    watch = Unchanged(cache)
    compressor.compress_norm_rope_store_indexer_cpu(**case)
    for t, row in _compressed(case, 128):
        row = [ref.bf16(v) for v in row]
        exponent = ref.power_of_two(max(max(abs(v) for v in row), 1e-4), 0)
        page, offset = divmod(int(case["kv_slot_mapping"][t]), block)
        codes = slice(128 * offset, 128 * offset + 128)
        scale = slice(128 * block + 4 * offset, 128 * block + 4 * offset + 4)
        same_codes(cache[page, codes], torch.tensor([ref.e4m3_code(v / 2.0**exponent) for v in row]))
        assert cache[page, scale].clone().view(torch.float32).item() == 2.0**exponent
        watch.free[page, codes] = watch.free[page, scale] = True
    watch.check()


def test_indexer_query():
    case = cases.indexer_q(cases.generator())
    indexer.fused_indexer_q_rope_quant_cpu(**case)
    for t in range(5):
        angles = case["index_q_cos_sin_cache"][case["positions"][t]]
        for h in range(6):
            row = ref.rotated(case["index_q"][t, h].double().tolist(), angles)
            row = row[:64] + [ref.bf16(v) for v in row[64:]]
            exponent = ref.power_of_two(max(max(abs(v) for v in row), 1e-4), 0)
            codes = torch.tensor([ref.e4m3_code(v / 2.0**exponent) for v in row])
            same_codes(case["index_q_fp8"][t, h].view(torch.uint8), codes)
            weight = float(case["index_weights"][t, h]) * 2.0**exponent * 128**-0.5 * 6**-0.5
            close(case["index_weights_out"][t, h], weight)


@pytest.mark.parametrize("shared", [True, False])
def test_indexer_logits(shared: bool):
    case = cases.mqa_logits(cases.generator(), shared)
    logits = indexer.fp8_paged_mqa_logits_cpu(**case)
    assert logits.shape == (len(case["seq_lens"]), case["max_seq_len"])
    block, cache = case["block_size"], case["kvcache_fp8"]
    for b, length in enumerate(case["seq_lens"].tolist()):
        assert (logits[b, length:] == -torch.inf).all()
        for n in range(length):
            page = int(case["page_table"][b, n // block])
            key = [ref.e4m3_value(c) for c in cache[page, 128 * (n % block) :][:128].tolist()]
            scale = cache[page, 128 * block + 4 * (n % block) :][:4].clone().view(torch.float32).item()
            total = 0.0
            for h in range(case["q_fp8"].shape[1]):
                query = [ref.e4m3_value(c) for c in case["q_fp8"][b, h].view(torch.uint8).tolist()]
                total += float(case["weight"][b, h]) * max(sum(x * y for x, y in zip(query, key, strict=True)), 0)
            close(logits[b, n], total * scale, 1e-5, 1e-4)


@pytest.mark.parametrize("ties", [False, True])
def test_best_512(ties: bool):
    case = cases.topk(cases.generator(), ties)
    case["scores"][5, 300] = torch.nan  # ranks below every number
    indexer.topk_transform_512_cpu(**case)
    for b, length in enumerate(case["seq_lens"].tolist()):
        row = [-float("inf") if v != v else v for v in case["scores"][b, :length].tolist()]
        best = sorted(sorted(range(length), key=lambda i: (-row[i], i))[:512])
        raw = case["out_raw_indices"][b].tolist()
        assert raw == best + [-1] * (512 - len(best))
        slots = [int(case["page_tables"][b, i // 64]) * 64 + i % 64 for i in best]
        assert case["out_page_indices"][b].tolist() == slots + [-1] * (512 - len(best))


def test_best_512_of_few_columns():
    case = cases.topk(cases.generator(), False)
    case["scores"] = case["scores"][:, :40].contiguous()
    case["out_raw_indices"] = None
    indexer.topk_transform_512_cpu(**case)
    assert (case["out_page_indices"][:, 40:] == -1).all()
    assert (case["out_page_indices"][2:, :40] >= 0).all()


def test_long_inputs_are_cut_into_parts(monkeypatch):
    """With scratch for one item at a time nothing changes, save that a product of another shape may add its terms in
    another order: a bfloat16 output may then round to its neighbour, one unit in the last place away."""
    g = cases.generator()
    calls = [
        (hyper_connection.hc_pre_fused_cpu, cases.hyper_pre(g)),
        (hyper_connection.hc_post_fused_cpu, cases.hyper_post(g)),
        (hyper_connection.hc_head_fused_cpu, cases.hyper_head(g)),
        (attention.inverse_gptj_rope_o_proj_cpu, cases.inverse_rope(g)),
        (attention.fused_qnorm_rope_kv_insert_cpu, cases.qnorm_insert(g)),
        (indexer.fp8_paged_mqa_logits_cpu, cases.mqa_logits(g, True)),
        (indexer.fp8_paged_mqa_logits_cpu, cases.mqa_logits(g, False)),
        (indexer.topk_transform_512_cpu, cases.topk(g, True)),
        (indexer.fused_indexer_q_rope_quant_cpu, cases.indexer_q(g)),
        (compressor.compress_norm_rope_store_cpu, cases.compress(g, 512, 4)),
        (attention.flash_mla_with_kvcache_cpu, cases.flash_mla(g, 9, spread=True)),
    ]

    def run(function, case) -> list[torch.Tensor]:
        case = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in case.items()}
        result = function(**case)
        results = list(result) if isinstance(result, tuple) else [result]
        return [v for v in [*results, *case.values()] if isinstance(v, torch.Tensor)]

    for function, case in calls:
        with monkeypatch.context() as patched:
            whole = run(function, case)
            patched.setattr(chunking, "SCRATCH_BYTES", 1)
            for one, other in zip(whole, run(function, case), strict=True):
                torch.testing.assert_close(one.float(), other.float(), equal_nan=True, rtol=2 * BF16, atol=1e-5)
