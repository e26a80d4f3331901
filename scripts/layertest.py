#!/usr/bin/env python3
"""Compare the MoE layers of an NVFP4 checkpoint, on the backend that would serve them, with the float64 oracle.

    layertest.py CHECKPOINT                               every layer, on this machine's device and backend
    layertest.py CHECKPOINT --ranks 8 --rank 3            the experts of one of eight expert-parallel ranks
    layertest.py CHECKPOINT --backend sm100 --json r.json a named backend, with a report to attach to an issue
    layertest.py CHECKPOINT --experts all                 every expert in full instead of two a layer and rank

Needs torch, safetensors, tqdm and the package in kernel/; no vLLM. Exit status: 0 all layers passed, 1 one failed, 2
the test could not be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from layer_testing import checkpoint, output
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.selftest import LayerReport, LayerTest, Options
from tqdm import tqdm


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        source = checkpoint.Source(options.checkpoint, options.ranks, options.rank)
        layers = source.chosen(options.layers)
        device = _device(options.device)
        reports = []
        with torch.inference_mode(), tqdm(layers, unit="layer", file=sys.stderr, disable=options.quiet) as bar:
            for layer in bar:
                reports.append(_test(source, layer, device, options))
                bar.set_postfix(failed=sum(not report.passed for report in reports))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"layertest: {error}", file=sys.stderr)
        return 2
    passed = all(report.passed for report in reports)
    print(output.table(reports))
    if options.json:
        content = output.record(reports, source, device, sys.argv[1:] if arguments is None else arguments)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if passed else 1


def _test(source: checkpoint.Source, layer: int, device: torch.device, options: argparse.Namespace) -> LayerReport:
    started = time.perf_counter()
    weights = source.read(layer, device)
    read_s = time.perf_counter() - started
    geometry = source.geometry
    backend = select.select(geometry, device, options.precision, options.backend)
    expert_map = source.expert_map(device)
    wanted = Options(experts=options.experts, seed=options.seed, all_sizes=True)
    test = LayerTest(f"layers.{layer}.ffn.experts", geometry, weights, backend, expert_map, wanted)
    report = test.run(MoELayer(geometry, weights, backend))
    if not options.quiet:
        times = f"read in {read_s:.1f} s, tested in {report.seconds:.2f} s"
        tqdm.write(f"{report.message()}; {times}", file=sys.stderr)
    return report


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and not device.index < torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)"
        )
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory of an NVFP4 checkpoint")
    parser.add_argument("--layers", type=_layers, help="such as 0,3,10-12; default: all with NVFP4 experts")
    parser.add_argument("--backend", help="cpu, sm90 or sm100; default: the one that would serve")
    parser.add_argument("--precision", help="such as w4a16 or w4a4; default: the backend's own")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the first GPU if there is one")
    parser.add_argument("--experts", type=_experts, default=2, help="compared in full, or all (%(default)s)")
    parser.add_argument("--ranks", type=_positive, default=1, help="expert-parallel ranks (%(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="whose experts to test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and of the choice of experts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--quiet", action="store_true", help="nothing but the table and errors")
    return parser


def _layers(text: str) -> list[int]:
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise argparse.ArgumentTypeError(f"{part!r}: expected a layer, or first-last")
        layers |= set(range(int(first), int(last if dash else first) + 1))
    return sorted(layers)


def _experts(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
