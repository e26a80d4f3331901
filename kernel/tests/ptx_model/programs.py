"""Small hand-written PTX programs: the frame around a body, and lane-wise evaluation of instructions."""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .memory import GlobalMemory

OUT, IN = 0x1000, 0x10_0000
_REGISTERS = """
 .reg .pred %p<16>; .reg .b8 %c<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %d<64>;
"""


def program(body: str, shared: int = 0) -> str:
    """A kernel with parameters ``out`` and ``in`` (pointers, loaded to %d0 and %d1) and %r0 = %tid.x."""
    static = f".shared .align 1024 .b8 buffer[{shared}];" if shared else ""
    return f"""
.version 9.4
.target sm_100a
.address_size 64
{static}
.visible .entry kernel(.param .u64 out, .param .u64 in)
{{
{_REGISTERS}
 ld.param.b64 %d0, [out];
 ld.param.b64 %d1, [in];
 mov.b32 %r0, %tid.x;
{body}
 ret;
}}
"""


def run(ptx: str, out: np.ndarray, source: np.ndarray | None = None, warps: int = 1, cluster: int = 1, **options):
    """Execute with ``out`` and ``source`` mapped; one cluster."""
    memory = GlobalMemory()
    memory.add(OUT, out, "out")
    memory.add(IN, np.zeros(16, np.uint8) if source is None else source, "in")
    params = np.array([OUT, IN], np.uint64).tobytes()
    machine = Machine(ptx, params, memory, (cluster, 1, 1), (32 * warps, 1, 1), cluster=(cluster, 1, 1), **options)
    machine.run()
    return machine


def evaluate(text: str, result: str, *inputs: tuple[str, np.ndarray]) -> np.ndarray:
    """One instruction on 32 lanes.

    Args:
        text: with ``{d}`` for the destination and ``{0}``, ``{1}`` ... for the sources.
        result: PTX type of the destination.
        inputs: (PTX type, 32 values), types b16, b32, b64, pred.
    """
    size = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8}
    letter = {"pred": "p", "b8": "c", "b16": "h", "b32": "r", "b64": "d"}
    lines, names, data = [], [], np.zeros((len(inputs), 32, 8), np.uint8)
    for i, (kind, values) in enumerate(inputs):
        raw = np.ascontiguousarray(values).reshape(32, 1).view(np.uint8)
        data[i, :, : raw.shape[1]] = raw
        lines.append(f"mad.wide.u32 %d{40 + i}, %r0, 8, %d1;")
        register = f"%{letter[kind]}{8 + i}"
        if kind == "pred":
            lines += [f"ld.global.b8 %h{8 + i}, [%d{40 + i}+{256 * i}];", f"setp.ne.b16 {register}, %h{8 + i}, 0;"]
        else:
            lines.append(f"ld.global.b{size[kind] * 8} {register}, [%d{40 + i}+{256 * i}];")
        names.append(register)
    destination = f"%{letter[result]}2"
    lines.append(text.format(*names, d=destination) + ";")
    if result == "pred":
        lines.append(f"selp.b32 %r2, 1, 0, {destination};")
    elif result == "b8":
        lines.append("mov.b16 %h2, {%c2, %c2};")
    stored, width = {"pred": ("%r2", 4), "b8": ("%h2", 2)}.get(result, (destination, size[result]))
    lines.append(f"mad.wide.u32 %d3, %r0, {width}, %d0;")
    lines.append(f"st.global.b{width * 8} [%d3], {stored};")
    out = np.zeros((32, width), np.uint8)
    run(program("\n".join(lines)), out, data)
    values = out.view(f"u{width}")[:, 0]
    return values.astype(bool) if result == "pred" else values & 255 if result == "b8" else values
