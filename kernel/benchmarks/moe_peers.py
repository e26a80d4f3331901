"""Time this project's MoE layer on Hopper beside vLLM's: ``python kernel/benchmarks/moe_peers.py --json out.json``.

One rank of DeepSeek-V4-Pro at 8-way expert parallel: 48 experts, hidden 7168, intermediate 3072, top-6, clamp 10. All
contenders get the same weights, activations and routing in the same run. Every row is checked against the float64
oracle before it is timed; a wrong result ends the run with status 1 and is named. A time is the median of CUDA-graph
replays, the contenders taking turns, the L2 cache overwritten before each. Weight bytes count the experts that are
hit, once. Fractions are of ceilings measured in the same run: a copy, and 8192 x 8192 x 8192 products in bfloat16 and
FP8. The weights' gate and up have equal global scales: vLLM applies the gate's to both.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2, worst_row
from peers import PEERS, OwnContender, UnavailableError, VllmContender
from peers_report import plot, table

GEOMETRY = MoEGeometry(num_experts=48, num_local_experts=48, top_k=6, hidden=7168, intermediate=3072, swiglu_limit=10.0)
TOKENS = tuple(1 << n for n in range(15))
CONTENDERS = ("w4a16", "auto", "w4a8", *PEERS)
CHECKED = 48  # tokens of a large batch that are compared with the oracle
# Relative L2 to the oracle with exact weights and bfloat16 activations; the worst row may have twice that. FP8
# activations cost .046 by themselves, weights rounded with them .065; the peers round scales or intermediates once
# more than we do.
LIMITS = {"w4a16": 0.006, "exact": 0.006, "auto": 0.05, "fast": 0.075, "w4a8": 0.075}
PEER_LIMIT = 0.02
FLUSH_BYTES = 256 << 20


def random_weights(geometry: MoEGeometry, seed: int, device: str = "cuda") -> ExpertWeights:
    """Weights whose activations mostly stay within the clamp, gate and up with equal global scales."""
    rng = torch.Generator(device).manual_seed(seed)
    e, h, i = geometry.num_local_experts, geometry.hidden, geometry.intermediate

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=rng)

    def scales(*shape: int) -> torch.Tensor:
        bits = torch.randint(0x28, 0x50, shape, dtype=torch.uint8, device=device, generator=rng)
        return bits.view(torch.float8_e4m3fn)

    def spread(*shape: int) -> torch.Tensor:
        return (0.5 + torch.rand(shape, device=device, generator=rng)) * 0.01

    w13_global = spread(e, 1).expand(e, 2).contiguous()
    return ExpertWeights(
        w13=codes(e, 2 * i, h // 2), w13_scale=scales(e, 2 * i, h // 16), w13_global=w13_global,
        w13_input_scale=spread(e, 2), w2=codes(e, h, i // 2), w2_scale=scales(e, h, i // 16),
        w2_global=spread(e), w2_input_scale=spread(e),
    )  # fmt: skip


def make_batch(geometry: MoEGeometry, tokens: int, skewed: bool, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """x, topk_ids, topk_weights; skewed: most slots go to an eighth of the experts."""
    x = torch.randn((tokens, geometry.hidden), device=rng.device, generator=rng).bfloat16()
    scores = torch.rand((tokens, geometry.num_experts), device=rng.device, generator=rng)
    if skewed:
        scores[:, : geometry.num_experts // 8] += 0.7
    values, ids = scores.topk(geometry.top_k)
    return x, ids.int(), values / values.sum(-1, keepdim=True)


def make_contenders(names: Sequence[str], geometry: MoEGeometry, weights: ExpertWeights, max_tokens: int) -> tuple:
    """The contenders that can run, and the reasons of those that cannot, by name."""
    found, missing = [], {}
    for name in names:
        try:
            if name in PEERS:
                found.append(VllmContender(geometry, weights, name, max_tokens))
            else:
                found.append(OwnContender(geometry, weights, name))
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing


def check(contender, weights: ExpertWeights, batch: tuple, expected: torch.Tensor, rows: torch.Tensor) -> dict:
    """Relative L2 and worst row of one call. Raises SystemExit where the result is wrong."""
    out = contender(*batch)
    limit = PEER_LIMIT if contender.name in PEERS else LIMITS[contender.name.removeprefix("own ")]
    error, worst = relative_l2(out[rows], expected), worst_row(out[rows], expected)[1]
    if not (error <= limit and worst <= 2 * limit) or not bool(out.isfinite().all()):
        raise SystemExit(
            f"wrong result of {contender.name} at {len(batch[0])} tokens: relative L2 {error:.4g}, worst row "
            f"{worst:.4g}, allowed {limit} and {2 * limit}; nothing is timed"
        )
    return {"relative_l2": error, "worst_row": worst}


def in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median microseconds of each call's graph, replayed in turns with a cold L2."""
    graphs = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for graph, taken in zip(graphs, times, strict=True):
            flush.fill_(1)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) * 1e3)
    return [statistics.median(taken) for taken in times]


