"""Keeps what the CuTe DSL compiles in ``CUTE_DSL_CACHE_DIR``: a server's second start does not compile it again.

nvidia-cutlass-dsl 4.8.0 traces a kernel's Python into an MLIR module and runs a pipeline of passes over it, down to the
GPU's machine code. It keeps that for calls of ``@cute.jit`` functions; for ``cute.compile``, which vLLM, FlashInfer and
QuACK use, it keeps nothing. Here the pipeline's result is kept, whoever asked for it.

The passes are a function of the module, the pipeline (architecture and options are in it) and the compiler's library,
which has NVVM, libdevice and ptxas inside: those are the key. Source, shapes, constants and types of a kernel are all
in its module. Tracing, the checks of arguments and the host's launch code are made in every process as before.

Every compilation leaves a file, also one whose result cannot be kept: scripts/cache_environment.py counts them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VARIABLE = "CUTE_DSL_CACHE_DIR"
FOLDER = "compiled"  # below the variable's directory, whose other files are the DSL's own
MAGIC = b"nvfp4 cute dsl 1"

# Options with an effect beside the result (files, messages), or whose result depends on a file that they name.
_EFFECTS = re.compile(r"\b(dump-[a-z]+-path|flatten-locs-output-json-path|link-libraries|diagnostic)=")
_MESSAGES = ("remark_output", "warnings_filter", "collect_compiler_diagnostics")
# What the compiler's library reads from the environment.
_ENVIRONMENT = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")


class NotKeptError(Exception):
    """A compilation whose result cannot be kept; the message says why."""


def install() -> bool:
    """Keep what this process compiles from now on, and serve it what is kept; may be called again.

    False: it cannot; why is logged, unless it is that the DSL is not installed.
    """
    if find_spec("cutlass") is None:
        return False
    folder = os.environ.get(VARIABLE)
    if not folder:
        logger.info("CuTe DSL kernels are compiled anew by every start: %s is not set", VARIABLE)
        return False
    try:
        from cutlass.base_dsl.compiler import Compiler
    except ImportError as error:
        return _foreign(f"has no cutlass.base_dsl.compiler.Compiler ({error})")
    if hasattr(Compiler.compile, "kept_in"):
        return True
    expected = ["self", "module", "pipeline"]
    if (found := list(inspect.signature(Compiler.compile).parameters)[:3]) != expected:
        return _foreign(f"has a Compiler.compile that takes {found}, expected {expected}")
    Compiler.compile = _kept(Compiler.compile, Path(folder, FOLDER))
    logger.info("CuTe DSL kernels are kept in %s", Path(folder, FOLDER))
    return True


def _foreign(difference: str) -> bool:
    logger.warning(
        "CuTe DSL kernels are compiled anew by every start, and not counted: expected nvidia-cutlass-dsl 4.8.0, the "
        "installed one %s",
        difference,
    )
    return False


def _kept(compile_module: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """``Compiler.compile`` that looks into ``folder`` first; the returned module may be another than the given one."""

    @functools.wraps(compile_module)
    def compile_or_load(self: Any, module: Any, pipeline: str, *args: Any, **kwargs: Any) -> Any:
        compile_now = functools.partial(compile_module, self, module, pipeline, *args, **kwargs)
        if "cute-to-nvvm" not in pipeline:  # lowers for a dump, in place
            return compile_now()
        # The hook adds the entry that checks this process's arguments: after loading as after compiling.
        hook, self._post_compile_hook = self._post_compile_hook, None
        try:
            compiled = _load_or(compile_now, folder, module, pipeline, kwargs)
        finally:
            self._post_compile_hook = hook
        if hook:
            hook(compiled)
        return compiled

    compile_or_load.kept_in = folder
    return compile_or_load


def _load_or(
    compile_now: Callable[[], Any], folder: Path, module: Any, pipeline: str, options: Mapping[str, Any]
) -> Any:
    """What ``folder`` keeps, else the result of ``compile_now``, which changes ``module``; that leaves a file."""
    name = _name(module)
    try:
        key = _key(module, pipeline, options)
    except NotKeptError as error:
        compiled = _timed(compile_now, name, f"; it is not kept: {error}")
        _write(folder / f"not-kept-{name}.txt", str(error).encode())
        return compiled
    path = folder / f"{key.hex()}.mlirbc"
    compiled = _load(path, key)
    if compiled is None:
        compiled = _timed(compile_now, name)
        payload = _bytecode(compiled)
        _write(path, MAGIC + key + hashlib.sha256(payload).digest() + payload)
    return compiled


def _timed(compile_now: Callable[[], Any], name: str, note: str = "") -> Any:
    start = time.perf_counter()
    compiled = compile_now()
    logger.info("CuTe DSL compiled %s in %.2f s%s", name, time.perf_counter() - start, note)
    return compiled


def _key(module: Any, pipeline: str, options: Mapping[str, Any]) -> bytes:
    """32 bytes that name the result.

    Raises:
        NotKeptError: the result is not a function of what is known here.
    """
    compiler, forbidden = _compiler()
    if forbidden:
        raise NotKeptError("the environment forbids the DSL's caches")
    if found := _EFFECTS.search(pipeline):
        raise NotKeptError(f"option {found[1]} has an effect beside the result")
    if found := [name for name in _MESSAGES if options.get(name)]:
        raise NotKeptError(f"{found[0]} asks for the compiler's messages")
    environment = repr([os.environ.get(name) for name in _ENVIRONMENT])
    digest = hashlib.sha256(MAGIC)
    for part in (compiler.encode(), environment.encode(), pipeline.encode(), _bytecode(module)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


@functools.cache
def _compiler() -> tuple[str, bool]:
    """The DSL's own hash of its library and sources, and whether CUTE_DSL_(NO_CACHE|DISABLE_FILE_CACHING) is set.

    Raises:
        NotKeptError: it cannot tell.
    """
    from cutlass.base_dsl.common import DSLRuntimeError
    from cutlass.cutlass_dsl import CuTeDSL

    try:
        dsl = CuTeDSL._get_dsl()
        return dsl.get_version().hexdigest(), dsl.envar.no_cache or dsl.envar.disable_file_caching
    except (AttributeError, DSLRuntimeError) as error:
        raise NotKeptError(f"nvidia-cutlass-dsl does not tell its version: {error}") from error


def _load(path: Path, key: bytes) -> Any:
    """The kept module, in the current MLIR context; None: there is none, or it is damaged, which is logged."""
    from cutlass._mlir import ir

    try:
        content = path.read_bytes()
        head, digest, payload = content[:48], content[48:80], content[80:]
        if head != MAGIC + key:
            raise ValueError("it is no kernel kept here under this name")
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its checksum is wrong")
        return ir.Module.parse(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ir.MLIRError) as error:
        logger.warning("%s is not used, and its kernel compiled again: %s", path, error)
        return None


def _write(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step, so that another process reads all of it or nothing. A full disk is logged."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logger.warning("a compiled CuTe DSL kernel is not kept, and the next start compiles it again: %s", error)


def _bytecode(module: Any) -> bytes:
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    return buffer.getvalue()


def _name(module: Any) -> str:
    """The host function that launches the kernel, fit for a file's name."""
    operations = (each.operation for each in module.body.operations)
    names = [str(each.attributes["sym_name"]) for each in operations if each.name == "func.func"]
    return re.sub(r"\W+", "_", names[-1] if names else "unnamed").strip("_").removeprefix("cutlass_")[:80]
