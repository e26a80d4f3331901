"""Compiles for Hopper what the SM100 backend does without its tensor core: plan, quantization, sum over slots.

``python kernel/tests/hopper_parts.py DIRECTORY`` needs nvidia-cutlass-dsl and no GPU; ``test_sm100_parts_gpu.py`` runs
the objects on an H100 or H200. They are the backend's own kernels, but for one instruction: Hopper has no conversion to
E2M1, so the quantization's is put together from comparisons here.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

from nvfp4_megamoe.backends.sm100 import build, catalogue, objects

ARCHITECTURE = "sm_90a"
NAMES = ("plan_one", "plan_cluster", "quantize_rows", "sum_slots")
# Between two magnitudes; a value on one goes to the even code: above it only from the codes 0, 2, 4 and 6 down.
_BOUNDARIES = ((0.25, "gt"), (0.75, "ge"), (1.25, "gt"), (1.75, "ge"), (2.5, "gt"), (3.5, "ge"), (5.0, "gt"))


def encode_e2m1(values):
    """In place of ``ptx.encode_e2m1``: codes of 8 values that are no NaN, the first in the lowest nibble."""
    from cutlass import Uint32
    from cutlass.cute import arch

    lines = [".reg .pred ABOVE; .reg .f32 SIZE; .reg .b32 CODE, SIGN; mov.b32 {$w0}, 0;"]
    for i in range(8):
        value = f"{{$r{i}}}"
        lines.append(f"abs.f32 SIZE, {value}; mov.b32 SIGN, {value}; shr.u32 SIGN, SIGN, 31; shl.b32 CODE, SIGN, 3;")
        for boundary, compare in _BOUNDARIES:
            lines.append(
                f"setp.{compare}.f32 ABOVE, SIZE, 0f{struct.pack('>f', boundary).hex()}; @ABOVE add.s32 CODE, CODE, 1;"
            )
        lines.append(f"shl.b32 CODE, CODE, {4 * i}; or.b32 {{$w0}}, {{$w0}}, CODE;")
    return arch.inline_ptx("{ " + " ".join(lines) + " }", write_only_types=[Uint32], read_only_args=list(values))


def compile_parts(target: Path) -> None:
    """Write the objects and their manifest to ``target``."""
    catalogue.set_environment(ARCHITECTURE)
    from nvfp4_megamoe.backends.sm100 import ptx

    ptx.encode_e2m1 = encode_e2m1
    target.mkdir(parents=True, exist_ok=True)
    items = []
    for name in NAMES:
        compiled = catalogue.compile_kernel(name, architecture=ARCHITECTURE)
        cubin = target / f"{name}.cubin"
        cubin.write_bytes(compiled.__cubin__)
        items.append(catalogue.describe(name, compiled.__ptx__, build.inspect(cubin).registers))
    objects.write(target, items, build.versions() | {"architecture": ARCHITECTURE})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    compile_parts(parser.parse_args().directory)
