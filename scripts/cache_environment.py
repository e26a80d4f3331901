#!/usr/bin/env python3
"""Keep everything that is compiled at run time under one directory, and show what a start added to it.

``eval "$(scripts/cache_environment.py exports)"`` sets the cache directory of every compiler that vLLM may start while
it serves DeepSeek-V4. ``snapshot`` before a start and ``changes`` after it say what was compiled: ``changes`` prints
each compiler's files and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT_VARIABLE = "MEGA_MOE_CACHE_DIR"
DEFAULT_ROOT = "~/.cache/mega-moe"


@dataclass(frozen=True)
class Compiler:
    """Something that compiles while the server runs, the variable with its cache directory, and our name for that."""

    name: str
    variable: str
    folder: str


# FlashInfer appends .cache/flashinfer to its directory. vLLM's holds the graphs of torch.compile and what FlashInfer's
# autotuner found. CuTe DSL's holds what @jit functions compile at a call, and in compiled/ what cute.compile does.
COMPILERS = (
    Compiler("own kernels", "NVFP4_MEGAMOE_CACHE", "nvfp4_megamoe"),
    Compiler("vLLM", "VLLM_CACHE_ROOT", "vllm"),
    Compiler("TileLang", "TILELANG_CACHE_DIR", "tilelang"),
    Compiler("DeepGEMM", "DG_JIT_CACHE_DIR", "deep_gemm"),
    Compiler("FlashInfer", "FLASHINFER_WORKSPACE_BASE", "flashinfer"),
    Compiler("Triton", "TRITON_CACHE_DIR", "triton"),
    Compiler("Inductor", "TORCHINDUCTOR_CACHE_DIR", "inductor"),
    Compiler("torch extensions", "TORCH_EXTENSIONS_DIR", "torch_extensions"),
    Compiler("Humming", "HUMMING_CACHE_DIR", "humming"),
    Compiler("CuTe DSL", "CUTE_DSL_CACHE_DIR", "cute_dsl"),
    Compiler("QuACK", "QUACK_CACHE_DIR", "quack"),
    Compiler("TVM FFI", "TVM_FFI_CACHE_DIR", "tvm_ffi"),
    Compiler("CUDA driver", "CUDA_CACHE_PATH", "cuda"),
)

# Written without a compilation: locks, logs, files under way, what vLLM notes about models and links, and the empty
# file beside a kernel that DeepGEMM touches whenever it loads it.
_NOT_COMPILED = (
    *("*.lock", "*.log", ".ninja_*", "*.tmp", "*/tmp/*", "*/locks/*"),
    *("*/modelinfos/*", "*p2p_access_cache*", ".committed"),
)

Snapshot = dict[str, tuple[int, int]]


def environment(root: Path) -> dict[str, str]:
    """Return the variables that put every cache into a directory of its own below ``root``.

    Nothing is created: each compiler makes its directory when it first writes. ``root`` becomes absolute.
    """
    root = Path(root).expanduser().absolute()
    return {ROOT_VARIABLE: str(root)} | {c.variable: str(root / c.folder) for c in COMPILERS}


def default_root() -> Path:
    """The directory in MEGA_MOE_CACHE_DIR, or ~/.cache/mega-moe."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().absolute()


def snapshot(root: Path) -> Snapshot:
    """Return size (bytes) and time of change (ns) of each compiled file, by path relative to ``root``."""
    root = Path(root)
    found: Snapshot = {}
    for compiler in COMPILERS:
        for folder, _, names in os.walk(root / compiler.folder):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                if any(fnmatch(relative, pattern) or fnmatch(name, pattern) for pattern in _NOT_COMPILED):
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError:  # a compiler has renamed or removed it meanwhile
                    continue
                found[relative] = (status.st_size, status.st_mtime_ns)
    return found


def changed(before: Snapshot, after: Snapshot) -> Snapshot:
    """The part of ``after`` that is new or was rewritten since ``before``."""
    return {path: state for path, state in after.items() if before.get(path) != state}


def by_compiler(files: Snapshot) -> dict[str, dict[str, float]]:
    """Return files, bytes and the newest change (Unix time, s) of each compiler that has any, in our order."""
    names = {compiler.folder: compiler.name for compiler in COMPILERS}
    totals: dict[str, dict[str, float]] = {}
    for path, (size, modified) in files.items():
        total = totals.setdefault(names[path.split("/")[0]], {"files": 0, "bytes": 0, "newest": 0.0})
        total["files"] += 1
        total["bytes"] += size
        total["newest"] = max(total["newest"], modified / 1e9)
    order = [compiler.name for compiler in COMPILERS]
    return dict(sorted(totals.items(), key=lambda item: order.index(item[0])))


def compiled_between(before: Snapshot, after: Snapshot) -> dict[str, dict[str, float]]:
    """``by_compiler`` of what is new or was rewritten in ``after``."""
    return by_compiler(changed(before, after))


def table(totals: dict[str, dict[str, float]]) -> str:
    """``by_compiler``'s result for people."""
    rows = [f"{'compiler':<18} {'files':>8} {'MB':>10}  newest"]
    for name, total in totals.items():
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(total["newest"]))
        rows.append(f"{name:<18} {total['files']:>8} {total['bytes'] / 1e6:>10.1f}  {newest}")
    return "\n".join(rows)


def _read(path: Path) -> Snapshot:
    try:
        content = json.loads(path.read_text())
        return {name: (int(size), int(modified)) for name, (size, modified) in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a snapshot ({error}): write one with the command snapshot") from error


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("exports", "count", "snapshot", "changes"))
    parser.add_argument("file", type=Path, nargs="?", help="the snapshot to write, or to compare with")
    parser.add_argument("--root", type=Path, help=f"default: {ROOT_VARIABLE}, else {DEFAULT_ROOT}")
    parser.add_argument("--json", action="store_true", help="count and changes: JSON instead of a table")
    arguments = parser.parse_args()
    root = (arguments.root or default_root()).expanduser().absolute()
    if (arguments.command in ("snapshot", "changes")) != (arguments.file is not None):
        parser.error("snapshot and changes need a file, exports and count take none")

    if arguments.command == "exports":
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(root).items()))
        return 0
    files = snapshot(root)
    if arguments.command == "snapshot":
        arguments.file.write_text(json.dumps(files))
        return 0
    if arguments.command == "changes":
        try:
            files = changed(_read(arguments.file), files)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    totals = by_compiler(files)
    if arguments.json:
        print(json.dumps({"root": str(root), "compilers": totals}, indent=1))
    elif totals:
        print(table(totals))
    else:
        print(f"nothing was compiled below {root}" if arguments.command == "changes" else f"{root} holds no files")
    return 1 if arguments.command == "changes" and totals else 0


if __name__ == "__main__":
    sys.exit(main())
