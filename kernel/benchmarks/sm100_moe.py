"""Check, then time, the MoE layer on a B200: ``python kernel/benchmarks/sm100_moe.py --json sm100.json``.

First the layer test: every kernel of the SM100 backend, with its real K, against the float64 oracle, call by call and
in CUDA graphs; where a number is wrong nothing is timed and the status is 1. Then times, in the same run on the same
inputs, beside FlashInfer's kernels through the installed vLLM's own MoE layer (``--moe-backend flashinfer_cutedsl`` and
``flashinfer_trtllm``): one rank of DeepSeek-V4-Pro at 8-way expert parallel, 48 experts, hidden 7168, intermediate
3072, top-6, clamp 10. A time is the median of CUDA-graph replays, the contenders taking turns, the L2 cache overwritten
before each. The experts share their input scales, and gate and up their global scale, because FlashInfer's kernels take
one of each. Attach the JSON report to an issue.

The kernels must have been built: ``python -m nvfp4_megamoe.backends.sm100.build``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe_peers
from moe_peers import GEOMETRY, TOKENS, about, ceilings, in_turns, make_batch
from nvfp4_megamoe.backends.sm100 import objects
from nvfp4_megamoe.backends.sm100.backend import SUMS, Sm100Backend
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2
from peers import UnavailableError, VllmContender
from peers_report import cells
from sm100_checks import CHECKS, LIMIT, clone, run_check

PEERS = ("flashinfer_cutedsl", "flashinfer_trtllm")
CHECKED = 48
# W4A4 noise is .16; another rounding of scales or intermediates is allowed, another result is not.
PEER_LIMIT = 0.08


class OwnContender:
    """This project's layer with one way of summing a token's slots."""

    def __init__(self, geometry: MoEGeometry, weights: ExpertWeights, sums: str) -> None:
        self.name, self.limit = f"own {sums}", LIMIT
        self.layer = MoELayer(geometry, clone(weights), Sm100Backend(geometry, sums=sums))

    def reserve(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Allocate what calls with this batch need."""
        x = batch[0]
        self.out = torch.empty_like(x)
        self.workspace = torch.empty(self.layer.backend.workspace_bytes(len(x)), dtype=torch.uint8, device=x.device)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return self.layer(x, topk_ids, topk_weights, out=self.out, workspace=self.workspace)


class FlashInferContender(VllmContender):
    """FlashInfer's kernels in vLLM's layer; where they also route, they get logits that give the batch's routing."""

    limit = PEER_LIMIT

    def reserve(self, batch: tuple[torch.Tensor, ...]) -> None:
        x, ids, weight = batch
        super().reserve(len(x))
        self._logits = router_logits(ids, weight, GEOMETRY.num_experts)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if not self._method.is_monolithic:
            return super().__call__(x, topk_ids, topk_weights)
        from vllm.forward_context import set_forward_context

        with self._context(), set_forward_context(None, self._config, num_tokens=len(x)):
            return self._method.apply_monolithic(self._layer, x, self._logits)


def router_logits(ids: torch.Tensor, weight: torch.Tensor, experts: int) -> torch.Tensor:
    """float32 [T, experts] of which softmax, top-k and renormalization give ``ids`` and ``weight``, which sum to 1."""
    logits = torch.full((len(ids), experts), -60.0, device=ids.device)
    return logits.scatter_(1, ids.long(), weight.log())


def refusal() -> str | None:
    """Why this machine cannot run the benchmark, or None."""
    if not torch.cuda.is_available():
        return "sm100_moe needs a Blackwell GPU (compute capability 10.0) and finds no CUDA device"
    device = torch.device("cuda:0")
    reason = Sm100Backend.unsupported_reason(GEOMETRY, device)
    return f"{torch.cuda.get_device_name(device)}: {reason}" if reason else None


def kernels() -> dict:
    """What our kernels were built with, and the peers' package."""
    built = json.loads((objects.directory() / objects.MANIFEST).read_text())["versions"]
    try:
        flashinfer = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        flashinfer = "not installed"
    return {"kernels": built, "flashinfer": flashinfer}


def shared_scales(weights: ExpertWeights) -> ExpertWeights:
    """The same weights with one input scale for all experts in each GEMM, for values up to 5 and to the clamps' 100."""
    weights.w13_input_scale.fill_(5 / (6 * 448))
    weights.w2_input_scale.fill_(100 / (6 * 448))
    return weights


def layer_test(seed: int, sums: Sequence[str] = SUMS) -> list[dict]:
    """Every check with every way of summing; prints a line for each."""
    results = []
    for mode in sums:
        for check in CHECKS:
            build = lambda g, w, mode=mode: MoELayer(g, w, Sm100Backend(g, sums=mode))  # noqa: E731
            results.append({"sums": mode, **run_check(check, build, "cuda:0", seed)})
            line = {k: v for k, v in results[-1].items() if k not in ("passed", "check", "sums")}
            print(f"{'passed' if results[-1]['passed'] else 'WRONG'}: {mode}, {check.name}: {line}", flush=True)
    return results


def everyone(args: argparse.Namespace) -> tuple[list, dict[str, str], ExpertWeights, torch.Generator]:
    """Our layers and the peers that can run, why the others cannot, the weights of all, and what draws the batches."""
    rng = torch.Generator("cuda").manual_seed(args.seed)
    weights = shared_scales(moe_peers.random_weights(GEOMETRY, args.seed))
    found: list = [OwnContender(GEOMETRY, weights, sums) for sums in SUMS]
    missing = {}
    for name in args.peers:
        try:
            found.append(FlashInferContender(GEOMETRY, weights, name, max(args.tokens)))
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing, weights, rng


