"""Time several builds of the Hopper kernels beside each other: which change of their sources pays.

``python kernel/benchmarks/sm90_variants.py --library base=base.so:DIGEST --library other=other.so:DIGEST``

``python -m nvfp4_megamoe.backends.sm90.build --output other.so``, run in a checkout with other sources, makes a library
and prints its digest, which is given here because serving takes no library but that of its own sources; the C
interface (``library.py``) must be this checkout's. Each library is first checked in a process of its own, against the
float64 oracle on fresh inputs, outputs and workspaces poisoned: every compiled width on a small layer, then the layer
that is timed. One that is wrong, crashes or does not end is named and left out, and the status is 1. Then all are timed
in one process: median of CUDA-graph replays in turns, the L2 cache overwritten before each. Needs torch and a Hopper
GPU, nothing else of this project's requirements.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_peers import CHECKED, GEOMETRY, about, in_turns, make_batch, random_weights
from nvfp4_megamoe.backends.sm90 import backend, library
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.oracle import moe_oracle
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics.metrics import relative_l2, worst_row

TOKENS = (8, 64, 512, 2048, 8192)
TIMED = ("exact", "auto", "fast")
# Units that fill no group of four and no CTA of the last row tile.
SMALL = MoEGeometry(num_experts=8, num_local_experts=8, top_k=3, hidden=640, intermediate=384, swiglu_limit=10.0)
SMALL_TOKENS = (5, 150)
# Relative L2, also of the worst row, to an oracle that rounds alike; e4m3 sums tip values to a neighbouring code. Of
# few rows the whole is hardly better than the worst, whose limit it then has.
LIMITS, E4M3_LIMITS, FEW_ROWS = (0.006, 0.012), (0.02, 0.08), 8
WIDTHS = {"exact": backend.VARIANTS, "w4a8": backend.E4M3_VARIANTS}


class Library(NamedTuple):
    """A library to measure, and the digest of the sources that it was built from."""

    name: str
    path: Path
    sources: str

    @classmethod
    def parse(cls, text: str) -> Library:
        """``NAME=PATH:DIGEST``. Raises ``argparse.ArgumentTypeError``."""
        name, _, rest = text.partition("=")
        path, _, sources = rest.rpartition(":")
        if not (name and path and sources):
            raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH:DIGEST, as the build prints it")
        return cls(name, Path(path), sources)

    def __str__(self) -> str:
        return f"{self.name}={self.path}:{self.sources}"


class WrongResultError(RuntimeError):
    """A library's output is not the oracle's; the message says where and by how much."""


def prepare(lib: Library, geometry: MoEGeometry, weights: ExpertWeights) -> backend.Sm90Backend:
    """A backend of ``lib`` with its own packed copy of ``weights``."""
    own = backend.Sm90Backend(geometry, "exact", library.open_library(lib.path, lib.sources))
    own.prepare(ExpertWeights(**{f.name: getattr(weights, f.name).clone() for f in fields(weights)}))
    return own


def with_policy(prepared: backend.Sm90Backend, policy: str) -> backend.Sm90Backend:
    """The same packed weights under another policy."""
    own = copy.copy(prepared)
    own.precision, own.thresholds = policy, backend.POLICIES[policy]
    return own


def distinct_policies(tokens: int) -> dict[str, str]:
    """Of each timed policy the one that computes the same for this many tokens and is timed for it."""
    first: dict[tuple[bool, bool], str] = {}
    found = {}
    for policy in TIMED:
        e4m3 = backend.Sm90Backend(GEOMETRY, policy).in_e4m3(tokens, GEOMETRY.num_experts)
        found[policy] = first.setdefault(e4m3, policy)
    return found


def weights_of(geometry: MoEGeometry, seed: int) -> ExpertWeights:
    """Random weights with a global scale of its own for up."""
    weights = random_weights(geometry, seed)
    weights.w13_global[:, 1] *= 1.7
    return weights


def compare(own: backend.Sm90Backend, weights: ExpertWeights, batch: tuple, rows: torch.Tensor, *widths: int) -> None:
    """One call with poisoned output and workspace against the oracle that rounds alike. Raises WrongResultError."""
    out = torch.full_like(batch[0], float("nan"))
    workspace = torch.full((own.workspace_bytes(len(out)),), 0xFF, dtype=torch.uint8, device="cuda")
    own.forward(*batch, None, out, workspace, *widths)
    precision = own.precision_at(len(out), own.geometry.num_experts)
    expected = moe_oracle(weights, *(part[rows] for part in batch), None, own.geometry.swiglu_limit, precision)
    limit, worst_limit = LIMITS if precision == "w4a16" else E4M3_LIMITS
    limit = limit if len(rows) >= FEW_ROWS else worst_limit
    error, worst = relative_l2(out[rows], expected), worst_row(out[rows], expected)[1]
    if not (error <= limit and worst <= worst_limit) or not bool(out.isfinite().all()):
        where = f"{own.precision}, {len(out)} tokens" + (f", widths {widths}" if widths else "")
        raise WrongResultError(
            f"{where}: relative L2 {error:.4g}, worst row {worst:.4g}, allowed {limit} and {worst_limit}"
        )


def check(lib: Library, tokens: Sequence[int], seed: int) -> None:
    """Every width on a small layer, then every batch that is timed. Raises WrongResultError or RuntimeError."""
    rng = torch.Generator("cuda").manual_seed(seed)
    weights = weights_of(SMALL, seed)
    prepared = prepare(lib, SMALL, weights)
    for count in SMALL_TOKENS:
        batch = make_batch(SMALL, count, True, rng)
        for policy, widths in WIDTHS.items():
            for width in widths:
                compare(with_policy(prepared, policy), weights, batch, torch.arange(count), width, width)
    weights = weights_of(GEOMETRY, seed)
    prepared = prepare(lib, GEOMETRY, weights)
    for count in tokens:
        batch = make_batch(GEOMETRY, count, count % 3 == 0, rng)
        rows = torch.randperm(count, device="cuda", generator=rng)[:CHECKED]
        for policy in dict.fromkeys(distinct_policies(count).values()):
            compare(with_policy(prepared, policy), weights, batch, rows)


def check_apart(libraries: Sequence[Library], tokens: Sequence[int], seed: int, seconds: float) -> dict[str, str]:
    """What is wrong with each library that fails its check, each in a process of its own, all at once."""
    command = [sys.executable, __file__, "--check-only", "--seed", str(seed), "--tokens", ",".join(map(str, tokens))]
    running = {
        lib.name: subprocess.Popen([*command, "--library", str(lib)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for lib in libraries
    }
    wrong, end = {}, time.monotonic() + seconds
    for name, process in running.items():
        try:
            said = process.communicate(timeout=max(1.0, end - time.monotonic()))[0].decode(errors="replace").strip()
            if process.returncode != 0:
                wrong[name] = f"status {process.returncode}: {said[-600:]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            wrong[name] = f"not done after {seconds:.0f} s"
    return wrong


def measure(prepared: dict[str, backend.Sm90Backend], tokens: int, repeats: int, rng: torch.Generator) -> list[dict]:
    """One row a library and policy that computes something of its own."""
    batch = make_batch(GEOMETRY, tokens, False, rng)
    out = torch.empty_like(batch[0])
    size = max(own.workspace_bytes(tokens) for own in prepared.values())
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")  # of all: they take turns
    policies = dict.fromkeys(distinct_policies(tokens).values())
    own = {(name, policy): with_policy(base, policy) for policy in policies for name, base in prepared.items()}
    calls = [lambda o=o: o.forward(*batch, None, out, workspace) for o in own.values()]
    times = in_turns(calls, repeats)
    return [
        {"library": name, "policy": policy, "tokens": tokens, "us": us}
        for (name, policy), us in zip(own, times, strict=True)
    ]


def table(rows: Sequence[dict]) -> str:
    """Markdown: microseconds, and in brackets the part of the first library's time."""
    names = list(dict.fromkeys(row["library"] for row in rows))
    lines = [
        "| tokens | policy | " + " | ".join(f"{name} us" for name in names) + " |",
        "|" + " --- |" * (len(names) + 2),
    ]
    by_batch: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        by_batch.setdefault((row["tokens"], row["policy"]), {})[row["library"]] = row["us"]
    for (tokens, policy), us in by_batch.items():
        cells = [f"{us[names[0]]:.1f}", *(f"{us[name]:.1f} ({us[name] / us[names[0]]:.3f})" for name in names[1:])]
        lines.append(f"| {tokens} | {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Library.parse, action="append", required=True, metavar="NAME=PATH:DIGEST")
    parser.add_argument("--tokens", type=lambda s: tuple(int(t) for t in s.split(",")), default=TOKENS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--check-seconds", type=float, default=90, help="after which a check is given up")
    parser.add_argument("--check-only", action="store_true", help="check in this process and time nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len({lib.name for lib in args.library}) < len(args.library):
        parser.error("each library needs a name of its own")
    try:
        for lib in args.library:
            library.open_library(lib.path, lib.sources)
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("sm90_variants times GPU kernels and finds no CUDA device", file=sys.stderr)
        return 2
    with torch.inference_mode():
        if args.check_only:
            try:
                for lib in args.library:
                    check(lib, args.tokens, args.seed)
            except RuntimeError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                return 1
            return 0
        wrong = check_apart(args.library, args.tokens, args.seed, args.check_seconds)
        for name, reason in wrong.items():
            print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
        rng = torch.Generator("cuda").manual_seed(args.seed)
        weights = weights_of(GEOMETRY, args.seed)
        prepared = {lib.name: prepare(lib, GEOMETRY, weights) for lib in args.library if lib.name not in wrong}
        result = {**about(args.seed), "left_out": wrong, "sources": {lib.name: lib.sources for lib in args.library}}
        result["rows"] = []
        for tokens in args.tokens if prepared else ():
            result["rows"] += measure(prepared, tokens, args.repeats, rng)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    if prepared:
        print(table(result["rows"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