def ceilings(repeats: int) -> dict[str, float]:
    """Measured on this card: TB/s of a copy (bytes read and written), TFLOP/s of products in bfloat16 and e4m3."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn((8192, 8192), device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device="cuda")
    copy, bf16, fp8 = in_turns(
        [
            lambda: torch.neg(source, out=target),
            lambda: torch.mm(a, b, out=out),
            lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16),
        ],
        repeats,
    )
    flops = 2 * 8192**3 / 1e6
    return {"copy_tb_s": 2 * source.nbytes / copy / 1e6, "bf16_tflop_s": flops / bf16, "fp8_tflop_s": flops / fp8}


def measure(contenders: Sequence, weights: ExpertWeights, tokens: int, skewed: bool, repeats: int, rng) -> list[dict]:
    """One row a contender: all checked, then all timed."""
    g = GEOMETRY
    batch = make_batch(g, tokens, skewed, rng)
    rows = torch.randperm(tokens, device=rng.device, generator=rng)[:CHECKED]
    expected = moe_oracle(weights, *(part[rows] for part in batch), None, g.swiglu_limit, "w4a16")
    errors = []
    for contender in contenders:
        contender.reserve(tokens)
        errors.append(check(contender, weights, batch, expected, rows))
    # vLLM's contenders share a workspace, which the calls above have brought to its final size before any capture.
    times = in_turns([lambda c=c: c(*batch) for c in contenders], repeats)
    hit = int(batch[1].unique().numel())
    return [
        {
            "contender": contender.name, "tokens": tokens, "skewed": skewed, "us": us, "experts_hit": hit, **error,
            "tb_s": hit * 3 * g.hidden * g.intermediate * 0.5625 / us / 1e6,
            "tflop_s": tokens * g.top_k * 6 * g.hidden * g.intermediate / us / 1e6,
        }
        for contender, us, error in zip(contenders, times, errors, strict=True)
    ]  # fmt: skip


def about(seed: int) -> dict:
    """Date, device, versions and command of this run."""
    versions = {}
    for package in ("torch", "vllm", "humming-kernels", "nvfp4-megamoe"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions,
        "command": " ".join(["python", *sys.argv]), "seed": seed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda s: tuple(int(t) for t in s.split(",")), default=TOKENS)
    parser.add_argument("--contenders", type=lambda s: tuple(s.split(",")), default=CONTENDERS)
    parser.add_argument("--require", action="store_true", help="fail where a contender cannot run here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="results, rewritten after each batch size")
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    args = parser.parse_args()
    if unknown := set(args.contenders) - {*LIMITS, *PEERS}:
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; choose from {', '.join((*LIMITS, *PEERS))}")
    if not torch.cuda.is_available():
        print("moe_peers times GPU kernels and finds no CUDA device; cpu_moe.py measures CPUs", file=sys.stderr)
        return 2
    torch.cuda.set_device(0)
    rng = torch.Generator("cuda").manual_seed(args.seed)
    weights = random_weights(GEOMETRY, args.seed)
    contenders, missing = make_contenders(args.contenders, GEOMETRY, weights, max(args.tokens))
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not contenders or (missing and args.require):
        return 2
    result = {**about(args.seed), "left_out": missing, "ceilings": ceilings(args.repeats)}
    result["preparation"] = {c.name: vars(c.preparation) for c in contenders}
    result["rows"] = []
    print(json.dumps(result, indent=1), flush=True)
    with torch.inference_mode():
        for skewed in (False, True):
            for tokens in args.tokens:
                result["rows"] += measure(contenders, weights, tokens, skewed, args.repeats, rng)
                new = result["rows"][-len(contenders) :]
                print(
                    tokens,
                    "skewed" if skewed else "uniform",
                    {r["contender"]: round(r["us"], 1) for r in new},
                    flush=True,
                )
                if args.json:
                    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
