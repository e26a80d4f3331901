"""Check and time the Hopper MoE layer: ``python kernel/benchmarks/sm90_moe.py --json results.json``.

One rank of DeepSeek-V4-Pro at 8-way expert parallel: 48 experts, hidden 7168, intermediate 3072, top-6, clamp 10. Every
row is checked against the float64 oracle before it is timed. A time is the median of CUDA-graph replays, the L2
cache overwritten before each. Weight bytes count the experts that are hit, once. Fractions are of the ceilings measured
in the same run: a large copy, and a bfloat16 matrix product of 8192 x 8192 x 8192 in torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvfp4_megamoe.backends.sm90.backend import Sm90Backend, choose_variant
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2, worst_row

GEOMETRY = MoEGeometry(num_experts=48, num_local_experts=48, top_k=6, hidden=7168, intermediate=3072, swiglu_limit=10.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHECKED = 48  # tokens of a large batch that are compared with the oracle
# Relative L2 against exact activations and weights: both projections in bfloat16, the second in e4m3, both in e4m3
LIMITS = {(False, False): 0.006, (False, True): 0.05, (True, True): 0.07}
FLUSH_BYTES = 256 << 20


def random_weights(geometry: MoEGeometry, seed: int) -> ExpertWeights:
    """Weights on the GPU whose activations stay within the clamp mostly."""
    rng = torch.Generator("cuda").manual_seed(seed)
    e, h, i = geometry.num_local_experts, geometry.hidden, geometry.intermediate

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=rng)

    def scales(*shape: int) -> torch.Tensor:
        bits = torch.randint(0x28, 0x50, shape, dtype=torch.uint8, device="cuda", generator=rng)
        return bits.view(torch.float8_e4m3fn)

    def spread(*shape: int) -> torch.Tensor:
        return (0.5 + torch.rand(shape, device="cuda", generator=rng)) * 0.01

    return ExpertWeights(
        w13=codes(e, 2 * i, h // 2), w13_scale=scales(e, 2 * i, h // 16),
        w13_global=spread(e, 2), w13_input_scale=spread(e, 2),
        w2=codes(e, h, i // 2), w2_scale=scales(e, h, i // 16), w2_global=spread(e), w2_input_scale=spread(e),
    )  # fmt: skip


def make_batch(geometry: MoEGeometry, tokens: int, skewed: bool, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """x, topk_ids, topk_weights; skewed: most slots go to an eighth of the experts."""
    x = torch.randn((tokens, geometry.hidden), device="cuda", generator=rng).bfloat16()
    scores = torch.rand((tokens, geometry.num_experts), device="cuda", generator=rng)
    if skewed:
        scores[:, : geometry.num_experts // 8] += 0.7
    values, ids = scores.topk(geometry.top_k)
    return x, ids.int(), values / values.sum(-1, keepdim=True)


def median_us(call: Callable[[], None], repeats: int) -> float:
    """Median of graph replays with a cold L2."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.fill_(1)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def ceilings(repeats: int) -> dict[str, float]:
    """Measured on this card: TB/s of a copy (bytes read and written), TFLOP/s of a bfloat16 product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = median_us(lambda: torch.neg(source, out=target), repeats)
    a, b = (torch.randn((8192, 8192), device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = median_us(lambda: torch.mm(a, b, out=out), repeats)
    return {"copy_tb_s": 2 * source.nbytes / copy / 1e6, "bf16_tflop_s": 2 * 8192**3 / product / 1e6}


def measure(
    own: Sm90Backend, weights: ExpertWeights, tokens: int, skewed: bool, repeats: int, rng: torch.Generator
) -> dict:
    """One row: checked, then timed. Raises SystemExit where the result is wrong."""
    g = own.geometry
    x, ids, topk_weights = make_batch(g, tokens, skewed, rng)
    workspace = torch.full((own.workspace_bytes(tokens),), 0xFF, dtype=torch.uint8, device="cuda")
    out = torch.full_like(x, float("nan"))
    own.forward(x, ids, topk_weights, None, out, workspace)
    rows = torch.randperm(tokens, device="cuda", generator=rng)[:CHECKED]
    expected = moe_oracle(weights, x[rows], ids[rows], topk_weights[rows], None, g.swiglu_limit, "w4a16")
    limit = LIMITS[own.in_e4m3(tokens, g.num_experts)]
    error, worst = relative_l2(out[rows], expected), worst_row(out[rows], expected)[1]
    if not (error <= limit and worst <= 2 * limit) or not bool(out.isfinite().all()):
        raise SystemExit(
            f"wrong result at {tokens} tokens, seed {rng.initial_seed()}: relative L2 {error}, worst row {worst}"
        )
    us = median_us(lambda: own.forward(x, ids, topk_weights, None, out, workspace), repeats)
    hit = int(ids.unique().numel())
    return {
        "tokens": tokens, "skewed": skewed, "us": us,
        "slots_a_tile": [
            choose_variant(min(tokens, 8192), g.top_k, g.num_experts, e4m3)
            for e4m3 in own.in_e4m3(tokens, g.num_experts)
        ],
        "in_e4m3": own.in_e4m3(tokens, g.num_experts),
        "experts_hit": hit, "relative_l2": error, "worst_row": worst,
        "tb_s": hit * 3 * g.hidden * g.intermediate * 0.5625 / us / 1e6,
        "tflop_s": tokens * g.top_k * 6 * g.hidden * g.intermediate / us / 1e6,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda s: tuple(int(t) for t in s.split(",")), default=TOKENS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--precision", choices=Sm90Backend.precisions, default="exact")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = torch.Generator("cuda").manual_seed(args.seed)
    weights = random_weights(GEOMETRY, args.seed)
    packed = ExpertWeights(**{name: getattr(weights, name).clone() for name in weights.__dataclass_fields__})
    own = Sm90Backend(GEOMETRY, args.precision)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    own.prepare(packed)
    prepare = {
        "seconds": time.perf_counter() - begin,
        "extra_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
    }
    top = ceilings(args.repeats)
    header = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "seed": args.seed,
        "precision": args.precision, "ceilings": top, "prepare": prepare,
    }  # fmt: skip
    print(json.dumps(header, indent=1))
    print("| tokens | routing | slots a tile | us | TB/s | of copy | TFLOP/s | of bf16 | rel-L2 | worst row |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for skewed in (False, True):
        for tokens in args.tokens:
            r = measure(own, weights, tokens, skewed, args.repeats, rng)
            rows.append(r)
            routing, slots = "skewed" if skewed else "uniform", "/".join(map(str, r["slots_a_tile"]))
            print(
                f"| {tokens} | {routing} | {slots} | {r['us']:.1f} | {r['tb_s']:.2f} "
                f"| {r['tb_s'] / top['copy_tb_s']:.2f} | {r['tflop_s']:.0f} | {r['tflop_s'] / top['bf16_tflop_s']:.2f} "
                f"| {r['relative_l2']:.5f} | {r['worst_row']:.5f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
