"""FlashInfer's CuTe DSL kernels, which are right on real hardware, compiled for sm_100a as references for the model.

Only the kernels' own modules are imported: the packages around them need a CUDA driver and are replaced by empty ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

_PACKAGES = ("", ".fused_moe", ".fused_moe.cute_dsl", ".fused_moe.cute_dsl.blackwell", ".quantization", ".cute_dsl")
_MOCKED = (".jit", ".jit.moe_utils", ".jit.core", ".utils", ".api_logging")
_BLACKWELL = "flashinfer.fused_moe.cute_dsl.blackwell."
_FC1 = _BLACKWELL + "blockscaled_contiguous_gather_grouped_gemm_act_fusion"
_FC2 = _BLACKWELL + "blockscaled_contiguous_grouped_gemm_finalize_fusion"


def wheel_directory() -> Path | None:
    """Directory that holds the ``flashinfer`` package: FLASHINFER_WHEEL_DIR, or where it is installed."""
    if given := os.environ.get("FLASHINFER_WHEEL_DIR"):
        return Path(given)
    spec = importlib.util.find_spec("flashinfer")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def missing() -> str | None:
    """Why the public kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed"
    root = wheel_directory()
    if root is None or not (root / Path(*_FC1.split("."))).with_suffix(".py").exists():
        return "no flashinfer wheel: install flashinfer-python 0.7 or set FLASHINFER_WHEEL_DIR to an unpacked one"
    return None


def _prepare() -> None:
    from nvfp4_megamoe.backends.sm100.catalogue import set_environment

    set_environment()
    if _FC1 in sys.modules:
        return
    root = wheel_directory()
    for suffix in _PACKAGES:
        name = "flashinfer" + suffix
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for suffix in _MOCKED:
        mock = MagicMock(__path__=[], __spec__=None)
        mock.flashinfer_api = lambda *args, **kwargs: args[0] if args and callable(args[0]) else (lambda f: f)
        sys.modules["flashinfer" + suffix] = mock


def _pointer(kind, align: int = 32):
    from cutlass.cute.runtime import make_ptr
    from cutlass.cute.typing import AddressSpace

    return make_ptr(kind, align, AddressSpace.gmem, assumed_align=align)


def compile_fc1(tile: tuple[int, int], cluster: tuple[int, int], top_k: int):
    """Gather, grouped GEMM, SwiGLU and NVFP4 requantization; arguments are 12 pointers and T, rows, N, K, experts."""
    _prepare()
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream

    module = importlib.import_module(_FC1)
    kernel = module.BlockScaledContiguousGatherGroupedGemmKernel(
        16, tile, cluster, True, top_k, raster_along_m=False, enable_pdl=True
    )
    fp4, fp8, i32, f32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Int32, cutlass.Float32
    pointers = [
        _pointer(fp4),
        _pointer(fp4),
        _pointer(fp8, 16),
        _pointer(fp8, 16),
        _pointer(fp4),
        _pointer(fp8, 16),
        _pointer(f32, 4),
        *(_pointer(i32, 4) for _ in range(4)),
        _pointer(f32, 4),
        None,
    ]
    sizes = [cutlass.Int64(value) for value in (4096, 45008, 6144, 7168, 48)]
    return cute.compile(
        kernel.wrapper,
        *pointers,
        *sizes,
        tile_size=tile[0],
        scaling_vector_size=16,
        max_active_clusters=148 // (cluster[0] * cluster[1]),
        stream=make_fake_stream(),
        options="--keep-ptx",
    )


def compile_fc2(tile: tuple[int, int], cluster: tuple[int, int]):
    """Grouped GEMM, alpha and routing weight, bfloat16 reduction; 11 pointers and rows, N, K, experts, T, top_k."""
    _prepare()
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream

    module = importlib.import_module(_FC2)
    kernel = module.Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel(
        16, tile, cluster, raster_along_m=False, enable_pdl=True
    )
    fp4, fp8, i32, f32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Int32, cutlass.Float32
    pointers = [
        _pointer(fp4),
        _pointer(fp4),
        _pointer(fp8, 16),
        _pointer(fp8, 16),
        _pointer(cutlass.BFloat16),
        _pointer(f32, 4),
        *(_pointer(i32, 4) for _ in range(4)),
        _pointer(f32, 4),
        None,
    ]
    sizes = [cutlass.Int64(value) for value in (45008, 7168, 3072, 48, 4096, 8)]
    return cute.compile(
        kernel.wrapper,
        *pointers,
        *sizes,
        tile_size=tile[0],
        scaling_vector_size=16,
        max_active_clusters=148 // (cluster[0] * cluster[1]),
        stream=make_fake_stream(),
        options="--keep-ptx",
    )
