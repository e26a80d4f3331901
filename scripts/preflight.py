#!/usr/bin/env python3
"""Look at machine, installation and checkpoint before the server starts, and say what would stop it and what to do.

Exit status: 0 it can start (notes included), 1 a check failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import textwrap
import time
from pathlib import Path

import torch
from preflight_checks import gpus, host, model, software
from preflight_checks.finding import FAIL, NOTE, Finding

_WIDTH = 120


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and print them."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    findings = run(options)
    failed = any(finding.level == FAIL for finding in findings)
    seconds = time.monotonic() - began
    if options.json:
        rows = [finding._asdict() for finding in findings]
        print(json.dumps({"ok": not failed, "seconds": round(seconds, 1), "findings": rows}, indent=1))
    else:
        print("\n".join(table(findings)))
        failures, notes = (sum(finding.level == level for finding in findings) for level in (FAIL, NOTE))
        print(f"{failures} failure(s), {notes} note(s), {seconds:.1f} s: {'NOT ready' if failed else 'ready'} to start")
    return int(failed)


def run(options: argparse.Namespace) -> list[Finding]:
    """Everything that was found, in the order of the report."""
    cards, why_none = gpus.query()
    cuda = torch.version.cuda
    here = options.ranks_here or options.ranks
    findings = gpus.check(cards, why_none, here, cuda)
    findings += host.check(here, cuda is not None, options.cache, options.status_dir)
    if not options.no_patches:
        findings.append(software.patches())
    checked, index = model.check(options.model, options.ranks, options.seed, options.sample)
    findings += checked
    if index is not None:
        on_gpu = cuda is not None and bool(cards)
        available = min(card.memory for card in cards[:here]) if on_gpu else host.available_memory()
        share, where = (options.memory_share, f"on {cards[0].name}") if on_gpu else (1.0, "RAM")
        findings.append(
            model.memory(index, options.model, options.ranks, options.max_model_len, available, share, where)
        )
        if on_gpu or cuda is None:
            findings.append(software.backend(options.model, options.ranks, "cuda" if on_gpu else "cpu"))
    return findings


def table(findings: list[Finding]) -> list[str]:
    """The findings as lines for people."""
    column = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        text = finding.found + (f" -> {finding.remedy}" if finding.remedy else "")
        head = f"{finding.level:8}{finding.check:{column}}  "
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm")
    status = os.environ.get("MEGA_MOE_STATUS_DIR", "/dev/shm/mega-moe-status")
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--ranks", type=_positive, default=1, help="expert-parallel ranks, one a GPU (%(default)s)")
    parser.add_argument("--ranks-here", type=_positive, help="of them, ranks on this host (all)")
    parser.add_argument("--max-model-len", type=_positive, default=32768, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--memory-share", type=float, default=0.92, help="--gpu-memory-utilization (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache, help="directory of compiled kernels (%(default)s)")
    parser.add_argument("--status-dir", default=status, help="directory of start-up status files (%(default)s)")
    parser.add_argument("--sample", type=int, default=64, help="block scale tensors to read (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31), help="of that sample")
    parser.add_argument("--no-patches", action="store_true", help="leave out the check of the patched vLLM")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
