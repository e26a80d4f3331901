"""One rank that only loads: python -m load_bench.rank MODEL LOAD_FORMAT RANK RANKS PORT POPULATE DIGEST. Prints JSON.

POPULATE and DIGEST are 0 or 1. Makes the model in a worker of vLLM's, waits for the other ranks, then times the loader
from the first byte until the last tensor is in its parameter, and until the last layer is prepared. With POPULATE every
page of the parameters is touched before the clock starts: on a GPU the parameters' memory is there before the load
begins, on a CPU the system finds it page by page at the first write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch


def anonymous_bytes() -> int:
    """Resident memory of this process, mapped files left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def storage_bytes() -> int:
    """Bytes that this process has caused to be fetched from storage, mapped files included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class PeakMemory:
    """Largest anonymous memory while the block runs, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())


def touch(tensor: torch.Tensor) -> None:
    """Write to every page of a tensor without changing a value."""
    if tensor.nbytes and tensor.is_contiguous():
        data = tensor.detach().reshape(-1).view(torch.uint8)[::4096]
        data.copy_(data.clone())


def digest(model: torch.nn.Module) -> str:
    """SHA-256 over all parameters and buffers by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def main(model: str, load_format: str, rank: int, ranks: int, port: int, populate: bool, with_digest: bool) -> dict:
    """Load once in a worker of vLLM's and return what was measured; bytes and seconds."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.cpu_worker import CPUWorker

    config = EngineArgs(
        model=model,
        tokenizer_mode="deepseek_v4",
        load_format=load_format,
        max_model_len=1024,
        tensor_parallel_size=ranks,
        enable_expert_parallel=ranks > 1,
    ).create_engine_config()
    marks: dict[str, float] = {}
    create, load = base_loader.BaseModelLoader.create_model, base_loader.BaseModelLoader.load_model

    def create_and_start_the_clock(*arguments: object, **options: object) -> torch.nn.Module:
        made = create(*arguments, **options)
        if populate:
            for tensor in made.state_dict().values():
                touch(tensor)
        take = made.load_weights
        made.load_weights = lambda weights: note_the_last_tensor(take(weights))
        torch.distributed.barrier()
        marks.update(before=anonymous_bytes(), storage=storage_bytes(), started=time.perf_counter())
        return made

    def note_the_last_tensor(loaded: set[str]) -> set[str]:
        marks["read"] = time.perf_counter()
        return loaded

    def note_the_end(*arguments: object, **options: object) -> torch.nn.Module:
        made = load(*arguments, **options)
        marks.update(ended=time.perf_counter(), storage=storage_bytes() - marks["storage"])
        return made

    base_loader.BaseModelLoader.create_model = create_and_start_the_clock
    base_loader.BaseModelLoader.load_model = note_the_end
    with set_current_vllm_config(config), PeakMemory() as peak:
        worker = CPUWorker(config, rank, rank, f"tcp://127.0.0.1:{port}", is_driver_worker=rank == 0)
        worker.init_device()
        worker.load_model()
        torch.distributed.barrier()
    made = worker.get_model()
    result = {
        "seconds": marks["ended"] - marks["started"],
        "read_seconds": marks["read"] - marks["started"],
        "storage_bytes": marks["storage"],
        "parameter_bytes": sum(tensor.nbytes for tensor in made.state_dict().values()),
        "anonymous_before_bytes": marks["before"],
        "anonymous_peak_bytes": peak.bytes,
        "anonymous_end_bytes": anonymous_bytes(),
    }
    return result | ({"digest": digest(made)} if with_digest else {})


if __name__ == "__main__":
    model_path, given_format, *numbers = sys.argv[1:]
    for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    with contextlib.redirect_stdout(sys.stderr):
        outcome = main(model_path, given_format, *map(int, numbers))
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # nothing is left to save, and vLLM's own threads are slow to end
