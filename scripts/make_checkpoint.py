#!/usr/bin/env python3
"""Write a DeepSeek-V4 checkpoint with random weights, from tiny to a true V4-Pro layer.

    make_checkpoint.py tiny-nvfp4                                 41 MB, serves on a CPU
    make_checkpoint.py tiny-reference --dequantize                the same model as plain weights, for transformers
    make_checkpoint.py pro-layer --preset pro                     one layer of V4-Pro, 15 GB

Same arguments, same bytes. All formats quantize the same weights.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from checkpoint_maker.formats import FORMATS
from checkpoint_maker.geometry import PRESETS, GeometryError, check_for_cpu, make_geometry
from checkpoint_maker.tensors import Planted
from checkpoint_maker.writer import DEFAULT_SHARD_SIZE, OutputError, Recipe, write

_SIZES = {
    "layers": "decoder layers",
    "experts_count": "routed experts of a layer",
    "top_k": "routed experts of a token",
    "hash_layers": "first layers that route by token id",
    "hidden": "hidden size",
    "intermediate": "intermediate size of an expert",
    "heads": "attention heads",
    "q_lora_rank": "rank of the query projection",
    "o_lora_rank": "rank of an output projection group",
    "o_groups": "output projection groups",
    "index_heads": "heads of the sparse attention's indexer",
    "index_topk": "entries that the indexer keeps",
    "vocab": "rows of the embedding; the tokenizer uses the first 512",
    "max_positions": "longest sequence",
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for refused arguments."""
    args = _parser().parse_args(argv)
    sizes = {name: getattr(args, name) for name in (*_SIZES, "swiglu_limit", "routed_scaling_factor")}
    try:
        geometry = make_geometry(args.preset, **sizes)
        if args.for_cpu if args.for_cpu is not None else args.preset == "tiny":
            check_for_cpu(geometry)
        planted = Planted(args.gate_up_ratio, args.vary_gate_up_ratio, args.input_scale_spread)
        recipe = Recipe(geometry, args.format, args.dequantize, args.seed, planted)
        start = time.perf_counter()
        size = write(recipe, args.out, args.shard_size, args.force)
    except (GeometryError, OutputError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{args.out}: {args.format}, {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write; refused when not empty")
    parser.add_argument("--force", action="store_true", help="replace the directory")
    parser.add_argument("--format", choices=FORMATS, default="nvfp4", help="default nvfp4")
    parser.add_argument(
        "--dequantize", action="store_true", help="store the values that the format holds, as a model without scales"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=_size, default=DEFAULT_SHARD_SIZE, help="bytes, or 500M, 4G; default 1G")
    geometry = parser.add_argument_group("geometry")
    geometry.add_argument("--preset", choices=PRESETS, default="tiny", help="default tiny")
    for name, meaning in _SIZES.items():
        geometry.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning)
    geometry.add_argument("--swiglu-limit", type=float, help="clamp of gate and up")
    geometry.add_argument("--routed-scaling-factor", type=float, help="sum of a token's routing weights")
    geometry.add_argument(
        "--for-cpu",
        action=argparse.BooleanOptionalAction,
        help="refuse what vLLM's CPU build cannot serve; default for tiny",
    )
    planted = parser.add_argument_group("planted properties (NVFP4)")
    planted.add_argument(
        "--gate-up-ratio", type=_positive, default=1.0, metavar="R", help="up's weight_scale_2 is R times gate's"
    )
    planted.add_argument("--vary-gate-up-ratio", action="store_true", help="each expert's ratio lies in [1/R, R]")
    planted.add_argument(
        "--input-scale-spread", type=_at_least_one, default=1.0, metavar="S", help="input scales differ by up to S"
    )
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with K, M or G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _positive(text: str) -> float:
    value = float(text)
    if not 1 / 64 <= value <= 64:  # the block scales would lose too many bits
        raise argparse.ArgumentTypeError(f"{text} must lie between 1/64 and 64")
    return value


def _at_least_one(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} must lie between 1 and 1000000")
    return value


if __name__ == "__main__":
    sys.exit(main())
