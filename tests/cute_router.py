"""vLLM's router GEMM through the cache, on a GPU: ``CUTE_DSL_CACHE_DIR=DIR python tests/cute_router.py [--forbid]``.

Compiles it for DeepSeek-V4's shapes as vLLM does, or loads what DIR keeps; with ``--forbid`` the compiler's passes
raise. Prints a line of JSON for each batch: seconds until the kernel could be launched, and the relative error (L2) of
its logits to torch's product of the same inputs in float64. Exit code 1 if one passes 1e-5: rounding in float32 stays
below. Needs vLLM's GPU build; a second process with the same DIR has to print the same errors.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from cute_start import REPOSITORY, forbid_compiling, imported

SHAPES = {"DeepSeek-V4-Flash": (4096, 256), "DeepSeek-V4-Pro": (7168, 384)}
TOKENS = (1, 4, 5, 8, 16)  # up to 4: dot products; more: split along K, over a cluster
LIMIT = 1e-5


def main() -> int:
    if not imported(REPOSITORY / "model_executor" / "nvfp4" / "cute_cache.py").install():
        sys.exit("nothing is kept: set CUTE_DSL_CACHE_DIR, and install nvidia-cutlass-dsl")
    if "--forbid" in sys.argv[1:]:
        forbid_compiling()
    from vllm.model_executor.kernels.linear.cute_dsl.ll_bf16 import LLBf16Gemm

    gemm, worst = LLBf16Gemm(), 0.0
    generator = torch.Generator("cuda").manual_seed(0)
    for name, (hidden, experts) in SHAPES.items():
        weight = torch.randn(experts, hidden, generator=generator, device="cuda").bfloat16()
        for tokens in TOKENS:
            rows = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
            start = time.perf_counter()
            gemm.compile(gemm.dispatch(M=tokens, K=hidden, N=experts))
            seconds = time.perf_counter() - start
            expected = rows.double() @ weight.double().T
            error = ((gemm(rows, weight).double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error) if error == error else float("inf")
            print(json.dumps({"model": name, "tokens": tokens, "seconds": round(seconds, 3), "error": error}))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