def checked(contender, batch: tuple, expected: torch.Tensor, rows: torch.Tensor) -> tuple[float | None, str | None]:
    """Relative L2 of one call, and why the contender is not timed. Our own errors are not caught."""
    try:
        contender.reserve(batch)
        error = relative_l2(contender(*batch)[rows], expected)
    except Exception as problem:
        if isinstance(contender, OwnContender):
            raise
        return None, f"{type(problem).__name__}: {problem}"
    if error <= contender.limit:
        return error, None
    reason = f"wrong result: relative L2 {error:.4g}, allowed {contender.limit}"
    if isinstance(contender, OwnContender):
        raise UnsupportedError(f"{contender.name} at {len(batch[0])} tokens: {reason}; nothing is timed")
    return error, reason


def measure(contenders: Sequence, weights: ExpertWeights, tokens: int, skewed: bool, repeats: int, rng) -> list[dict]:
    """A row for each contender; one that fails here has the reason instead of a time."""
    batch = make_batch(GEOMETRY, tokens, skewed, rng)
    rows = torch.randperm(tokens, device=rng.device, generator=rng)[:CHECKED]
    expected = moe_oracle(weights, *(part[rows] for part in batch), None, GEOMETRY.swiglu_limit, "w4a4")
    found = {c: checked(c, batch, expected, rows) for c in contenders}
    able = [c for c, (_, reason) in found.items() if reason is None]
    times = dict(zip(able, in_turns([lambda c=c: c(*batch) for c in able], repeats), strict=True))
    hit, g = int(batch[1].unique().numel()), GEOMETRY
    result = []
    for contender, (error, reason) in found.items():
        row = {"contender": contender.name, "tokens": tokens, "skewed": skewed, "relative_l2": error, "experts": hit}
        if reason is None:
            us = times[contender]
            row |= {"us": us, "tb_s": hit * 3 * g.hidden * g.intermediate * 0.5625 / us / 1e6}
            row |= {"tflop_s": tokens * g.top_k * 6 * g.hidden * g.intermediate / us / 1e6}
        else:
            row |= {"left_out": reason}
        result.append(row)
    return result


def table(result: dict) -> str:
    """Markdown: microseconds of everyone, and what our better layer reaches."""
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    header = ["tokens", "routing", *(f"{name} us" for name in names)]
    header += ["own TB/s", "of copy", "own TFLOP/s", "better peer / own"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (skewed, tokens), row in cells(result["rows"]).items():
        times = {name: row[name]["us"] for name in names if "us" in row.get(name, {})}
        best = min((name for name in times if name.startswith("own")), key=times.__getitem__)
        others = [us for name, us in times.items() if not name.startswith("own")]
        line = [str(tokens), "skewed" if skewed else "uniform"]
        line += [f"{times[name]:.1f}" if name in times else "left out" for name in names]
        line += [f"{row[best]['tb_s']:.2f}", f"{row[best]['tb_s'] / result['ceilings']['copy_tb_s']:.2f}"]
        line += [f"{row[best]['tflop_s']:.0f}", f"{min(others) / times[best]:.2f}x" if others else ""]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Time over tokens with uniform routing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["contender"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["contender"] == name and not r["skewed"] and "us" in r]
        style = "o-" if name.startswith("own") else "o--"
        axis.plot([r["tokens"] for r in rows], [r["us"] for r in rows], style, label=name, markersize=3)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
    axis.set_title(f"{result['device']}: one rank of DeepSeek-V4-Pro's MoE layer, {result['date'][:10]}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(result: dict, path: Path | None) -> None:
    """The report so far."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokens = lambda s: tuple(int(t) for t in s.split(","))  # noqa: E731
    parser.add_argument("--tokens", type=tokens, default=TOKENS, help="batch sizes, default 1 to 16384")
    parser.add_argument("--peers", type=lambda s: tuple(filter(None, s.split(","))), default=PEERS)
    parser.add_argument("--test-only", action="store_true", help="the layer test without times")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="report, rewritten after each batch size")
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    args = parser.parse_args(arguments)
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    if min(args.tokens) < 1:
        parser.error("--tokens: a batch has at least one token")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 2
    torch.cuda.set_device(0)
    result = {**about(args.seed), **kernels(), "layer_test": layer_test(args.seed)}
    result["passed"] = all(check["passed"] for check in result["layer_test"])
    write(result, args.json)
    if not result["passed"]:
        print("the layer test failed: nothing is timed", file=sys.stderr)
        return 1
    if args.test_only:
        return 0
    contenders, result["left_out"], weights, rng = everyone(args)
    for name, why in result["left_out"].items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    result |= {"ceilings": ceilings(args.repeats), "rows": []}
    with torch.inference_mode():
        for skewed in (False, True):
            for tokens in args.tokens:
                try:
                    new = measure(contenders, weights, tokens, skewed, args.repeats, rng)
                except UnsupportedError as error:
                    print(error, file=sys.stderr)
                    return 1
                result["rows"] += new
                print(tokens, "skewed" if skewed else "uniform", {r["contender"]: r.get("us") for r in new}, flush=True)
                write(result, args.json)
    print("\n" + table(result))
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
