"""The default loader beside vLLM's own: the same parameters and answers from only what a rank needs; clear failures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from . import checkpoints
from .support import REPOSITORY, Server, free_port, mean_difference, prompt_logprobs, prompt_tokens, running_server
from .test_bad_checkpoint import refusal


@pytest.fixture(scope="module")
def two_rank_checkpoint(directory: Path) -> Path:
    """A model whose experts divide over two ranks, in several shards."""
    return checkpoints.make(directory / "shards", "--intermediate", "256", "--shard-size", "9M")


def loaded(model: Path, load_format: str, status: Path) -> list[dict[str, object]]:
    """Load ``model`` in two expert-parallel ranks without serving it; what each rank measured, and its log."""
    environment = os.environ | {"MEGA_MOE_STATUS_DIR": str(status), "MEGA_MOE_RUN_ID": "load"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "load_bench.rank", str(model), load_format]
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", port, "--digest"],
            cwd=REPOSITORY / "scripts",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, log) in zip(processes, results, strict=True):
        assert process.returncode == 0, log[-4000:]
    return [json.loads(output) | {"log": log} for output, log in results]


@pytest.mark.timeout(600)
def test_each_rank_reads_its_own_experts_only_and_gets_what_vllms_loader_gives(
    two_rank_checkpoint: Path, tmp_path: Path
) -> None:
    sizes = {}
    for shard in two_rank_checkpoint.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            sizes |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    ours = loaded(two_rank_checkpoint, "auto", tmp_path / "ours")
    stock = loaded(two_rank_checkpoint, "safetensors", tmp_path / "stock")
    for rank in range(2):
        own = {name: size for name, size in sizes.items() if checkpoints.is_of_rank(name, rank, 2)}
        skipped = {name: size for name, size in sizes.items() if name not in own}
        assert len(skipped) == 4 * 32 * 12, "all twelve tensors of each of the other rank's experts"
        assert ours[rank]["digest"] == stock[rank]["digest"], "parameters differ from those that vLLM loads"
        state = json.loads((tmp_path / "ours" / f"load-rank{rank}.json").read_text())
        read = next(phase for phase in state["phases"] if phase["name"] == "checkpoint read")
        assert (read["done"]["tensors"], read["done"]["bytes"]) == (len(own), sum(own.values()))
        assert read["skipped"] == {"tensors": len(skipped), "bytes": sum(skipped.values())}
        line = re.search(
            r"Read (\d+) tensors, .* ([\d.]+) GB from the disk.* ([\d.]+) GB from memory", ours[rank]["log"]
        )
        assert line and int(line[1]) == len(own)
        fetched = 1e9 * (float(line[2]) + float(line[3]))
        assert sum(own.values()) <= fetched + 1e6 and fetched < sum(own.values()) + 0.5 * sum(skipped.values())
        assert "Read " not in stock[rank]["log"], "--load-format safetensors is vLLM's own loader"
    assert ours[0]["digest"] != ours[1]["digest"]


def test_answers_do_not_depend_on_the_loader(directory: Path, checkpoint: Path, server: Server) -> None:
    tokens = prompt_tokens(300)
    ours = prompt_logprobs(server, tokens)
    assert "tensors, 0.041 GB, in" in server.log.read_text(), "the default loader is this project's"
    with running_server(checkpoint, directory / "stock-loader.log", "--load-format", "safetensors") as running:
        difference = mean_difference(ours, prompt_logprobs(running, tokens))
    assert "Loading safetensors checkpoint shards" in running.log.read_text()
    print(f"mean |difference| between the loaders: {difference:.6f}")
    assert difference <= 1e-4


def test_a_shard_that_cannot_be_read_ends_the_server_by_name(
    two_rank_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard's disk fails while the first one's layers are already in."""
    (tmp_path / "failing.py").write_text(
        "import errno, os\n"
        "def install():\n"
        "    preadv = os.preadv\n"
        "    def failing(descriptor, buffers, offset, *flags):\n"
        "        if 'model-00002' in os.readlink(f'/proc/self/fd/{descriptor}'):\n"
        "            raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "        return preadv(descriptor, buffers, offset, *flags)\n"
        "    os.preadv = failing\n"
    )
    info = tmp_path / "failing-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfailing = failing:install\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = refusal(two_rank_checkpoint)
    assert re.search(r"CheckpointError: .*model-00002-of-\d+\.safetensors: bytes \d+ to \d+ cannot be read", log)
