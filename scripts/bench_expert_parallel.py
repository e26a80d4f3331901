#!/usr/bin/env python3
"""Measure DeepSeek-V4-Pro at full size on one host, with this project's kernels and with stock vLLM, in a given time.

    bench_expert_parallel.py --minutes 60 --stock-site /tmp/stock --json expert-parallel.json

1. V4-Pro's layers, few of them, from a checkpoint: tensor and expert parallel over all GPUs against one GPU, and
   against stock vLLM. Same log-probabilities and greedy tokens up to rounding, or the status is 1.
2. All 61 layers with random weights made in place: the 384 experts of V4-Pro on 8 GPUs, 192 on 4, the same 48 and
   101 GiB a GPU; on 2 GPUs 64, the most that fit of the numbers that vLLM's router kernel knows. Time per output token
   at 1, 8, 32 and 128 sequences, prefill of 8192 tokens, memory left for the KV cache and the phases of start-up, for
   both vLLMs in turn. Through so many layers of random weights rounding grows until single tokens cannot be compared:
   what the two say must still be clearly alike.

Every stage has a limit and the report is written after each, so a run that is cut off leaves what it has; ``--resume``
goes on with the stages that are missing. NVLink multicast is switched off. DeepGEMM's kernels are compiled when first
used, not all before ready (``VLLM_DEEP_GEMM_WARMUP=skip``): every measurement is preceded by one that is thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cache_environment as caches
from serving_bench import client, compare, report, whole_model
from serving_bench.expert_parallel_report import FEW, ONE, OWN, STOCK, WHOLE, judge, render
from serving_bench.server import Server, end_servers_with_this_process, server, start_phases

EXPERTS = {8: 384, 4: 192, 2: 64, 1: 32}  # by ranks; vLLM's router kernel has powers of two, 192, 320, 384, 448 and 576
SEQUENCES = (1, 8, 32, 128)
PROMPT_TOKENS, OUTPUT_TOKENS, PREFILL_TOKENS = 128, 48, 8192
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",  # its workspace may be multicast memory
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}
FLAGS = (
    "--tokenizer-mode deepseek_v4 --max-model-len 9216 --max-num-seqs 128 --max-num-batched-tokens 8192 "
    "--kv-cache-dtype fp8 --block-size 256 --no-enable-prefix-caching --gpu-memory-utilization 0.93 "
    "--cudagraph-capture-sizes 1 2 4 8 16 32 64 128 "
    """--compilation-config '{"cudagraph_mode":"FULL_AND_PIECEWISE","pass_config":{"fuse_allreduce_rms":false}}'"""
)
STAGES = ("few-one", "few-all", "few-stock", "whole-own", "whole-stock")
SHM_GIB_A_GPU = 1.0
LEAST_SECONDS = 60  # a stage is not begun with less time left


class Bench:
    """The stages, with what they share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.deadline = time.monotonic() + 60 * arguments.minutes

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def server(
        self,
        side: str,
        label: str,
        model: Path,
        gpus: list[int],
        extra: Sequence[str] = (),
        path: Sequence[Path] = (),
        precision: str = "auto",
    ) -> Server:
        """A server of ``side`` on ``gpus``, not started."""
        a = self.a
        flags = [*shlex.split(a.flags), *extra]
        if len(gpus) > 1:
            flags += ["--tensor-parallel-size", str(len(gpus)), "--enable-expert-parallel"]
        if side == OWN:
            flags += ["--moe-backend", "nvfp4_megamoe"]
        environment = {**ENVIRONMENT, **caches.environment(a.caches / side), "MEGA_MOE_PRECISION": precision}
        folders = [a.own_site if side == OWN else a.stock_site, *path]
        visible = gpus if a.devices else None
        return server(f"{side}-{label}", model, flags, a.logs, path=folders, gpus=visible, environment=environment)

    def few_layers(self, side: str, gpus: list[int]) -> dict:
        """Log-probabilities and greedy tokens of the checkpoint with few layers."""
        self._answers_file(side, f"few-{len(gpus)}").unlink(missing_ok=True)
        with self.server(side, f"few-{len(gpus)}", self.a.few_model, gpus, precision="w4a16") as running:
            running.start(max(1.0, self.left()))
            return {
                "itself": self._answer_twice(running, side, f"few-{len(gpus)}"),
                "phases": start_phases(Path(running.environment["MEGA_MOE_STATUS_DIR"])),
                **running.facts(),
            }

    def compare(self, mine: tuple[str, str], reference: tuple[str, str]) -> dict:
        """What one side answered in one stage against another."""
        return compare.difference(*(_answers(self._answers_file(*which)) for which in (mine, reference)))

    def _answers_file(self, side: str, label: str) -> Path:
        return self.a.logs / f"{side}-{label}-answers.json"

    def whole(self, side: str, gpus: list[int]) -> dict:
        """Times of the whole model."""
        a = self.a
        self._answers_file(side, "whole").unlink(missing_ok=True)
        geometry = whole_model.pro(EXPERTS[len(gpus)], a.layers)
        model = whole_model.write(a.logs / f"whole-{len(gpus)}", geometry)
        found = self.report.partial(f"{side}, whole model")
        found |= {
            "layers": geometry.layers, "experts": geometry.experts_count, "ranks": len(gpus),
            "expert_gib_a_rank": whole_model.expert_bytes(geometry, len(gpus)) / 2**30, "decode": [],
        }  # fmt: skip
        extra = ["--load-format", "dummy"]
        running = self.server(side, f"whole-{len(gpus)}", model, gpus, extra, [whole_model.PLUGIN])
        before = caches.snapshot(a.caches / side)
        with running:
            running.start(max(1.0, self.left()))
            found |= running.facts()
            found["phases"] = start_phases(Path(running.environment["MEGA_MOE_STATUS_DIR"]))
            found["memory_mib"] = _device_memory(gpus)
            self.report.write()
            for sequences in SEQUENCES:
                for seed in (sequences, 1000 + sequences):  # the first compiles what batches need, the second counts
                    timed = client.decode(running.base_url, sequences, PROMPT_TOKENS, OUTPUT_TOKENS, seed=seed)
                found["decode"].append(timed)
                print(f"[bench] {side}: {timed}", flush=True)
                self.report.write()
            client.prefill(running.base_url, PREFILL_TOKENS, repeats=1, seed=1)
            found["prefill"] = client.prefill(running.base_url, PREFILL_TOKENS, repeats=3, seed=2)
            self.report.write()
            found["answers_differ_from_themselves"] = self._answer_twice(running, side, "whole")
            found["files"] = caches.compiled_between(before, caches.snapshot(a.caches / side))
            found |= running.facts()
        return found

    def _answer_twice(self, running: Server, side: str, label: str) -> dict:
        """Keep the greedy tokens and log-probabilities of ``running``; how a second time differs from them."""
        found = compare.answers(running.base_url)
        self._answers_file(side, label).write_text(json.dumps(found, default=vars))
        return compare.difference(compare.answers(running.base_url), found)

    def run(self, wanted: list[str], gpus: list[int], made: report.Report) -> None:
        """Every wanted stage that there is time for; of comparisons those of which both sides have answered."""
        self.report = made
        all_few = f"few-{len(gpus)}"
        # Its group, whose answers it compares if it is a comparison, and what it runs.
        stages = {
            "one GPU, few layers": ("few-one", (), partial(self.few_layers, OWN, gpus[:1])),
            "all GPUs, few layers": ("few-all", (), partial(self.few_layers, OWN, gpus)),
            ONE: ("few-all", ((OWN, all_few), (OWN, "few-1")), self.compare),
            f"{STOCK}, all GPUs, few layers": ("few-stock", (), partial(self.few_layers, STOCK, gpus)),
            FEW: ("few-stock", ((OWN, all_few), (STOCK, all_few)), self.compare),
            f"{OWN}, whole model": ("whole-own", (), partial(self.whole, OWN, gpus)),
            f"{STOCK}, whole model": ("whole-stock", (), partial(self.whole, STOCK, gpus)),
            WHOLE: ("whole-stock", ((OWN, "whole"), (STOCK, "whole")), self.compare),
        }
        for name, (group, sides, stage) in stages.items():
            if group not in wanted or "result" in made.data["stages"].get(name, {}):
                continue
            missing = [file for file in (self._answers_file(*side) for side in sides) if not file.exists()]
            if missing:
                made.skip(name, f"{missing[0]} does not exist: the stage that writes it has not run")
            elif not sides and self.left() < LEAST_SECONDS:
                made.skip(name, f"{self.left():.0f} s of the budget were left, {LEAST_SECONDS} are needed")
            else:
                made.stage(name, partial(stage, *sides))


