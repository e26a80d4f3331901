"""A start in small: ``python cute_start.py REQUEST`` compiles CuTe DSL functions as vLLM does.

REQUEST is JSON: ``cases``, each with ``file`` (Python source), ``function`` (``launch`` is for the GPU, ``host`` runs),
``size``, ``factor``, ``dtype``, ``options`` and ``plain`` (without TVM FFI); ``forbid``: the compiler's passes raise.
CUTE_DSL_ARCH names the GPU; none is needed. Prints a line of JSON for each case: ``object``, the hash of its code for
host and GPU, and ``result`` of a function that ran, or ``error``. Logs go to stderr.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
FORBIDDEN = "the compiler was called"


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forbid_compiling() -> None:
    def parse(pipeline):
        raise RuntimeError(FORBIDDEN)

    from cutlass.cutlass_dsl import CuTeDSL

    passes = SimpleNamespace(PassManager=SimpleNamespace(parse=parse))
    CuTeDSL._get_dsl().compiler_provider.passmanager = passes


def compiled(case: dict) -> dict:
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack
    from cutlass.cutlass_dsl.tvm_ffi_provider import _aot_support
    from tvm_ffi import from_dlpack as argument

    module, size, factor = imported(Path(case["file"])), case["size"], case["factor"]
    plain = case.get("plain", False)
    options = case.get("options", "") + ("" if plain else " --enable-tvm-ffi")
    source, target = np.arange(size, dtype=np.float32), np.zeros(size, np.float32)
    if case["function"] == "host":
        function = cute.compile(module.host, from_dlpack(source), from_dlpack(target), factor, options=options)
        pack = from_dlpack if plain else argument
        function(pack(source), pack(target))
    else:
        tensor = cute.runtime.make_fake_compact_tensor(
            getattr(cutlass, case.get("dtype", "Float32")), (size,), assumed_align=16
        )
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        function = cute.compile(module.launch, tensor, tensor, factor, stream, options=options)
    code = _aot_support.export_module_to_bytes(function.ir_module, format="o", opt_level=3, enable_pic=True)
    return {"object": hashlib.sha256(code).hexdigest(), "result": target.tolist()}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    request = json.loads(sys.argv[1])
    imported(REPOSITORY / "model_executor" / "nvfp4" / "cute_cache.py").install()
    if request.get("forbid"):
        forbid_compiling()
    for case in request["cases"]:
        try:
            print(json.dumps(compiled(case)))
        except Exception as error:  # the DSL wraps what its passes raise
            if FORBIDDEN not in str(error):
                raise
            print(json.dumps({"error": FORBIDDEN}))


if __name__ == "__main__":
    main()
