"""One rank that only loads, and what it measured as JSON: python -m load_bench.rank --help.

Makes the model in a worker of vLLM's, waits for the other ranks, then times the loader from the first byte until the
last tensor is in its parameter, and until the last layer is prepared.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import torch

from load_bench import disk

_POPULATE_WRITE = 23  # madvise(2), Linux 5.14 and later
_libc = ctypes.CDLL(None, use_errno=True)


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


def populate(tensor: torch.Tensor) -> None:
    """Have the system find every page of a tensor now, as for a write.

    Raises:
        OSError: it cannot.
    """
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _POPULATE_WRITE):
        raise OSError(ctypes.get_errno(), "memory for the parameters: " + os.strerror(ctypes.get_errno()))


def digest(model: torch.nn.Module) -> str:
    """SHA-256 over all parameters and buffers by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def load(options: argparse.Namespace) -> dict:
    """Load once in a worker of vLLM's and return what was measured; bytes, seconds, and bytes a second of the disk."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.cpu_worker import CPUWorker

    config = EngineArgs(
        model=str(options.model),
        tokenizer_mode="deepseek_v4",
        load_format=options.load_format,
        max_model_len=1024,
        tensor_parallel_size=options.ranks,
        enable_expert_parallel=options.ranks > 1,
    ).create_engine_config()
    files = sorted(options.model.glob("*.safetensors"))
    looks = options.look and options.rank == 0
    disk_rates: list[dict[str, float]] = []
    marks: dict[str, float] = {}
    create, load_model = base_loader.BaseModelLoader.create_model, base_loader.BaseModelLoader.load_model

    def create_and_start_the_clock(*arguments: object, **keywords: object) -> torch.nn.Module:
        made = create(*arguments, **keywords)
        if options.populate:
            for tensor in made.state_dict().values():
                populate(tensor)
        take = made.load_weights
        made.load_weights = lambda weights: note_the_last_tensor(take(weights))
        torch.distributed.barrier()
        if looks:
            disk_rates.append(disk.look(files))
        if options.warm and options.rank == 0:
            disk.make_warm(files)
        torch.distributed.barrier()
        marks.update(before=anonymous_bytes(), storage=storage_bytes(), started=time.perf_counter())
        return made

    def note_the_last_tensor(loaded: set[str]) -> set[str]:
        marks["read"] = time.perf_counter()
        return loaded

    def note_the_end(*arguments: object, **keywords: object) -> torch.nn.Module:
        made = load_model(*arguments, **keywords)
        marks.update(ended=time.perf_counter(), storage=storage_bytes() - marks["storage"])
        return made

    base_loader.BaseModelLoader.create_model = create_and_start_the_clock
    base_loader.BaseModelLoader.load_model = note_the_end
    with set_current_vllm_config(config), PeakMemory() as peak:
        address = f"tcp://127.0.0.1:{options.port}"
        worker = CPUWorker(config, options.rank, options.rank, address, is_driver_worker=options.rank == 0)
        worker.init_device()
        worker.load_model()
        torch.distributed.barrier()
    if looks:
        disk_rates.append(disk.look(files))
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
    if looks:
        result["disk"] = dict(zip(("before", "after"), disk_rates, strict=True))
    return result | ({"digest": digest(made)} if options.digest else {})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="load_bench.rank", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("load_format", help="vLLM's --load-format")
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("port", type=int, help="where the ranks meet")
    parser.add_argument(
        "--populate",
        action="store_true",
        help="find every page of the parameters before the clock starts: on a GPU their memory is there before the "
        "load begins, on a CPU the system finds it page by page at the first write",
    )
    parser.add_argument(
        "--warm", action="store_true", help="bring the files into memory before the clock starts, and hold them there"
    )
    parser.add_argument("--look", action="store_true", help="measure the disk right before and right after")
    parser.add_argument("--digest", action="store_true", help="hash all parameters")
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    with contextlib.redirect_stdout(sys.stderr):
        outcome = load(given)
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # nothing is left to save, and vLLM's own threads are slow to end