def _answers(path: Path) -> dict[str, list]:
    stored = json.loads(path.read_text())
    return {"logprobs": stored["logprobs"], "greedy": [client.Greedy(**each) for each in stored["greedy"]]}


def _device_memory(gpus: list[int]) -> list[int]:
    """MiB in use on each device, as nvidia-smi counts; empty without it."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", ",".join(map(str, gpus))]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]


def shared_memory_fault(ranks: int) -> str | None:
    """Why /dev/shm is too small for ``ranks`` ranks, or None."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if ranks > 1 and free < SHM_GIB_A_GPU * ranks:
        return (
            f"/dev/shm has {free:.1f} GiB free, {ranks} ranks need {SHM_GIB_A_GPU * ranks:.0f}: enlarge it "
            "(mount -o remount,size=16G /dev/shm; docker run --shm-size 16g)"
        )
    return None


def devices() -> list[int]:
    """Indices of the GPUs that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [int(index) for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return list(range(sum(line.startswith("GPU ") for line in listed.splitlines())))


def main() -> int:
    """Run the stages within the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="budget of this run")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: all, in this order")
    parser.add_argument("--ranks", type=int, help="GPUs to use: 2, 4 or 8; default: the most of these that there are")
    parser.add_argument("--layers", type=int, default=whole_model.PRO_LAYERS, help="of the whole model")
    parser.add_argument("--few-model", type=Path, default=Path("build/pro-few"), help="checkpoint; written if absent")
    parser.add_argument("--few-layers", type=int, default=4)
    parser.add_argument("--few-experts", type=int, default=64)
    parser.add_argument("--own-site", type=Path, help="folder with the patched vllm; default: this Python's")
    parser.add_argument("--stock-site", type=Path, help="folder with an unpatched vllm, for few-stock, whole-stock")
    parser.add_argument("--caches", type=Path, default=Path("build/caches"), help="a directory below it for each side")
    parser.add_argument("--logs", type=Path, default=Path("build/bench-logs"))
    parser.add_argument("--flags", default=FLAGS, help=f"of every server, default: {FLAGS}".replace("%", "%%"))
    parser.add_argument("--json", type=Path, required=True, help="the report; the table goes beside it, .md")
    parser.add_argument("--resume", action="store_true", help="keep the finished stages of an earlier report")
    a = parser.parse_args()
    wanted = a.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if (stock := [stage for stage in wanted if stage.endswith("-stock")]) and a.stock_site is None:
        parser.error(f"--stock-site: name a folder with an unpatched vllm, or leave {', '.join(stock)} out of --stages")
    found = devices()
    a.devices = bool(found)
    a.ranks = a.ranks or next((n for n in (8, 4, 2) if n <= len(found)), 1)
    if found and a.ranks > len(found):
        parser.error(f"--ranks {a.ranks}: {len(found)} GPUs are visible")
    if fault := shared_memory_fault(a.ranks):
        print(fault, file=sys.stderr)
        return 2
    a.caches, a.logs, a.few_model = a.caches.absolute(), a.logs.absolute(), a.few_model.absolute()
    a.logs.mkdir(parents=True, exist_ok=True)
    end_servers_with_this_process()
    made = report.Report(a.json, render)
    if a.resume and a.json.exists():
        made.data["stages"] = json.loads(a.json.read_text())["stages"]
    if any(stage.startswith("few-") for stage in wanted) and not (a.few_model / "config.json").exists():
        tool = [sys.executable, str(Path(__file__).with_name("make_checkpoint.py")), str(a.few_model)]
        tool += ["--preset", "pro", "--max-positions", str(whole_model.POSITIONS)]
        subprocess.run([*tool, "--layers", str(a.few_layers), "--experts-count", str(a.few_experts)], check=True)
    Bench(a).run(wanted, (found or list(range(a.ranks)))[: a.ranks], made)
    made.data["wrong"] = judge(made.data)
    made.write()
    print(render(made.data))
    return 1 if made.data["wrong"] or made.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
